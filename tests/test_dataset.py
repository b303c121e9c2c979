"""Datasets of documents, read back by tfds itself and by the trainer's own reader."""

import hashlib
import multiprocessing
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tiny_corpus import TOPICS

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.corpus import dataset
from llm_jax.corpus.document import Document
from llm_jax.data.sources import open_documents

NAME, VERSION = "my_wiki/20261101.en", "1.2.0"
EXTRA = {"revision": "number of the revision"}
DOCUMENTS = [
    Document(
        key=f"wikipedia:en:{i}",
        text=text,
        url=f"https://en.wikipedia.org/?curid={i}",
        title=f"Título {i} – 題",
        timestamp="2026-11-01T00:00:00Z",
        language="en",
        origin=f"dump.xml.bz2:page {i}",
        extra={"revision": str(1000 + i), "not kept": "x"},
    )
    for i, text in enumerate(TOPICS[:50])
]
SPLITS = {"train": [DOCUMENTS[:20], [], DOCUMENTS[20:40]], "validation": [DOCUMENTS[40:]]}


def tasks(folder: str) -> list[tuple]:
    return [
        (documents, dataset.shard_path(folder, NAME, split, number, len(shards)), tuple(EXTRA))
        for split, shards in SPLITS.items()
        for number, documents in enumerate(shards)
    ]


def write(task: tuple) -> dataset.Shard:
    return dataset.write_shard(*task)


def finish(folder: str, shards: list[dataset.Shard]) -> None:
    dataset.finish(
        folder,
        NAME,
        VERSION,
        {"train": shards[:3], "validation": shards[3:]},
        description="Encyclopedia.",
        citation="@misc{wiki}",
        homepage="https://dumps.wikimedia.org",
        licence="CC BY-SA 4.0",
        extra=EXTRA,
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    data_dir = tmp_path_factory.mktemp("data")
    folder = dataset.dataset_folder(str(data_dir), NAME, VERSION)
    finish(folder, [write(task) for task in tasks(folder)])
    return data_dir


def expected(document: Document) -> dict[str, bytes]:
    fields = {
        "id": document.key,
        "text": document.text,
        "url": document.url,
        "title": document.title,
        "timestamp": document.timestamp,
        "language": document.language,
        "origin": document.origin,
        "revision": document.extra["revision"],
    }
    return {name: value.encode() for name, value in fields.items()}


@pytest.mark.parametrize("name", [NAME, f"{NAME}:{VERSION}"])
def test_tfds_reads_it_by_name(data_dir, name):
    splits = {"train": DOCUMENTS[:40], "train[10:12]": DOCUMENTS[10:12], "validation": DOCUMENTS[40:]}
    for split, documents in splits.items():
        source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
        assert [source[i] for i in range(len(source))] == [expected(document) for document in documents]


def test_metadata_are_exact(data_dir):
    info = tfds.builder(NAME, data_dir=data_dir).info
    assert (info.full_name, info.file_format.value) == (f"{NAME}/{VERSION}", "array_record")
    assert (info.description, info.citation, info.homepage) == (
        "Encyclopedia.",
        "@misc{wiki}",
        "https://dumps.wikimedia.org",
    )
    assert info.redistribution_info.license == (data_dir / NAME / VERSION / "LICENSE").read_text() == "CC BY-SA 4.0"
    assert all(type(feature) is tfds.features.Text for feature in info.features.values())
    assert list(info.splits) == ["train", "validation"]
    assert info.splits["train"].shard_lengths == [20, 0, 20] and info.splits["validation"].shard_lengths == [10]
    for split in info.splits.values():
        records = [record for path in split.filepaths if (reader := ArrayRecordReader(str(path))).num_records()
                   for record in reader.read_all()]  # fmt: skip
        assert split.num_examples == len(records) and split.num_bytes == sum(map(len, records))


def test_the_trainer_reads_it_by_name(data_dir):
    source = config.Source(name=NAME)
    documents = open_documents(source, "train[5:]", data_dir=str(data_dir), cache_dir="unused")
    assert documents.read_strings(range(len(documents)), False) == [document.text for document in DOCUMENTS[5:40]]


def test_records_are_those_that_tfds_would_write(data_dir):
    """Serialized by tfds's own code for the same features."""
    info = tfds.builder(NAME, data_dir=data_dir).info
    serializer = tfds.core.example_serializer.ExampleSerializer(info.features.get_serialized_info())
    for document in DOCUMENTS[:5]:
        theirs = serializer.serialize_example(info.features.encode_example(expected(document)))
        example = dataset.tf_example_pb2.Example.FromString
        assert example(dataset.serialize(document, tuple(EXTRA))) == example(theirs)


def digests(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_bytes_do_not_depend_on_the_number_of_processes(data_dir, tmp_path):
    folder = dataset.dataset_folder(str(tmp_path), NAME, VERSION)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        shards = list(pool.map(write, reversed(tasks(folder))))[::-1]
    finish(folder, shards)
    assert digests(pathlib.Path(folder)) == digests(data_dir / NAME / VERSION)
    finish(folder, shards)  # killed just after it had finished, and run again
    assert digests(pathlib.Path(folder)) == digests(data_dir / NAME / VERSION)


def assert_no_dataset(data_dir) -> None:
    with pytest.raises((UserError, OSError), match="no dataset|dataset_info.json"):
        open_documents(config.Source(name=NAME), "train", data_dir=str(data_dir), cache_dir="unused")
    with pytest.raises((tfds.core.DatasetNotFoundError, OSError), match="my_wiki"):
        tfds.data_source(NAME, split="train", data_dir=data_dir, download=False)


@pytest.mark.parametrize("last", ["", "features.json", "LICENSE", "dataset_info.json"])
def test_half_a_dataset_is_none(tmp_path, monkeypatch, last):
    """Stopped before the metadata, or before any of their files gets its name."""
    folder = dataset.dataset_folder(str(tmp_path), NAME, VERSION)
    shards = [write(task) for task in tasks(folder)]
    assert_no_dataset(tmp_path)
    if last:
        replace = os.replace

        def stop(old, new):
            if os.path.basename(new) == last:
                raise KeyboardInterrupt
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                finish(folder, shards)
        assert not dataset.is_finished(folder)
        assert_no_dataset(tmp_path)
    finish(folder, shards)
    assert len(tfds.data_source(NAME, split="train", data_dir=tmp_path, download=False)) == 40
    assert not [file for file in os.listdir(folder) if "partial" in file]


def test_a_killed_writer_leaves_no_shard(tmp_path):
    folder = dataset.dataset_folder(str(tmp_path), NAME, VERSION)
    path = dataset.shard_path(folder, NAME, "train", 0, 3)
    program = (
        "import os, signal\n"
        "from llm_jax.corpus import dataset\n"
        "def records():\n"
        "    for i in range(1000): yield os.urandom(10000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"dataset.write_records(records(), {path!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=pathlib.Path(__file__).parents[1])
    assert done.returncode == -9
    assert not os.path.exists(path) and len(os.listdir(folder)) == 1  # what it had begun
    finish(folder, [write(task) for task in tasks(folder)])
    assert not [file for file in os.listdir(folder) if "partial" in file]


def test_a_failing_reader_leaves_nothing(tmp_path):
    folder = dataset.dataset_folder(str(tmp_path), NAME, VERSION)

    def documents():
        yield DOCUMENTS[0]
        raise MemoryError

    with pytest.raises(MemoryError):
        dataset.write_shard(documents(), dataset.shard_path(folder, NAME, "train", 0, 1))
    assert os.listdir(folder) == []


@pytest.mark.parametrize("damage", ["missing", "cut off", "another"])
def test_finish_looks_at_the_shards(tmp_path, damage):
    folder = dataset.dataset_folder(str(tmp_path), NAME, VERSION)
    shards = [write(task) for task in tasks(folder)]
    path = pathlib.Path(dataset.shard_path(folder, NAME, "train", 2, 3))
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        dataset.write_shard(DOCUMENTS[:3], str(path))
    with pytest.raises(UserError, match=path.name):
        finish(folder, shards)
    assert_no_dataset(tmp_path)


def test_a_finished_dataset_is_not_written_to(data_dir):
    folder = data_dir / NAME / VERSION
    before = digests(folder)
    with pytest.raises(UserError, match="finished dataset"):
        write(tasks(str(folder))[0])
    assert digests(folder) == before


def test_a_full_disk(tmp_path):
    """/dev/full answers every write with ENOSPC; the temporary file is made a link to it."""
    folder = dataset.dataset_folder(str(tmp_path), NAME, VERSION)
    path = dataset.shard_path(folder, NAME, "train", 0, 1)
    os.symlink("/dev/full", f"{path}.{'0' * 32}.partial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset.uuid, "uuid4", lambda: dataset.uuid.UUID(int=0))
        with pytest.raises(UserError, match="No space left"):
            dataset.write_shard(DOCUMENTS, path)
    assert os.listdir(folder) == []


def test_an_empty_split_is_left_out_and_an_empty_dataset_is_an_error(tmp_path):
    folder = dataset.dataset_folder(str(tmp_path), "empty", "1.0.0")
    empty = dataset.write_shard([], dataset.shard_path(folder, "empty", "test", 0, 1))
    assert empty == (0, 0)
    with pytest.raises(UserError, match="no document is left"):
        dataset.finish(folder, "empty", "1.0.0", {"test": [empty]}, description="")
    full = dataset.write_shard(DOCUMENTS[:1], dataset.shard_path(folder, "empty", "train", 0, 1))
    dataset.finish(folder, "empty", "1.0.0", {"train": [full], "test": [empty]}, description="")
    assert list(tfds.builder("empty", data_dir=tmp_path).info.splits) == ["train"]


@pytest.mark.parametrize("name", ["c4", "c4/mine", "wikipedia/20261101.en"])
def test_names_of_tfds_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="of its own"):
        dataset.dataset_folder(str(tmp_path), name, "1.0.0")


@pytest.mark.parametrize("name", ["", "My", "a b", "a/b/c", "../a", "a/../../b", "a:b", "ä", "a/"])
def test_names_that_tfds_cannot_read_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="name="):
        dataset.dataset_folder(str(tmp_path), name, "1.0.0")
    assert os.listdir(tmp_path) == []


def test_versions_are_three_numbers(tmp_path):
    with pytest.raises(UserError, match="version=1.0"):
        dataset.dataset_folder(str(tmp_path), "a", "1.0")
