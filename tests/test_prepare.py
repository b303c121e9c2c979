import json
import os
import pathlib

import pytest
from tiny_corpus import TOPICS, write_corpus

from llm_jax.config import Config, Data, Source, Tokenizer, UserError
from llm_jax.data import store_writer
from llm_jax.data.tokenizer import train_tokenizer
from llm_jax.jobs import prepare as job
from llm_jax.jobs.prepare import cache_dir, prepare, run

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


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real corpora are not at hand: {SHARED} is missing")
def test_real_web_text(tmp_path):
    data = Data(sources=(Source(name="c4/en"),), data_dir=str(SHARED), cache_dir=str(tmp_path))
    prepared = prepare(Config(data=data, tokenizer=Tokenizer(kind="bpe", vocab_size=4096)), say=nothing)
    train = prepared.train["c4/en"]
    assert (train.num_documents, train.num_empty, train.num_bad) == (1000, 0, 0)
    assert 3 < train.num_bytes / train.num_tokens < 4
