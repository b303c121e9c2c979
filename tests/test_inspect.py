"""What `inspect` says of a finished run, against the files themselves."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT

from llm_jax.safety.checkpoint import Checkpoints


@pytest.fixture
def inspect(tiny, monkeypatch, capfd):
    def run(what, workdir, *flags):
        from llm_jax import cli
        from llm_jax.parallel import hosts

        for name in ("LLM_JAX_CACHE", "TFDS_DATA_DIR"):
            monkeypatch.setenv(name, tiny.environment[name])
        monkeypatch.setattr(hosts, "start", lambda *args, **options: None)
        capfd.readouterr()
        code = cli.main(["inspect", what, f"--workdir={workdir}", *flags])
        return code, capfd.readouterr()

    return run


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_batch_shows_the_text_that_was_trained_on(inspect, trained):
    from tiny_corpus import TOPICS

    code, printed = inspect("batch", trained, "--step=3", "--json")
    assert code == 0
    result = json.loads(printed.out)
    assert result["step"] == 3 and len(result["rows"]) == 8
    texts = {"tiny": TOPICS[:30], "other": TOPICS[36:60]}
    for row in result["rows"]:
        assert sum(piece["tokens"] for piece in row["pieces"]) <= 33
        for piece in row["pieces"]:
            number = int(piece["document"].removeprefix("train:"))
            # tfds may store documents in another order, so any document may be the one; tokens may cut a character.
            part = piece["text"].strip("\N{REPLACEMENT CHARACTER}")
            assert any(part in text for text in texts[row["source"]]), (number, piece)
    assert inspect("batch", trained)[0] == 78


def test_batch_in_words(inspect, trained):
    code, printed = inspect("batch", trained, "--step=1")
    assert code == 0 and printed.out.count("\nrow ") == 7 and "window" in printed.out


def test_checkpoints_finds_a_flipped_bit_and_changes_nothing(inspect, copied):
    code, printed = inspect("checkpoints", copied)
    assert code == 0 and printed.out.splitlines() == [f"step {step}: intact" for step in (16, 20, 24)]

    files = [path for path in (copied / "checkpoints" / "20" / "parameters").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    code, printed = inspect("checkpoints", copied, "--json")
    result = json.loads(printed.out)
    assert code == 70 and result["intact"] == [16, 24] and list(result["damaged"]) == ["20"]
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["16", "20", "24"]


def test_params_lists_what_is_saved(inspect, trained):
    code, printed = inspect("params", trained, "--step=16", "--json")
    result = json.loads(printed.out)
    assert code == 0 and result["step"] == 16
    width, vocab_size = 32, 400
    assert result["parameters"]["embed"]["shape"] == [vocab_size, width]
    embed = np.asarray(Checkpoints(trained / "checkpoints").read("parameters", 16)["embed"])
    np.testing.assert_allclose(result["parameters"]["embed"]["rms"], np.sqrt(np.mean(embed**2)), rtol=1e-5)
    assert inspect("params", trained, "--step=17")[0] == 78


def test_diff_of_a_run_with_itself_and_with_another(inspect, trained, copied):
    code, printed = inspect("diff", trained, f"--other={copied}")
    assert code == 0
    assert "config: the same" in printed.out and "losses: bit-identical in all 24 common steps" in printed.out
    assert printed.out.count("bit-identical") == 4

    config = json.loads((copied / "config.json").read_text())
    config["train"]["seed"] = 5
    (copied / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == 7 and "kind" not in line:
            line["loss"] *= 1.25
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = json.loads(inspect("diff", trained, f"--other={copied}", "--json")[1].out)
    assert result["config"] == {"train.seed": [0, 5]}
    assert result["losses"]["first_difference"] == 7
    assert result["losses"]["largest_relative_difference"] == pytest.approx(0.2)
    assert inspect("diff", trained)[0] == 78


def test_without_a_checkpoint(inspect, tmp_path):
    from llm_jax.config import dumps
    from llm_jax.flags import load_config_file

    (tmp_path / "config.json").write_text(dumps(load_config_file(str(ROOT / "tests" / "tiny.py"))))
    code, printed = inspect("params", tmp_path)
    assert code == 78 and "holds no checkpoint yet" in printed.err
    code, printed = inspect("checkpoints", tmp_path)
    assert code == 0 and "holds no checkpoint" in printed.out
