"""`llm-jax train` as a whole: it learns, repeats itself exactly, goes on exactly, and refuses to become another run."""

import json
import math
import shutil
import signal
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from tiny_corpus import TOPICS, write_corpus

from llm_jax.safety.guards import check_first_step

NO_SAMPLE = "--config.log.sample_prompt=none"  # saves the time to compile it
EXACT = ("step", "loss", "tokens", "grad_norm", "learning_rate")


def record(workdir, kind: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl of a kind, strictly parsed: neither NaN nor half a line."""

    def refuse(constant):
        raise ValueError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("kind") == kind]


def curve(workdir) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in record(workdir)]


def fixed_files(workdir) -> dict[str, bytes]:
    """What a refused command must not touch."""
    return {
        path.relative_to(workdir).as_posix(): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts and path.name != "ledger.jsonl"
    }


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def test_learns_and_tells(trained, tiny):
    lines = record(trained)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert abs(lines[0]["loss"] - math.log(400)) < 0.5
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert all(0 < line["tokens"] <= 8 * 32 and line["seconds"] > 0 and line["mfu"] > 0 for line in lines)
    # Warm-up of 4 steps to the peak, then half a cosine to a tenth of it.
    rates = [line["learning_rate"] for line in lines]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[13] == pytest.approx(0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert rates[23] == pytest.approx(0.001)

    evaluations = record(trained, "evaluate")
    assert [line["step"] for line in evaluations] == [0, 8, 16, 24]
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"] / 3
    untrained, after = evaluations[0]["perplexity"], evaluations[-1]["perplexity"]
    stdout = (trained / "stdout.txt").read_text()
    assert f"{untrained:,.1f} untrained, {after:,.2f} trained" in stdout
    assert "Sample:\nThe" in stdout and str(trained) in stdout
    stderr = (trained / "stderr.txt").read_text()
    assert "step 24/24" in stderr and "held-out subset, untrained" in stderr and "Traceback" not in stderr

    assert sorted(int(path.name) for path in (trained / "checkpoints").iterdir()) == [16, 20, 24]  # keep=3
    assert list((trained / "tensorboard").iterdir())
    result = json.loads((trained / "evaluate.json").read_text())
    assert result["step"] == 24 and set(result["sources"]) == {"tiny", "other"}


def test_twice_is_the_same_and_a_finished_run_only_reports(trained, tiny, tmp_path):
    done = tiny.run("train", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path) == curve(trained)
    assert record(tmp_path, "evaluate") == record(trained, "evaluate")
    assert (tmp_path / "evaluate.json").read_bytes() == (trained / "evaluate.json").read_bytes()
    answer = json.loads(done.stdout)  # and nothing else on standard output
    assert answer["evaluate"] == json.loads((trained / "evaluate.json").read_text())
    assert answer["sample"].startswith("The")

    before = fixed_files(tmp_path)
    again = tiny.run("train", tmp_path, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == answer
    assert "step 2" not in again.stderr.replace("from step 24", "")
    assert fixed_files(tmp_path) == before


def test_sigterm_saves_and_the_run_goes_on_exactly(tiny, tmp_path):
    # A schedule that does not depend on the number of steps: nobody knows when the notice arrives.
    flags = ["--config.optimizer.schedule=constant", "--config.evaluate.every=none", "--config.checkpoint.every=100000"]
    flags.append(NO_SAMPLE)
    process = subprocess.Popen(
        tiny.command("train", tmp_path / "a", *flags, "--config.train.steps=1000000"),
        cwd=ROOT, env=tiny.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 75, err
    steps = [line["step"] for line in record(tmp_path / "a")]
    saved = steps[-1]
    assert steps == list(range(1, saved + 1))
    assert f"preempted: saved step {saved}" in out
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == [str(saved)]

    total = f"--config.train.steps={saved + 5}"
    for name in ("a", "b"):
        done = tiny.run("train", tmp_path / name, *flags, total)
        assert done.returncode == 0, done.stderr
    assert len(curve(tmp_path / "b")) == saved + 5
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert (tmp_path / "a" / "evaluate.json").read_bytes() == (tmp_path / "b" / "evaluate.json").read_bytes()


def test_what_may_change(copy, tiny, trained):
    """More steps, another mesh, microbatches, and other habits of logging and saving."""
    flags = ["train.steps=26", "train.microbatches=2", "model.layers=scan", "log.every=2", "checkpoint.every=3"]
    flags += ["parallel.num_cpu_devices=2", "parallel.tensor=2", "log.sample_prompt=none"]
    done = tiny.run("train", copy, *(f"--config.{flag}" for flag in flags))
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in record(copy)] == [*range(1, 25), 26]
    assert curve(copy)[:24] == curve(trained)
    assert json.loads((copy / "evaluate.json").read_text())["step"] == 26
    assert json.loads((copy / "config.json").read_text())["train"]["steps"] == 26


def test_another_config_is_refused_field_by_field(copy, tiny, monkeypatch, capsys):
    before = fixed_files(copy)
    flags = ("model.width=64", "data.sources[0].weight=0.5", "train.steps=30", "optimizer.schedule=linear")
    assert tiny.main(monkeypatch, "train", copy, *(f"--config.{flag}" for flag in flags)) == 78
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"llm-jax: error: --workdir={copy} holds a run with another config")
    assert sorted(lines[1:]) == [
        "llm-jax: error: data.sources[0].weight: 0.75 there, 0.5 now",
        "llm-jax: error: model.width: 32 there, 64 now",
        "llm-jax: error: optimizer.schedule: 'cosine' there, 'linear' now",
    ]
    assert fixed_files(copy) == before


def test_fewer_steps_than_made_are_refused(copy, tiny, monkeypatch, capsys):
    before = fixed_files(copy)
    assert tiny.main(monkeypatch, "train", copy, "--config.train.steps=10") == 78
    assert "train.steps=10 is less than the 24 steps in the checkpoint" in capsys.readouterr().err
    assert fixed_files(copy) == before


def test_other_data_are_refused_unless_asked_for(copy, tiny, tmp_path, monkeypatch, capsys):
    """The same config, but the datasets behind it are others."""
    write_corpus(tmp_path / "tfds", {"train": TOPICS[64:72], "validation": TOPICS[72:]})
    write_corpus(tmp_path / "tfds", {"train": TOPICS[36:60], "validation": TOPICS[60:64]}, name="other")
    flags = [f"--config.data.data_dir={tmp_path / 'tfds'}", "--config.train.steps=26"]
    before = fixed_files(copy)
    assert tiny.main(monkeypatch, "train", copy, *flags) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "llm-jax: error: the checkpoint of step 24 was trained on other data (stores {" in line
    assert "--config.checkpoint.allow_other_data" in line
    assert "tokenizer" not in line  # it goes on with its own
    assert fixed_files(copy) == before

    weight = "--config.data.sources[0].weight=0.5"
    done = tiny.run("train", copy, *flags, weight, "--config.checkpoint.allow_other_data", NO_SAMPLE)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in record(copy)] == list(range(1, 27))
    assert (copy / "tokenizer.model").read_bytes() == before["tokenizer.model"]


def checkpointed_arrays(workdir) -> dict[int, list[np.ndarray]]:
    """Every array of every checkpoint, read by Orbax alone."""
    return {
        int(step.name): jax.tree.leaves(
            [ocp.PyTreeCheckpointHandler().restore(step / item) for item in ("parameters", "optimizer")]
        )
        for step in (workdir / "checkpoints").iterdir()
    }


def test_nan_stops_the_run_and_reaches_no_checkpoint(tiny, tmp_path):
    """By a learning rate beyond reason."""
    flags = (
        "optimizer.peak_learning_rate=1e15",
        "optimizer.clip_norm=none",
        "checkpoint.every=1",
        "evaluate.every=none",
    )
    done = tiny.run("train", tmp_path, *(f"--config.{flag}" for flag in flags))
    assert done.returncode == 70, done.stderr
    assert "llm-jax: stopped (exit code 70): " in done.stderr and "Traceback" not in done.stderr
    assert all(line["loss"] != "NaN" for line in record(tmp_path)[:-1])
    for arrays in checkpointed_arrays(tmp_path).values():
        assert all(np.isfinite(array).all() for array in arrays)


def test_checks_of_the_first_step():
    norms = {"embed": np.float32(0.1), "blocks": {"wq": np.array([0.1, 0.2]), "scale": np.array([0.1, 0.2])}}
    check_first_step(math.log(400) + 0.3, norms, 400)
    with pytest.raises(RuntimeError, match=r"first loss is 3.000, but that of a guess is ln 400 = 5.991"):
        check_first_step(3.0, norms, 400)
    for still in (0.0, math.nan):
        norms["blocks"]["wq"][1] = still
        with pytest.raises(RuntimeError, match=r"no gradient in the first step: blocks/wq$"):
            check_first_step(6.0, norms, 400)
