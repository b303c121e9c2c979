import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import sentencepiece
import tensorflow_datasets as tfds
from tiny_corpus import TOPICS, CharacterTokenizer, concatenation, write_corpus

from llm_jax.config import Source, UserError
from llm_jax.data import store_writer
from llm_jax.data.sources import Documents, open_documents
from llm_jax.data.store import TokenStore
from llm_jax.data.tokenizer import train_tokenizer

TEXTS = TOPICS[:30]
HELD_OUT = TOPICS[30:34]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    write_corpus(folder, {"train": TEXTS, "validation": HELD_OUT})
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Several shards from a tiny corpus."""
    monkeypatch.setattr(store_writer, "SMALLEST_SHARD", 12_000)


def opened(data_dir) -> list[Documents]:
    return [
        open_documents(Source(name="tiny"), split, data_dir=str(data_dir), cache_dir="unused")
        for split in ("train", "validation")
    ]


def prepare(
    data_dir, cache_dir, *, tokenizer=None, num_workers=1, skip_bad_documents=False, documents=None, say=print,
    part=store_writer.ALL, function=store_writer.prepare_store,
):  # fmt: skip
    return function(
        *(documents or opened(data_dir)),
        tokenizer or CharacterTokenizer(),
        cache_dir=str(cache_dir),
        num_workers=num_workers,
        skip_bad_documents=skip_bad_documents,
        say=say,
        part=part,
    )


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@pytest.fixture(scope="module")
def stores(data_dir, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SMALLEST_SHARD", 12_000)
        return prepare(data_dir, tmp_path_factory.mktemp("cache"))


def test_the_store_is_the_concatenation_of_the_documents(stores):
    for part, texts in zip(stores, (TEXTS, HELD_OUT), strict=True):
        reference = concatenation(texts)
        np.testing.assert_array_equal(part.tokens(0, part.num_tokens), reference)
        assert part.num_tokens == len(reference) and part.num_documents == len(texts)
        np.testing.assert_array_equal(part.ends, np.cumsum([len(text) + 2 for text in texts]))
        np.testing.assert_array_equal(part.bytes, [len(text.encode()) for text in texts])
        np.testing.assert_array_equal(part.words, [len(re.findall(r"\S+", text)) for text in texts])
        assert part.num_bytes == sum(len(text.encode()) for text in texts)
        assert part.num_words == sum(len(text.split()) for text in texts)
        assert (part.num_empty, part.num_bad) == (0, 0)
        assert part.bytes.dtype == part.words.dtype == np.uint32 and part.ends.dtype == np.int64
        for i, text in enumerate(texts):
            np.testing.assert_array_equal(part.document_tokens(i), concatenation([text]))
    assert [part.key(3) for part in stores] == ["train:3", "validation:3"]


def test_ranges_of_tokens(stores):
    part, reference = stores[0], concatenation(TEXTS)
    generator = np.random.default_rng(0)
    for first, last in np.sort(generator.integers(0, len(reference) + 1, (100, 2))):
        np.testing.assert_array_equal(part.tokens(first, last), reference[first:last])
    assert part.tokens(0, 0).dtype == part.tokens(0, 9).dtype == np.int32
    with pytest.raises(IndexError):
        part.tokens(0, len(reference) + 1)


def test_spans_name_the_document_of_each_token(stores):
    part = stores[0]
    lengths = [len(text) + 2 for text in TEXTS]
    documents = np.repeat(np.arange(len(TEXTS)), lengths)
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    first_R = np.array([0, 5, part.ends[3] - 7, part.num_tokens - 20, part.num_tokens + 3])
    spans = part.spans(first_R, 50, pad=7)
    for row, first in enumerate(first_R):
        rest = max(0, part.num_tokens - first)
        np.testing.assert_array_equal(spans.documents_RU[row, :rest], documents[first : first + 50])
        np.testing.assert_array_equal(spans.starts_RU[row, :rest], starts[first : first + 50])
        assert (spans.documents_RU[row, rest:] == len(TEXTS)).all() and (spans.tokens_RU[row, rest:] == 7).all()


def test_it_is_a_tfds_dataset(stores):
    builder = tfds.builder_from_directory(stores[0].folder)
    examples = list(builder.as_data_source("held_out"))
    assert [example["key"] for example in examples] == [f"validation:{i}".encode() for i in range(len(HELD_OUT))]
    ids = np.concatenate([np.frombuffer(example["tokens"], "<u4") for example in examples])
    np.testing.assert_array_equal(ids, concatenation(HELD_OUT))
    assert builder.info.splits["train"].num_examples == len(TEXTS) and builder.info.splits["train"].num_shards > 3


def test_ids_are_those_of_sentencepiece_and_take_two_bytes(data_dir, tmp_path):
    tokenizer = train_tokenizer(iter(TOPICS), kind="bpe", vocab_size=800)
    part, _ = prepare(data_dir, tmp_path, tokenizer=tokenizer)
    assert part.dtype == np.uint16 and part.tokenizer_sha256 == tokenizer.sha256
    for i in (0, 7):
        ids = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).encode(TEXTS[i])
        assert part.document_tokens(i).tolist() == [1, *ids, 2]


def test_a_store_can_be_sent_to_a_process(stores):
    assert stores[0].ends[0] and len(stores[0].tokens(0, 5)) == 5
    again = pickle.loads(pickle.dumps(stores[0]))
    np.testing.assert_array_equal(again.tokens(10, 99), stores[0].tokens(10, 99))


def test_the_number_of_workers_changes_no_byte(data_dir, stores, tmp_path):
    prepare(data_dir, tmp_path, num_workers=2)
    (folder,) = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert contents(folder) == contents(stores[0].folder)


@pytest.mark.parametrize("count", [2, 3, 100])
def test_the_number_of_hosts_changes_no_byte(data_dir, stores, tmp_path, count):
    written = []
    for number in reversed(range(count)):  # 100: most hosts have nothing to do
        part = store_writer.Part(number, count)
        prepare(data_dir, tmp_path, part=part, function=store_writer.write_part)
        written.append({path.name for path in (tmp_path / "tokens").glob("*/tokens-*")})
    everything = {path.name for path in pathlib.Path(stores[0].folder).glob("tokens-*")}
    assert written[-1] == everything and len(written[0]) == (0 if count == 100 else len(everything) // count)
    lines = []
    prepare(data_dir, tmp_path, part=store_writer.Part(0, count), say=lines.append)
    (folder,) = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert contents(folder) == contents(stores[0].folder)
    assert lines == []  # nobody was waited for


HOLDS = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX, 1, 1); print(); input()"


@pytest.mark.parametrize("part", [store_writer.ALL, store_writer.Part(1, 2)])
def test_who_writes_the_same_is_waited_for_aloud(data_dir, stores, tmp_path, part):
    name = pathlib.Path(stores[0].folder).name
    lock = tmp_path / "tokens" / f"{name}.lock"
    lock.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin and other.stdout and other.stdout.readline() == "\n"  # it holds the lock of part 1
        lines = []

        def say(line: str) -> None:
            lines.append(line)
            other.communicate("\n")

        prepare(data_dir, tmp_path, part=store_writer.Part(0, 2), say=say, function=store_writer.write_part)
        assert lines == []
        prepare(data_dir, tmp_path, part=part, say=say, function=store_writer.write_part)
    assert lines == [f"waiting: another process is writing {lock.with_suffix('')}; if its host is gone, "
                     f"delete {lock} and start again"]  # fmt: skip


def test_a_complete_store_is_only_opened(data_dir, stores):
    class Fails(CharacterTokenizer):
        def encode(self, texts):
            raise AssertionError("tokenized again")

    cache_dir = pathlib.Path(stores[0].folder).parents[1]
    before = contents(stores[0].folder)
    again = prepare(data_dir, cache_dir, tokenizer=Fails())
    assert [part.fingerprint for part in again] == [part.fingerprint for part in stores]
    assert contents(stores[0].folder) == before


def test_the_fingerprint_depends_on_documents_split_and_tokenizer(data_dir, stores, tmp_path):
    class Other(CharacterTokenizer):
        sha256 = "other"

    documents = opened(data_dir)
    fewer = open_documents(Source(name="tiny"), "train[:29]", data_dir=str(data_dir), cache_dir="unused")
    parts = [
        *stores,
        *prepare(data_dir, tmp_path, tokenizer=Other()),
        *prepare(data_dir, tmp_path, documents=[fewer, documents[1]]),
    ]
    assert len({part.fingerprint for part in parts}) == 6
    with pytest.raises(UserError, match="was written with tokenizer characters, not other; use that tokenizer"):
        store_writer.require_tokenizer(stores[0], Other())


def test_empty_documents_are_left_out_and_counted(tmp_path):
    write_corpus(tmp_path, {"train": ["", "one", " \n", "two", ""], "validation": ["three"]})
    part, _ = prepare(tmp_path, tmp_path)
    assert (part.num_documents, part.num_empty) == (2, 3)
    assert [part.key(i) for i in range(2)] == ["train:1", "train:3"]
    np.testing.assert_array_equal(part.tokens(0, part.num_tokens), concatenation(["one", "two"]))


def test_a_split_of_empty_documents_is_refused(tmp_path):
    write_corpus(tmp_path, {"train": ["one"], "validation": ["", " "]})
    with pytest.raises(UserError, match="split 'validation' of 'tiny' has only empty or bad documents"):
        prepare(tmp_path, tmp_path)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_documents_that_are_not_utf8(tmp_path, num_workers):
    write_corpus(tmp_path, {"train": [*TEXTS[:9], b"\xff\xfe", "last"], "validation": HELD_OUT})
    with pytest.raises(UserError, match="document train:9 of 'tiny' is not UTF-8"):
        prepare(tmp_path, tmp_path, num_workers=num_workers)
    part, _ = prepare(tmp_path, tmp_path, num_workers=num_workers, skip_bad_documents=True)
    assert (part.num_documents, part.num_bad, part.key(9)) == (10, 1, "train:10")


KILLED = """
    import os, signal, sys
    import test_store
    from llm_jax.data import store_writer

    store_writer.SMALLEST_SHARD = 12_000
    data_dir, cache_dir = sys.argv[1:]

    class Killed(store_writer.Documents):
        def read_strings(self, indices, skip_bad_documents):
            if 17 in indices:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read_strings(indices, skip_bad_documents)

    documents = test_store.opened(data_dir)
    documents[0].__class__ = Killed
    test_store.prepare(data_dir, cache_dir, documents=documents)
"""


def test_a_killed_prepare_goes_on_and_gives_the_same_store(data_dir, stores, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(data_dir), str(tmp_path)]
    paths = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]
    process = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    assert process.returncode == -signal.SIGKILL
    (folder,) = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    finished = sorted(folder.glob("tokens-*"))
    assert finished and not (folder / "store.json").exists()
    times = [path.stat().st_mtime_ns for path in finished]
    prepare(data_dir, tmp_path)
    assert contents(folder) == contents(stores[0].folder)
    assert [path.stat().st_mtime_ns for path in finished] == times  # what was finished was kept


class KillsItsProcess(Documents):
    def read_strings(self, indices, skip_bad_documents):
        if 17 in indices and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read_strings(indices, skip_bad_documents)


class Fails(Documents):
    def read_strings(self, indices, skip_bad_documents):
        raise ZeroDivisionError("a mistake of ours")


def test_a_killed_worker_is_one_clear_line(data_dir, stores, tmp_path):
    documents = opened(data_dir)
    documents[0].__class__ = KillsItsProcess
    with pytest.raises(UserError, match="a tokenizing process was killed by signal 9.*lower data.num_workers"):
        prepare(data_dir, tmp_path, num_workers=2, documents=documents)
    prepare(data_dir, tmp_path)
    (folder,) = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert contents(folder) == contents(stores[0].folder)


def test_a_mistake_in_a_worker_is_not_the_users(data_dir, tmp_path, capfd):
    documents = opened(data_dir)
    documents[0].__class__ = Fails
    with pytest.raises(RuntimeError, match="its traceback is above"):
        prepare(data_dir, tmp_path, num_workers=2, documents=documents)
    assert "ZeroDivisionError: a mistake of ours" in capfd.readouterr().err


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half(data_dir, stores, tmp_path, monkeypatch):
    writer = store_writer.ArrayRecordWriter
    monkeypatch.setattr(
        store_writer,
        "ArrayRecordWriter",
        lambda path, options: writer("/dev/full" if "-00003." in path else path, options),
    )
    with pytest.raises(
        UserError, match="cannot write to .*tokens/tiny.*: .*No space left.*; make room or set data.cache_dir"
    ):
        prepare(data_dir, tmp_path)
    (folder,) = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert not (folder / "store.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(store_writer, "SMALLEST_SHARD", 12_000)
    prepare(data_dir, tmp_path)
    assert contents(folder) == contents(stores[0].folder)


def test_a_place_that_cannot_be_written(data_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write to .*file.*: Not a directory; make room or set data.cache_dir"):
        prepare(data_dir, tmp_path / "file")


def test_a_damaged_shard_is_named(data_dir, tmp_path):
    part, _ = prepare(data_dir, tmp_path)
    shard = sorted(pathlib.Path(part.folder).glob("tokens-train*"))[0]
    shard.write_bytes(shard.read_bytes()[:66_000])
    with pytest.raises(
        UserError, match=f"shard {shard} cannot be read: cut off.*; delete {part.folder} and prepare it again"
    ):
        TokenStore(part.folder, "train").tokens(0, 10)


def test_progress_is_said_in_lines_without_a_terminal(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "SECONDS_BETWEEN_LINES", -1)
    lines = []
    prepare(data_dir, tmp_path, say=lines.append)
    assert lines[-1] == "tokenizing tiny: 34 of 34 documents" and len(lines) > 3


def test_workers_import_neither_jax_nor_tensorflow():
    code = "import sys, llm_jax.data.store; print(sorted({'jax', 'tensorflow', 'grain', 'flax'} & set(sys.modules)))"
    root = pathlib.Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"
