"""`llm-jax evaluate`: the numbers are those of a plain computation, whatever the batch size, the mesh and the start."""

import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG
from test_train import record
from tiny_corpus import TOPICS, write_corpus

from llm_jax.config import Parallel
from llm_jax.data.stream import HeldOut
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.flags import load_config_file
from llm_jax.jobs.evaluate import make_evaluate, measures
from llm_jax.jobs.prepare import prepare
from llm_jax.jobs.workdir import Workdir, restore_parameters
from llm_jax.parallel.sharding import make_mesh

LENGTH = 32
TEXTS = {"tiny": TOPICS[30:36], "other": TOPICS[60:64]}  # the held-out splits, as conftest.py writes them


@pytest.fixture(scope="module")
def config(tiny):
    config = load_config_file(str(CONFIG))
    config.data.data_dir, config.data.cache_dir = str(tiny.data_dir), str(tiny.cache)
    return config


@pytest.fixture(scope="module")
def held_out(config, trained):
    prepared = prepare(config, say=lambda line: None)
    return {name: HeldOut(store, LENGTH) for name, store in prepared.held_out.items()}


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_tokenizer(trained / "tokenizer.model")


def evaluate_on(
    parallel: Parallel, num_devices: int, batch_size: int, config, trained, tokenizer, held_out, subset=None
):
    mesh = make_mesh(parallel, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        _, model = restore_parameters(Workdir(trained), config, tokenizer, mesh, step=None)
        return make_evaluate(mesh, batch_size, None)(model, held_out, subset)


@jax.jit
def all_logits(model, tokens_BT, is_text_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return model.logits(model(tokens_BT, is_text_BT, positions_BT)[0])


@pytest.fixture(scope="module")
def plain(config, trained, tokenizer) -> dict[str, dict[str, np.ndarray]]:
    """Sums by document: from the texts, by the full softmax of each piece of a document by itself."""
    mesh = make_mesh(Parallel(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, model = restore_parameters(Workdir(trained), config, tokenizer, mesh, step=None)
    result = {}
    for name, texts in TEXTS.items():
        sums = {key: np.zeros(len(texts)) for key in ("tokens", "nll", "top1", "top5")}
        sums |= {"bytes": np.array([len(text.encode()) for text in texts], float)}
        sums |= {"words": np.array([len(text.split()) for text in texts], float)}
        pieces, place = [], 0  # place: in the concatenation; a window is 32 inputs and the token behind them
        for document, ids in enumerate(tokenizer.encode(texts)):
            ids = [1, *ids.tolist(), 2]
            first = 0
            while first < len(ids) - 1:
                last = min(len(ids), first + LENGTH + 1 - (place + first) % LENGTH)
                pieces.append((document, ids[first:last]))
                first = last - 1
            place += len(ids)
        pieces = [piece for piece in pieces if len(piece[1]) > 1]
        inputs, is_text = np.zeros((2, len(pieces), LENGTH), np.int32)
        for row, (_, ids) in enumerate(pieces):
            inputs[row, : len(ids) - 1] = ids[:-1]
            is_text[row, : len(ids) - 1] = 1
        with jax.set_mesh(mesh):
            logits_BTV = np.asarray(all_logits(model, inputs, is_text), np.float64)
        for row, (document, ids) in enumerate(pieces):
            for logits_V, target in zip(logits_BTV[row], ids[1:], strict=False):
                rank = int(np.sum(logits_V > logits_V[target]))
                sums["tokens"][document] += 1
                sums["nll"][document] += np.log(np.sum(np.exp(logits_V))) - logits_V[target]
                sums["top1"][document] += rank < 1
                sums["top5"][document] += rank < 5
        result[name] = sums
    return result


def by_hand(sums: dict[str, np.ndarray]) -> dict[str, float]:
    total = {key: float(value.sum()) for key, value in sums.items()}
    return {
        "loss": total["nll"] / total["tokens"],
        "perplexity": 2 ** (total["nll"] / total["tokens"] / math.log(2)),
        "bits_per_byte": total["nll"] / total["bytes"] / math.log(2),
        "word_perplexity": math.exp(total["nll"] / total["words"]),
        "top1_accuracy": total["top1"] / total["tokens"],
        "top5_accuracy": total["top5"] / total["tokens"],
        "tokens": total["tokens"],
        "documents": len(sums["tokens"]),
        "bytes": total["bytes"],
    }


def test_equals_a_plain_computation(trained, plain):
    result = json.loads((trained / "evaluate.json").read_text())
    assert set(result) == {"step", "all", "sources"} and list(result["sources"]) == ["tiny", "other"]
    everything = {key: np.concatenate([plain[name][key] for name in plain]) for key in plain["tiny"]}
    for measured, sums in [(result["all"], everything), *((result["sources"][name], plain[name]) for name in plain)]:
        interval = measured.pop("interval95")
        assert measured == pytest.approx(by_hand(sums), rel=1e-5)
        assert interval[0] < measured["loss"] < interval[1]
        for key in ("tokens", "documents", "bytes"):
            assert measured[key] == by_hand(sums)[key]


def test_interval_is_that_of_documents_drawn_anew():
    rng = np.random.default_rng(0)
    documents = 400
    tokens = rng.integers(5, 500, documents).astype(float)
    nll = tokens * rng.normal(3, 0.5, documents)  # tokens of a document are alike
    sums = {"tokens": tokens, "nll": nll, "top1": nll, "top5": nll}
    low, high = measures(sums)["interval95"]
    draws = rng.integers(documents, size=(4000, documents))
    losses = nll[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    expected_low, expected_high = np.quantile(losses, [0.025, 0.975])
    assert (low, high) == pytest.approx((expected_low, expected_high), abs=0.1 * (expected_high - expected_low))


@pytest.mark.parametrize(
    "parallel, num_devices, batch_size",
    [
        (Parallel(), 1, 1),
        (Parallel(), 1, 7),
        (Parallel(), 1, 16),
        (Parallel(fsdp=8), 8, 7),
        (Parallel(fsdp=8), 8, 16),
        (Parallel(fsdp=4, tensor=2), 8, 16),
    ],
)
def test_batch_size_and_mesh_change_nothing(parallel, num_devices, batch_size, config, trained, tokenizer, held_out):
    expected = json.loads((trained / "evaluate.json").read_text())
    result = evaluate_on(parallel, num_devices, batch_size, config, trained, tokenizer, held_out)
    for name in ("all", "tiny", "other"):
        found, wanted = ((r["all"] if name == "all" else r["sources"][name]) for r in (result, expected))
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            if isinstance(value, int):
                assert found[key] == value, key
            else:  # accuracies are counts, too
                exact = key.endswith("accuracy")
                assert found[key] == pytest.approx(value, rel=1e-12 if exact else 1e-5 if "word" in key else 1e-6), key


def test_subset_is_fixed_and_evenly_spaced(config, trained, tokenizer, held_out):
    lines = record(trained, "evaluate")
    assert len({line["tokens"] for line in lines}) == 1
    result = evaluate_on(Parallel(), 1, 5, config, trained, tokenizer, held_out, subset=16)
    assert result["all"]["loss"] == pytest.approx(lines[-1]["loss"], rel=1e-6)
    assert result["all"]["tokens"] == lines[-1]["tokens"]
    for name, split in held_out.items():
        windows = [round(math.floor(i * (split.num_rows - 1) / 15)) for i in range(16)]
        counted = sum(int((split.documents_BT(np.array([window])) >= 0).sum()) for window in windows)
        assert result["sources"][name]["tokens"] == counted
        assert "bits_per_byte" not in result["sources"][name]


def test_subset_larger_than_one_source_only(config, trained, tokenizer, held_out):
    """A source that is taken whole has bits per byte, the other and so the sum have none."""
    subset = (held_out["tiny"].num_rows + held_out["other"].num_rows) // 2
    smaller, larger = sorted(held_out, key=lambda name: held_out[name].num_rows)
    for names in ([smaller, larger], [larger, smaller]):
        splits = {name: held_out[name] for name in names}
        result = evaluate_on(Parallel(), 1, 16, config, trained, tokenizer, splits, subset=subset)
        assert "bits_per_byte" in result["sources"][smaller]
        assert "bits_per_byte" not in result["sources"][larger] and "bits_per_byte" not in result["all"]


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def test_it_can_be_given_up_before_every_batch(config, trained, tokenizer, held_out):
    mesh = make_mesh(Parallel(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, model = restore_parameters(Workdir(trained), config, tokenizer, mesh, step=None)
        evaluate = make_evaluate(mesh, 4, None)
        whole = evaluate(model, held_out, 10)
        asked = []
        assert evaluate(model, held_out, 10, proceed=lambda: asked.append(None) is None) == whole
        assert len(asked) == 2 * 3  # sources, batches of 4 of 10 rows
        for last in (1, 3, 6):
            asked.clear()
            assert evaluate(model, held_out, 10, proceed=lambda last=last: asked.append(0) or len(asked) < last) is None
            assert len(asked) == last


def test_command(copy, trained, tiny):
    """In a process of its own, on the run's one device: the same numbers to the last bit, as a table or as JSON."""
    expected = json.loads((trained / "evaluate.json").read_text())
    os.unlink(copy / "evaluate.json")
    done = tiny.run("evaluate", copy, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((copy / "evaluate.json").read_text()) == expected
    done = tiny.run("evaluate", copy, "--step=16", "--batch_size=3")
    assert done.returncode == 0, done.stderr
    result = json.loads((copy / "evaluate.json").read_text())
    assert result["step"] == 16 and result["all"]["loss"] > expected["all"]["loss"]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["held-out", "tiny", "other", "all"]
    for line, measured in zip(lines[1:], [*result["sources"].values(), result["all"]], strict=True):
        assert f"{measured['loss']:.4f}" in line and f"{measured['tokens']:,}" in line


@pytest.mark.soak
def test_the_average_of_the_parameters(copy, tiny, tmp_path):
    """Kept, saved and evaluated if asked for."""
    done = tiny.run("evaluate", copy, "--ema")
    assert done.returncode == 78 and "this run keeps no average" in done.stderr
    flags = ("--config.train.ema_decay=0.9", "--config.train.steps=12", "--config.log.sample_prompt=none")
    assert tiny.run("train", tmp_path / "run", *flags).returncode == 0
    plain, average = (
        json.loads(tiny.run("evaluate", tmp_path / "run", "--json", *flag).stdout)["all"] for flag in ([], ["--ema"])
    )
    # While the loss falls fast, the average of the last steps is behind.
    assert average["tokens"] == plain["tokens"] and average["loss"] > plain["loss"]
    assert tiny.run("generate", tmp_path / "run", "--prompt=The", "--ema", "--max_tokens=4").returncode == 0


def test_other_text_with_the_tokenizer_of_the_run(copy, tiny, tokenizer, tmp_path, monkeypatch, capsys):
    """The datasets have changed since: what is measured is still this model, with the tokens it knows."""
    write_corpus(tmp_path / "tfds", {"train": TOPICS[:3], "validation": TOPICS[70:74]})
    write_corpus(tmp_path / "tfds", {"train": TOPICS[3:6], "validation": TOPICS[74:76]}, name="other")
    flags = ["--json", f"--config.data.data_dir={tmp_path / 'tfds'}", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    assert tiny.main(monkeypatch, "evaluate", copy, *flags, num_devices=1) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sources"]["tiny"]["tokens"] == sum(len(ids) + 1 for ids in tokenizer.encode(TOPICS[70:74]))
    assert result["sources"]["tiny"]["loss"] < 5
