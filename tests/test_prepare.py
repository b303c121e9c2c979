import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import CONFIG, ROOT
from tiny_corpus import TOPICS, write_corpus

from llm_jax.config import Config, Data, Source, Tokenizer, Train, UserError
from llm_jax.data import store_writer
from llm_jax.data.stream import TrainStream
from llm_jax.data.tokenizer import train_tokenizer
from llm_jax.flags import load_config_file
from llm_jax.jobs import prepare as job
from llm_jax.jobs.prepare import cache_dir, prepare, run, summary, table

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tfds"


def nothing(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    write_corpus(folder, {"train": TOPICS[:40], "validation": TOPICS[40:45]}, name="first")
    write_corpus(folder, {"train": TOPICS[45:]}, name="second")
    return folder


@pytest.fixture
def config(data_dir, tmp_path):
    sources = (
        Source(name="first", weight=3),
        Source(name="second", split="train[:80%]", held_out="train[80%:]"),
    )
    data = Data(sources=sources, data_dir=str(data_dir), cache_dir=str(tmp_path / "cache"), num_workers=1)
    return Config(data=data, tokenizer=Tokenizer(kind="bpe", vocab_size=700))


def test_from_documents_to_stores(config):
    prepared = prepare(config, say=nothing)
    assert list(prepared.train) == list(prepared.held_out) == ["first", "second"]
    assert prepared.weights == {"first": 3, "second": 1}
    assert (prepared.tokenizer.kind, prepared.tokenizer.vocab_size) == ("bpe", 700)
    part = prepared.held_out["first"]
    assert [prepared.tokenizer.decode(part.document_tokens(i)) for i in range(5)] == TOPICS[40:45]
    second = TOPICS[45:]
    cut = round(len(second) * 0.8)
    for part, texts in ((prepared.train["second"], second[:cut]), (prepared.held_out["second"], second[cut:])):
        assert prepared.tokenizer.decode(part.tokens(0, part.num_tokens)) == "".join(texts)
    assert prepared.held_out["second"].key(0) == f"train:{cut}"


def test_the_second_time_nothing_is_done(config, monkeypatch):
    first = prepare(config, say=nothing)

    def fail(*args, **kwargs):
        raise AssertionError("done again")

    monkeypatch.setattr(job, "train_tokenizer", fail)
    monkeypatch.setattr(store_writer, "write_shard", fail)
    lines = []
    again = prepare(config, say=lines.append)
    assert lines == []
    assert again.tokenizer.model == first.tokenizer.model
    for name in first.train:
        assert again.train[name].fingerprint == first.train[name].fingerprint


def test_it_says_what_takes_time(config):
    lines = []
    prepare(config, say=lines.append)
    assert any(line.startswith("training a bpe tokenizer of 700 pieces on ") for line in lines)
    assert any(line.startswith("tokenizing first: 45 documents, ") and "1 worker, about " in line for line in lines)


def test_the_verb_prints_a_table_or_json(config, capsys):
    run(config)
    table = capsys.readouterr().out
    assert "bytes/token" in table and "second" in table
    run(config, as_json=True)
    result = json.loads(capsys.readouterr().out)
    counts = result["sources"]["first"]["train"]
    assert counts["documents"] == 40
    assert counts["bytes"] == sum(len(text.encode()) for text in TOPICS[:40])
    assert counts["bytes_per_token"] == pytest.approx(counts["bytes"] / counts["tokens"])
    assert result["tokenizer"]["sha256"][:16] in table and f"{counts['tokens']:,}" in table


def test_other_settings_make_another_tokenizer_and_other_stores(config):
    before = prepare(config, say=nothing)
    config.tokenizer.vocab_size = 650
    after = prepare(config, say=nothing)
    assert after.tokenizer.vocab_size == 650
    assert after.train["first"].fingerprint != before.train["first"].fingerprint
    assert len(os.listdir(pathlib.Path(config.data.cache_dir) / "tokenizers")) == 2


def test_a_given_tokenizer(config, tmp_path):
    given = train_tokenizer(iter(TOPICS[:50]), kind="bpe", vocab_size=600)
    given.save(tmp_path / "given.model")
    config.tokenizer.model_file = str(tmp_path / "given.model")
    assert prepare(config, say=nothing).tokenizer.sha256 == given.sha256
    config.tokenizer.model_file = str(tmp_path / "absent.model")
    with pytest.raises(UserError, match="tokenizer.model_file='.*absent.model' cannot be read"):
        prepare(config, say=nothing)


def test_one_dataset_may_be_used_twice(config):
    config.data.sources = (
        Source(name="second", split="train[:20%]", held_out="train[80%:]"),
        Source(name="second", split="train[20%:40%]", held_out="train[80%:]", weight=2),
    )
    prepared = prepare(config, say=nothing)
    assert prepared.weights == {"second train[:20%]": 1, "second train[20%:40%]": 2}
    first, second = prepared.train.values()
    assert first.key(first.num_documents - 1) != second.key(0) and first.folder != second.folder


def test_held_out_documents_must_not_be_trained_on(config):
    config.data.sources = (Source(name="second", split="train", held_out="train[90%:]"),)
    with pytest.raises(UserError, match=r"share documents, train:\d+ for one; try split='train\[:98%\]'") as raised:
        prepare(config, say=nothing)
    assert "\n" not in str(raised.value)


def test_a_vocabulary_larger_than_the_corpus_leaves_nothing_behind(config):
    config.tokenizer = Tokenizer(kind="unigram", vocab_size=100_000)
    with pytest.raises(UserError, match="tokenizer.vocab_size=100000 is more than the corpus allows: at most"):
        prepare(config, say=nothing)
    assert not (pathlib.Path(config.data.cache_dir) / "tokenizers").exists()


def test_a_cache_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config.data.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="cannot write to .*: Not a directory; make room or set data.cache_dir"):
        prepare(config, say=nothing)


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LLM_JAX_CACHE", raising=False)
    assert cache_dir(Data()) == str(tmp_path / ".cache" / "llm_jax")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "variable"))
    assert cache_dir(Data()) == str(tmp_path / "variable")
    assert cache_dir(Data(cache_dir="~/field")) == str(tmp_path / "field")


def test_lengths_and_epochs_are_those_of_the_stored_tokens(config, monkeypatch):
    monkeypatch.setattr(job, "INDEX_AT_ONCE", 7)
    prepared = prepare(config, say=nothing)
    train = Train(steps=50, batch_size=6, sequence_length=1000)
    result = summary(prepared, train)
    for name, splits in result["sources"].items():
        for split, stores in (("train", prepared.train), ("held_out", prepared.held_out)):
            part = stores[name]
            lengths = [len(part.document_tokens(i)) for i in range(part.num_documents)]
            assert splits[split]["tokens_per_document"] == {
                "mean": pytest.approx(np.mean(lengths)),
                "median": pytest.approx(np.median(lengths)),
                "percentile_95": pytest.approx(np.percentile(lengths, 95)),
                "longest": max(lengths),
            }
            assert splits[split]["shorter_than_sequence"] == np.mean(np.array(lengths) < 1000)
            assert splits[split]["tokens"] == sum(lengths)
    epochs = TrainStream(prepared.train, prepared.weights, sequence_length=1000, batch_size=6, seed=0).epochs(50)
    assert epochs == {name: pytest.approx(splits["train"]["epochs"]) for name, splits in result["sources"].items()}
    lines = table(result).splitlines()
    assert table(summary(prepared)).splitlines() == lines[:6]  # the tokenizer and a table of five lines
    first = result["sources"]["first"]["train"]
    *_, longest, below, epochs = lines[8].split()
    assert longest == f"{first['tokens_per_document']['longest']:,}" and epochs == f"{first['epochs']:.3f}"
    assert below == f"{first['shorter_than_sequence']:.1%}" and len(lines) == 12
    assert lines[9].endswith("%")  # held-out text has no epochs


def test_a_process_of_several_is_named_whole():
    for given, message in {
        (2, None): "belong together; give --process_id, too",
        (None, 0): "belong together; give --num_processes, too",
        (2, 2): "--process_id=2 must be less than --num_processes=2",
    }.items():
        with pytest.raises(UserError, match=message):
            job.part_of(*given)
    assert job.part_of(None, None) == job.part_of(1, 0) == store_writer.ALL


SECONDS_TO_END = 240
PROGRAM = """
import os, signal
from llm_jax.cli import entry
from llm_jax.data import store_writer

store_writer.SMALLEST_SHARD, store_writer.SECONDS_BETWEEN_LOOKS = 12_000, 0.05
{more}
entry()
"""
KILLS_ITSELF = """
write, shards = store_writer.write_shard, []

def write_shard(shard, *, report, **arguments):
    shards.append(shard)
    write(shard, report=report if len(shards) < 3 else lambda _: os.kill(os.getpid(), signal.SIGKILL), **arguments)

store_writer.write_shard = write_shard
"""


@pytest.fixture
def host(tiny, tmp_path):
    """Starts `llm-jax prepare` with tests/tiny.py as one of several processes whose cache is tmp_path."""
    processes = []

    def start(number: int, count: int, more: str = "") -> subprocess.Popen:
        many = [f"--num_processes={count}", f"--process_id={number}", "--config.data.num_workers=1"]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(more=more), "prepare", f"--config={CONFIG}", *many],
            cwd=ROOT, env=tiny.environment | {"LLM_JAX_CACHE": str(tmp_path)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        timer = threading.Timer(SECONDS_TO_END, process.kill)  # so that a hang is a failure
        timer.start()
        processes.append((process, timer))
        return process

    yield start
    for process, timer in processes:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def line_with(process: subprocess.Popen, text: str) -> str:
    """The next line it prints that has the text."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return line
    raise AssertionError(f"no {text!r} in {''.join(lines)}")


def contents(cache: pathlib.Path) -> dict[str, bytes]:
    paths = [*cache.glob("tokens/*/*"), *cache.glob("tokenizers/*")]
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def by_one_process(tiny, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes of it."""
    config = load_config_file(str(CONFIG))
    config.data.data_dir, config.data.num_workers = str(tiny.data_dir), 1
    config.data.cache_dir = str(tmp_path_factory.mktemp("one"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SMALLEST_SHARD", 12_000)
        prepare(config, say=nothing)
    files = contents(pathlib.Path(config.data.cache_dir))
    assert sum(".array_record-" in path for path in files) > 10 and sum("store.json" in path for path in files) == 2
    return files


def test_a_host_is_killed_and_comes_again(host, by_one_process, tmp_path):
    second = host(1, 2, more=KILLS_ITSELF)
    assert "waiting: process 0 has to train the tokenizer" in line_with(second, "waiting")
    first = host(0, 2)
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    finished = sorted(tmp_path.glob("tokens/tiny-*/partial/train-*[13579]-of-*.npz"))
    half = [path for path in tmp_path.glob("tokens/tiny-*/partial/*") if path.suffix != ".npz"]
    assert len(finished) == 2 and half
    shards = [tmp_path.glob(f"tokens/tiny-*/tokens-train.array_record-{path.name[6:20]}") for path in finished]
    times = [path.stat().st_mtime_ns for paths in shards for path in paths]
    assert "process 1 has" in line_with(first, "waiting: of the")
    again = host(1, 2)
    for process in (first, again):
        output = process.communicate()[0]
        assert process.returncode == 0 and "tokens/document" in output, output
    assert contents(tmp_path) == by_one_process
    shards = [tmp_path.glob(f"tokens/tiny-*/tokens-train.array_record-{path.name[6:20]}") for path in finished]
    assert [path.stat().st_mtime_ns for paths in shards for path in paths] == times and len(times) == 2


def test_a_host_comes_late(host, by_one_process, tmp_path):
    first, third = host(0, 3), host(2, 3)
    for process in (first, third):
        assert "process 1 has" in line_with(process, "waiting: of the")
    assert not list(tmp_path.glob("tokens/*/store.json"))
    second = host(1, 3)
    outputs = [process.communicate()[0] for process in (first, second, third)]
    assert [process.returncode for process in (first, second, third)] == [0, 0, 0], outputs
    assert contents(tmp_path) == by_one_process
    assert len({output[output.index("tokenizer: ") :] for output in outputs}) == 1  # each prints the whole report


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real corpora are not at hand: {SHARED} is missing")
def test_real_web_text(tmp_path):
    data = Data(sources=(Source(name="c4/en"),), data_dir=str(SHARED), cache_dir=str(tmp_path))
    prepared = prepare(Config(data=data, tokenizer=Tokenizer(kind="bpe", vocab_size=4096)), say=nothing)
    train = prepared.train["c4/en"]
    assert (train.num_documents, train.num_empty, train.num_bad) == (1000, 0, 0)
    assert 3 < train.num_bytes / train.num_tokens < 4
