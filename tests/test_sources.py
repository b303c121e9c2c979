import pathlib
import pickle

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tiny_corpus import TOPICS, shards, write_corpus

from llm_jax.config import Source, UserError
from llm_jax.data.sources import open_documents

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tfds"
TINY = Source(name="tiny")
TEXTS = TOPICS[:40]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    write_corpus(folder, {"train": TEXTS, "validation": TOPICS[40:45]})
    return folder


def opened(data_dir, split, source=TINY):
    return open_documents(source, split, data_dir=str(data_dir), cache_dir="unused")


def test_documents_are_those_of_tfds_in_their_order(data_dir):
    documents = opened(data_dir, "train")
    reference = tfds.builder("tiny", data_dir=str(data_dir)).as_data_source("train")
    assert [documents[i] for i in range(len(documents))] == [example["text"] for example in reference]
    assert sorted(documents.read(range(40))) == sorted(text.encode() for text in TEXTS)
    assert documents.read([7, 3, 7]) == [documents[7], documents[3], documents[7]]


@pytest.mark.parametrize("split", ["train[25%:60%]", "train[-5:]", "train[10:20]+validation[1:3]", "train+validation"])
def test_keys_name_the_place_in_the_whole_split(data_dir, split):
    part = opened(data_dir, split)
    whole = {name: opened(data_dir, name) for name in ("train", "validation")}
    assert len(part) == len(tfds.builder("tiny", data_dir=str(data_dir)).as_data_source(split))
    for i in range(len(part)):
        name, position = part.key(i).split(":")
        assert part[i] == whole[name][int(position)]


def test_overlap_is_found_by_document(data_dir):
    train = opened(data_dir, "train[:80%]")
    assert train.overlap(opened(data_dir, "train[80%:]")) is None
    assert train.overlap(opened(data_dir, "validation")) is None
    assert train.overlap(opened(data_dir, "train[50%:]")) == "train:20"


def test_documents_can_be_sent_to_a_process(data_dir):
    documents = opened(data_dir, "train")
    documents.read([0])
    assert pickle.loads(pickle.dumps(documents)).read([5]) == documents.read([5])


def test_fingerprint_tells_documents_apart(data_dir, tmp_path):
    write_corpus(tmp_path, {"train": TEXTS, "validation": TOPICS[40:45]})
    write_corpus(tmp_path / "other", {"train": [*TEXTS[:-1], TEXTS[-1] + "!"], "validation": TOPICS[40:45]})
    same = opened(data_dir, "train").fingerprint
    assert opened(tmp_path, "train").fingerprint == same
    others = [opened(data_dir, "train[:39]"), opened(data_dir, "train[1:]"), opened(data_dir, "validation")]
    assert len({same, opened(tmp_path / "other", "train").fingerprint, *(d.fingerprint for d in others)}) == 5


def test_tfds_data_dir_of_the_environment(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(open_documents(TINY, "train", data_dir=None, cache_dir="unused")) == 40


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        (Source(name="c4/en"), "train", r"no dataset 'c4/en' in .*, where there is tiny:1.0.0; set data.data_dir"),
        (Source(name="nonsense"), "train", r"no dataset 'nonsense' in .*, where there is tiny:1.0.0"),
        (Source(name="tiny:2.0.0"), "train", r"no dataset 'tiny:2.0.0' in "),
        (TINY, "test", r"'tiny' has no split 'test'; there is train \(40 documents\), validation \(5 documents\)"),
        (TINY, "train[98", r"'tiny' has no split 'train\[98'; there is .*slices of it such as '\w+\[98%:\]'"),
        (TINY, "train[:0]", r"split 'train\[:0\]' of 'tiny' is empty"),
        (Source(name="tiny", text_key="title"), "train", r"no feature 'title'; set text_key to one of number, text"),
        (Source(name="tiny", text_key="number"), "train", r"feature 'number' of 'tiny' is .*, not text"),
    ],
)
def test_bad_sources_get_one_clear_line(data_dir, source, split, message):
    with pytest.raises(UserError, match=message) as raised:
        opened(data_dir, split, source)
    assert "\n" not in str(raised.value)


def test_no_dataset_at_all(tmp_path):
    with pytest.raises(UserError, match="no dataset 'tiny' in .*, where there is none; set data.data_dir"):
        opened(tmp_path, "train")


def test_a_format_without_random_access_is_refused(data_dir, tmp_path):
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json"):
        text = (data_dir / "tiny" / "1.0.0" / name).read_text()
        (folder / name).write_text(text.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="is in tfrecord format.*; convert it: llm-jax build convert --input="):
        opened(tmp_path, "train")


@pytest.mark.parametrize("damage", ["cut off", "missing", "not a record file"])
def test_an_unreadable_shard_is_named(tmp_path, damage):
    write_corpus(tmp_path, {"train": TEXTS})
    (shard,) = shards(tmp_path)
    whole = shard.read_bytes()
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(whole[:70_000] if damage == "cut off" else b"text " * 40_000)
    documents = opened(tmp_path, "train")
    with pytest.raises(UserError, match=f"shard {shard} cannot be read: .*; restore the file"):
        documents.read([0])


def test_a_shard_with_too_few_records_is_named(tmp_path):
    write_corpus(tmp_path, {"train": TEXTS})
    (shard,) = shards(tmp_path)
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    writer.write(b"one")
    writer.close()
    with pytest.raises(UserError, match=f"shard {shard} cannot be read: 1 records, not 40; "):
        opened(tmp_path, "train").read([0])


def test_a_damaged_record_is_named(tmp_path):
    write_corpus(tmp_path, {"train": TEXTS})
    (shard,) = shards(tmp_path)
    content = bytearray(shard.read_bytes())
    middle = content.rstrip(b"\0").find(b"\0") // 2 + 20_000
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    shard.write_bytes(content)
    documents = opened(tmp_path, "train")
    damaged = []
    for i in range(len(documents)):
        try:
            assert documents.read([i])[0].decode() in TEXTS
        except UserError as error:
            damaged.append((i, str(error)))
    assert len(damaged) == 1
    ((number, message),) = damaged
    assert message.startswith(f"record {number} of shard {shard} is damaged (") and "restore the file" in message
    with pytest.raises(UserError, match=f"record {number} of shard"):
        documents.read(range(len(documents)))


def test_a_record_that_is_no_example_is_named(tmp_path):
    write_corpus(tmp_path, {"train": TEXTS})
    (shard,) = shards(tmp_path)
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for _ in TEXTS:
        writer.write(b"\xff\xff\xff")
    writer.close()
    with pytest.raises(UserError, match=f"record 2 of shard {shard} is not a tf.train.Example"):
        opened(tmp_path, "train").read([2])


def test_text_that_is_not_utf8_is_named_or_skipped(tmp_path):
    write_corpus(tmp_path, {"train": [b"good", "größer".encode("latin-1"), "größer"]})
    documents = opened(tmp_path, "train[1:]")
    with pytest.raises(
        UserError, match="document train:1 of 'tiny' is not UTF-8: .*at byte 2; .*skip_bad_documents=true"
    ):
        documents.read_strings([1, 0], skip_bad_documents=False)
    assert documents.read_strings([0, 1], skip_bad_documents=True) == [None, "größer"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real corpora are not at hand: {SHARED} is missing")
def test_real_corpora_open_under_their_genuine_names():
    c4 = opened(SHARED, "train", Source(name="c4/en"))
    wikipedia = opened(SHARED, "train[98%:]", Source(name="wikipedia/20230601.en"))
    assert (len(c4), len(wikipedia)) == (1000, 132)
    assert wikipedia.key(0) == "train:6490"
    with pytest.raises(UserError, match="is in tfrecord format"):
        opened(SHARED, "train", Source(name="c4/en:3.0.1"))
