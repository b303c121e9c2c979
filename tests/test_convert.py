"""TFRecord to ArrayRecord: on a dataset that TensorFlow wrote, and on files framed here by hand."""

import io
import json
import os
import pathlib
import struct

import fsspec
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from llm_jax import config
from llm_jax.config import UserError
from llm_jax.corpus import convert
from llm_jax.data.sources import open_documents

C4 = pathlib.Path(__file__).parents[2] / "shared/data/tfds/c4/en"
needs_c4 = pytest.mark.skipif(not (C4 / "3.0.1").exists(), reason="needs shared/data/tfds/c4/en, which is not here")
SPLITS = {"train": [[b"one", b"", bytes(range(256)) * 300], [], [b"two"]], "test": [[b"three", b"four"]]}


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition: reflected polynomial 0x82F63B78."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0x82F63B78 if checksum & 1 else 0)
    return checksum ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    checksum = crc32c(data)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) % 2**32)


def framed(records: list[bytes]) -> bytes:
    file = io.BytesIO()
    for record in records:
        length = struct.pack("<Q", len(record))
        file.write(length + masked(length) + record + masked(record))
    return file.getvalue()


def unframed(path: pathlib.Path) -> list[bytes]:
    data, records = path.read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        records.append(data[12 : 12 + length])
        data = data[16 + length :]
    return records


def example(text: bytes) -> bytes:
    example = tf_example_pb2.Example()
    example.features.feature["text"].bytes_list.value.append(text)
    return example.SerializeToString()


def write_dataset(folder: pathlib.Path, **changes) -> pathlib.Path:
    """A TFRecord dataset by hand: `by_hand/en:1.0.0` with the texts of SPLITS."""
    folder = folder / "by_hand" / "en" / "1.0.0"
    folder.mkdir(parents=True)
    tfds.features.FeaturesDict({"text": tfds.features.Text()}).save_config(folder)
    (folder / "LICENSE").write_text("CC0")
    for split, shards in SPLITS.items():
        for number, texts in enumerate(shards):
            name = f"by_hand-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
            (folder / name).write_bytes(framed([example(text) for text in texts]))
    info = {
        "name": "by_hand",
        "configName": "en",
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "description": "Written by hand.",
        "splits": [
            {"name": split, "numBytes": "1", "shardLengths": [str(len(texts)) for texts in shards]}
            for split, shards in SPLITS.items()
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info | changes))
    return folder


def records(path: pathlib.Path) -> list[bytes]:
    reader = ArrayRecordReader(str(path))
    return reader.read_all() if reader.num_records() else []


def texts(data_dir, split: str) -> list[bytes]:
    source = tfds.data_source("by_hand/en:1.0.0", split=split, data_dir=data_dir, download=False)
    return [source[i]["text"] for i in range(len(source))]


def test_checksum():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C (iSCSI)
    for data in (b"", b"123456789", bytes(range(256))):
        assert struct.pack("<I", convert.masked_crc32c(data)) == masked(data)


@needs_c4
def test_c4_as_tensorflow_wrote_it(tmp_path):
    folder = convert.convert(str(C4 / "3.0.1"), str(tmp_path))
    assert folder == str(tmp_path / "c4/en/3.0.1")
    for split, length in {"train": 1000, "validation": 200}.items():
        for path in sorted((C4 / "3.0.1").glob(f"c4-{split}.tfrecord*")):
            assert records(pathlib.Path(folder) / path.name.replace("tfrecord", "array_record")) == unframed(path)
        # the same documents in another order, as another program wrote them
        ours, theirs = (
            tfds.data_source(f"c4/en:{version}", split=split, data_dir=data_dir, download=False)
            for version, data_dir in {"3.0.1": tmp_path, "3.1.0": C4.parents[1]}.items()
        )
        ours, theirs = (sorted(sorted(source[i].items()) for i in range(length)) for source in (ours, theirs))
        assert ours == theirs and len(ours) == length
    documents = open_documents(config.Source(name="c4/en:3.0.1"), "train", data_dir=str(tmp_path), cache_dir="unused")
    assert len(documents) == 1000 and documents[17]


def test_files_and_order_are_kept(tmp_path):
    source = write_dataset(tmp_path / "old")
    folder = pathlib.Path(convert.convert(str(source) + "/", str(tmp_path / "new"), say=lambda line: None))
    for split, shards in SPLITS.items():
        for number, shard in enumerate(shards):
            path = folder / f"by_hand-{split}.array_record-{number:05d}-of-{len(shards):05d}"
            assert records(path) == [example(text) for text in shard]
        assert texts(tmp_path / "new", split) == [text for shard in shards for text in shard]
    old, new = (json.loads((parent / "dataset_info.json").read_text()) for parent in (source, folder))
    assert new == old | {"fileFormat": "array_record"}
    for name in ("features.json", "LICENSE"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert len(list(folder.iterdir())) == 4 + 3


@pytest.mark.parametrize("say_where", [False, True])
def test_beside_the_old_files(tmp_path, say_where):
    source = write_dataset(tmp_path)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    data_dir = str(tmp_path) if say_where else None
    for _ in range(2):
        assert convert.convert(str(source), data_dir) == str(source)
        info = json.loads((source / "dataset_info.json").read_text())
        assert info == json.loads(before["dataset_info.json"]) | {"alternativeFileFormats": ["array_record"]}
    for name in before.keys() - {"dataset_info.json"}:
        assert (source / name).read_bytes() == before[name]
    documents = open_documents(
        config.Source(name="by_hand/en:1.0.0"), "train", data_dir=str(tmp_path), cache_dir="unused"
    )
    assert documents.read(range(len(documents))) == [text for shard in SPLITS["train"] for text in shard]
    assert texts(tmp_path, "test") == SPLITS["test"][0]


def test_finished_files_are_not_redone(tmp_path):
    source = write_dataset(tmp_path / "old")

    def stop_after_two(function, shards):
        for _, shard in zip(range(2), shards, strict=False):
            yield function(shard)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(str(source), str(tmp_path / "new"), run=stop_after_two)
    folder = tmp_path / "new/by_hand/en/1.0.0"
    kept = {path.name: path.stat() for path in folder.iterdir()}
    assert len(kept) == 2 and not (folder / "dataset_info.json").exists()
    done = []

    def note(function, shards):
        for shard in shards:
            done.append(os.path.basename(shard.target))
            yield function(shard)

    convert.convert(str(source), str(tmp_path / "new"), run=note)
    assert len(done) == 2 and not kept.keys() & set(done)
    assert {name: (folder / name).stat() for name in kept} == kept
    assert texts(tmp_path / "new", "train") == [text for shard in SPLITS["train"] for text in shard]


RECORDS = [b"first", b"second record", b"third"]
STARTS = [0, 21, 50, 71]  # of the records and of the end: 16 bytes of framing each


@pytest.mark.parametrize("position", range(71))
def test_each_damaged_byte_is_found(tmp_path, position):
    data = bytearray(framed(RECORDS))
    assert len(data) == 71
    data[position] ^= 0x10
    path = tmp_path / "x.tfrecord"
    path.write_bytes(data)
    number = max(n for n in range(3) if STARTS[n] <= position)
    found = []
    with pytest.raises(UserError, match=f"x.tfrecord: the record at byte {STARTS[number]} is damaged"):
        found.extend(convert.read_tfrecords(str(path)))


@pytest.mark.parametrize("length", range(72))
def test_each_cut_is_found(tmp_path, length):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(framed(RECORDS)[:length])
    found = []
    if length in STARTS:  # cut between records: what is missing shows by their count
        found.extend(convert.read_tfrecords(str(path)))
        assert found == RECORDS[: STARTS.index(length)]
        return
    start = max(start for start in STARTS if start <= length)
    with pytest.raises(UserError, match=f"record at byte {start} is damaged .cut off"):
        for record in convert.read_tfrecords(str(path)):
            found.append(record)
    assert found == RECORDS[: STARTS.index(start)]


@pytest.mark.parametrize("problem", ["damaged", "too few", "missing"])
def test_a_bad_file_stops_it_before_the_metadata(tmp_path, problem):
    source = write_dataset(tmp_path / "old")
    path = source / "by_hand-train.tfrecord-00002-of-00003"
    if problem == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif problem == "too few":
        path.write_bytes(b"")
    else:
        path.unlink()
    message = {"damaged": "at byte 0", "too few": "holds 0 records, dataset_info.json says 1", "missing": "is missing"}
    with pytest.raises(UserError, match=f"{path.name}: .*{message[problem]}"):
        convert.convert(str(source), str(tmp_path / "new"))
    folder = tmp_path / "new/by_hand/en/1.0.0"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"by_hand-train.array_record-0000{number}-of-00003" for number in range(2)
    ]


def test_from_a_url(tmp_path):
    source = write_dataset(tmp_path / "old")
    memory = fsspec.filesystem("memory")
    for path in source.iterdir():
        memory.pipe_file(f"/bucket/by_hand/en/1.0.0/{path.name}", path.read_bytes())
    url = "memory://bucket/by_hand/en/1.0.0"
    with pytest.raises(UserError, match="--data_dir"):
        convert.convert(url, None)
    convert.convert(url, str(tmp_path / "new"))
    assert texts(tmp_path / "new", "train") == [text for shard in SPLITS["train"] for text in shard]


def test_what_cannot_be_converted(tmp_path):
    with pytest.raises(UserError, match="no dataset_info.json there"):
        convert.convert(str(tmp_path), None)
    (tmp_path / "dataset_info.json").write_text('{"name": ')
    with pytest.raises(UserError, match="dataset_info.json cannot be read"):
        convert.convert(str(tmp_path), None)
    riegeli = write_dataset(tmp_path / "riegeli", fileFormat="riegeli")
    with pytest.raises(UserError, match="in riegeli, only tfrecord"):
        convert.convert(str(riegeli), None)
    template = write_dataset(
        tmp_path / "template",
        splits=[{"name": "train", "filepathTemplate": "{SPLIT}-{SHARD_INDEX}", "shardLengths": ["1"]}],
    )
    with pytest.raises(UserError, match="do not say the format"):
        convert.convert(str(template), None)


def test_another_dataset_is_not_overwritten(tmp_path):
    convert.convert(str(write_dataset(tmp_path / "old")), str(tmp_path / "new"))
    folder = tmp_path / "new/by_hand/en/1.0.0"
    (folder / "by_hand-test.array_record-00000-of-00001").unlink()
    with pytest.raises(UserError, match="holds a dataset already"):
        convert.convert(str(tmp_path / "old/by_hand/en/1.0.0"), str(tmp_path / "new"))
