"""A prepared tfds dataset from TFRecord to ArrayRecord, record for record, without TensorFlow.

tfds's default format cannot be read by position, so `tfds.data_source` and the trainer refuse it. The serialized
examples are the same in both formats and are copied untouched, one file for one file, so that a slice such as
train[:98%] selects the same documents before and after. Both checksums of every record are checked on the way.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import fsspec
import google_crc32c
import tensorflow_datasets as tfds
from fsspec.implementations.local import LocalFileSystem
from google.protobuf import json_format
from tensorflow_datasets.core.proto import dataset_info_pb2

from llm_jax.config import UserError
from llm_jax.corpus import dataset

ALIKE = {"tfrecord", ""}  # fileFormat in dataset_info.json; older versions of tfds left it out


class Shard(NamedTuple):
    """One file to convert."""

    source: str
    target: str
    count: int  # records it must hold


def convert(
    source: str,
    data_dir: str | None,
    *,
    run: Callable[[Callable[[Shard], int], Iterable[Shard]], Iterable[int]] = map,
    say: Callable[[str], None] = print,
) -> str:
    """Converts the dataset in `source` and returns the folder it is in now.

    A file that a stopped or killed run has finished is not converted again. The metadata come last, so that half a
    dataset is never taken as whole.

    Args:
      source: the folder of one version, such as ~/tensorflow_datasets/c4/en/3.0.1, or its gs:// or s3:// URL
      data_dir: the new dataset goes below it under its own name, config and version; None, or the one that `source` is
        in: the new files go beside the old ones, which stay
      run: applies a function to each of the shards in any order; `map`, or the same over processes
      say: gets a line on each finished file

    Raises:
      UserError: there is no dataset, it is not in TFRecord, a file is damaged or missing, the disk is full
    """
    files, root = fsspec.core.url_to_fs(source.rstrip("/"))
    if not files.exists(f"{root}/dataset_info.json"):
        raise UserError(
            f"input={source}: no dataset_info.json there; give the folder of one version, such as "
            "~/tensorflow_datasets/c4/en/3.0.1"
        )
    text = files.cat_file(f"{root}/dataset_info.json").decode()
    try:
        info = json_format.Parse(text, dataset_info_pb2.DatasetInfo())
    except json_format.ParseError as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"input={source}: its dataset_info.json cannot be read ({problem}); fetch it again") from error
    if info.file_format not in ALIKE:
        raise UserError(f"input={source}: the dataset is in {info.file_format}, only tfrecord can be converted")
    local = isinstance(files, LocalFileSystem)
    if data_dir is None and not local:
        raise UserError(f"input={source}: is not on this machine; say with --data_dir where the new dataset goes")
    folder = root if data_dir is None else os.path.join(data_dir, info.name, info.config_name, info.version)
    in_place = local and os.path.realpath(folder) == os.path.realpath(root)
    os.makedirs(folder, exist_ok=True)
    shards = plan(info, source.rstrip("/"), folder)
    todo = [shard for shard in shards if dataset.num_records(shard.target) != shard.count]
    if todo and not in_place and dataset.is_finished(folder):
        raise UserError(f"{folder}: holds a dataset already, another or a damaged one; remove it, or set --data_dir")
    done = len(shards) - len(todo)
    if done:
        say(f"{done} of {len(shards)} files are there already")
    for count in run(convert_shard, todo):
        done += 1
        say(f"{done} of {len(shards)} files, the last with {count:,} records")
    metadata = json.loads(text)
    if in_place:
        metadata["alternativeFileFormats"] = sorted({"array_record", *metadata.get("alternativeFileFormats", ())})
    else:
        metadata["fileFormat"] = "array_record"
        old = {os.path.basename(shard.source) for shard in shards} | {"dataset_info.json"}
        for entry in files.ls(root, detail=True):  # features.json, LICENSE, vocabularies, ...
            name = os.path.basename(entry["name"])
            if entry["type"] == "file" and name not in old:
                _write(os.path.join(folder, name), files.cat_file(entry["name"]))
    _write(os.path.join(folder, "dataset_info.json"), json.dumps(metadata, indent=2).encode())
    return folder


def plan(info: dataset_info_pb2.DatasetInfo, source: str, folder: str) -> list[Shard]:
    """The files of all splits in order."""
    shards = []
    for split in info.splits:
        old, new = (
            tfds.core.SplitInfo.from_proto(
                split,
                tfds.core.ShardedFileTemplate(
                    data_dir=tfds.core.Path(folder), dataset_name=info.name, filetype_suffix=suffix
                ),
            ).filenames
            for suffix in ("tfrecord", "array_record")
        )
        if old == new:
            raise UserError(
                f"input={source}: the names of its files ({old[0]}) do not say the format, so tfds cannot tell two "
                "formats apart; write it anew with tfds"
            )
        for old_name, new_name, count in zip(old, new, split.shard_lengths, strict=True):
            shards.append(Shard(f"{source}/{old_name}", os.path.join(folder, new_name), count))
    return shards


def convert_shard(shard: Shard) -> int:
    """Writes one file, all of it or nothing; the number of its records. A damaged or missing file is a UserError."""
    found = dataset.write_records(_counted(read_tfrecords(shard.source), shard), shard.target)
    return found.count


def _write(path: str, content: bytes) -> None:
    with open(f"{path}{dataset.PARTIAL}", "wb") as file:
        file.write(content)
    os.replace(file.name, path)


def _counted(records: Iterator[bytes], shard: Shard) -> Iterator[bytes]:
    """The records; at their end, a UserError if it is not their count that is expected."""
    count = 0
    for record in records:
        yield record
        count += 1
    if count != shard.count:
        raise UserError(
            f"{shard.source}: holds {count} records, dataset_info.json says {shard.count}; fetch the file again"
        )


def read_tfrecords(path: str) -> Iterator[bytes]:
    """The records of a TFRecord file, path or URL.

    The format (tensorflow/core/lib/io/record_writer.h), all numbers little-endian: length, uint64; masked CRC-32C of
    those 8 bytes, uint32; the record; masked CRC-32C of the record, uint32.

    Raises:
      UserError: naming the file and the byte at which the first damaged record begins
    """
    try:
        with fsspec.open(path, "rb") as file:
            yield from _records(file, path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing, though dataset_info.json names it; fetch the file again") from error


def _records(file: BinaryIO, path: str) -> Iterator[bytes]:
    start = 0

    def damaged(problem: str) -> UserError:
        return UserError(f"{path}: the record at byte {start} is damaged ({problem}); fetch the file again")

    while header := file.read(12):
        if len(header) < 12:
            raise damaged("cut off in its length")
        length, checksum = struct.unpack("<QI", header)
        if masked_crc32c(header[:8]) != checksum:
            raise damaged("checksum of its length")
        body = file.read(length + 4)
        if len(body) < length + 4:
            raise damaged(f"cut off after {len(header) + len(body):,} of {length + 16:,} bytes")
        record = body[:-4]
        if masked_crc32c(record) != struct.unpack("<I", body[-4:])[0]:
            raise damaged("checksum")
        yield record
        start += length + 16


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated right by 15 bits and added to a constant (tensorflow/core/lib/hash/crc32c.h)."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
