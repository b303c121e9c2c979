"""Text documents by number, of any tfds dataset in ArrayRecord format or the built-in `python_docs`. No TensorFlow."""

import bisect
import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds
import tensorflow_datasets.text  # noqa: F401  c4, wikipedia: without TensorFlow tfds stops registering before its text datasets
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from llm_jax import config
from llm_jax.config import UserError

BUILT_IN = "python_docs"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
DISK_WAY_OUT = "make room or set data.cache_dir to another disk; what is finished is kept"


class Piece(NamedTuple):
    """The records [skip, skip + take) of one ArrayRecord file."""

    path: str
    skip: int
    take: int
    total: int  # records the file must hold
    split: str = ""  # of the tfds dataset
    first: int = 0  # position in that split of the first record of the piece


class Records:
    """Serialized records of consecutive pieces, by number. Files are opened on demand: it can be sent to a process."""

    def __init__(self, pieces: Sequence[Piece], way_out: str):
        self.pieces = tuple(pieces)
        self.way_out = way_out
        self.ends = list(itertools.accumulate(piece.take for piece in self.pieces))
        self.readers = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getstate__(self) -> dict:
        return self.__dict__ | {"readers": {}}

    def locate(self, i: int) -> tuple[Piece, int]:
        """The piece that holds record i, and the number of the record in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        p = bisect.bisect_right(self.ends, i)
        return self.pieces[p], i - (self.ends[p - 1] if p else 0)

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The records in the order of `indices`. A damaged file or record is a UserError that names it."""
        by_path = {}
        for place, i in enumerate(indices):
            piece, offset = self.locate(int(i))
            by_path.setdefault(piece, []).append((place, piece.skip + offset))
        records = [b""] * len(indices)
        for piece, wanted in by_path.items():
            reader = self._reader(piece)
            positions = [position for _, position in wanted]
            try:
                found = reader.read(positions)
            except RuntimeError as error:
                raise self._damaged(piece.path, reader, positions) from error
            for (place, _), record in zip(wanted, found, strict=True):
                records[place] = record
        return records

    def _reader(self, piece: Piece) -> ArrayRecordReader:
        if piece.path not in self.readers:
            # Without read-ahead: records are read at random.
            reader = ArrayRecordReader(piece.path, options="readahead_buffer_size:0")
            # A file that is missing or cut off opens without an error and claims to have no record.
            if not reader.ok() or reader.num_records() != piece.total:
                problem = (
                    f"{reader.num_records()} records, not {piece.total}" if reader.ok()
                    else "cut off or not an ArrayRecord file" if os.path.exists(piece.path) else "missing"
                )  # fmt: skip
                raise UserError(f"shard {piece.path} cannot be read: {problem}; {self.way_out}")
            self.readers[piece.path] = reader
        return self.readers[piece.path]

    def _damaged(self, path: str, reader: ArrayRecordReader, positions: list[int]) -> UserError:
        for position in positions:
            try:
                reader.read([position])
            except RuntimeError as error:
                return UserError(f"record {position} of shard {path} is damaged ({error}); {self.way_out}")
        return UserError(f"shard {path} could be read only at the second attempt: check the disk; {self.way_out}")


class Documents:
    """The texts of one split of a dataset, by number. Can be sent to a process.

    Attributes:
      name: of the dataset, as in the config
      split: the split or slice, as in the config
      num_bytes: about what the split takes on disk before compression
      fingerprint: hex sha256 of what identifies the documents and their order: dataset, version, shards, slice
    """

    def __init__(self, name: str, split: str, text_key: str, pieces: Sequence[Piece], num_bytes: int, fingerprint: str):
        self.name = name
        self.split = split
        self.text_key = text_key
        self.num_bytes = num_bytes
        self.fingerprint = fingerprint
        self.records = Records(pieces, "restore the file from where it came, or prepare the dataset again with tfds")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> bytes:
        return self.read([i])[0]

    def key(self, i: int) -> str:
        """The place of a document in the dataset, such as "train:123", whatever slice it was reached through."""
        piece, offset = self.records.locate(i)
        return f"{piece.split}:{piece.first + offset}"

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """The texts as they lie in the dataset, in UTF-8 if it is right; an absent text is empty."""
        texts = []
        for i, record in zip(indices, self.records.read(indices), strict=True):
            try:
                feature = tf_example_pb2.Example.FromString(record).features.feature
            except DecodeError as error:
                piece, offset = self.records.locate(i)
                raise UserError(
                    f"record {piece.skip + offset} of shard {piece.path} is not a tf.train.Example; "
                    f"{self.records.way_out}"
                ) from error
            values = feature[self.text_key].bytes_list.value
            texts.append(values[0] if values else b"")
        return texts

    def read_strings(self, indices: Sequence[int], skip_bad_documents: bool) -> list[str | None]:
        """The texts decoded. One that is not UTF-8 is a UserError, or None if it is to be skipped."""
        strings = []
        for i, text in zip(indices, self.read(indices), strict=True):
            try:
                strings.append(text.decode("utf-8"))
            except UnicodeDecodeError as error:
                if not skip_bad_documents:
                    raise UserError(
                        f"document {self.key(i)} of {self.name!r} is not UTF-8: {error.reason} at byte {error.start}; "
                        "mend the dataset, or set data.skip_bad_documents=true"
                    ) from error
                strings.append(None)
        return strings

    def overlap(self, other: "Documents") -> str | None:
        """The key of a document that both hold, or None."""
        for a in self.records.pieces:
            for b in other.records.pieces:
                first = max(a.skip, b.skip)
                if a.path == b.path and first < min(a.skip + a.take, b.skip + b.take):
                    return f"{a.split}:{a.first + first - a.skip}"
        return None


def open_documents(
    source: config.Source, split: str, *, data_dir: str | None, cache_dir: str, say: Callable[[str], None] = print
) -> Documents:
    """Opens one split of a source; `python_docs` is built under cache_dir first if it is nowhere.

    Args:
      source: the dataset and the feature that holds its text
      split: a tfds split or slice of it, such as "train[:98%]"
      data_dir: where tfds datasets lie; None: the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets
      cache_dir: where built corpora go
      say: is told when one is built

    Raises:
      UserError: dataset, split or feature is not there, is empty, or cannot be read by position
    """
    data_dir = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if source.name == BUILT_IN and not os.path.isdir(os.path.join(data_dir, BUILT_IN)):
        data_dir = os.path.join(cache_dir, "corpora")
        build_python_docs(data_dir, say)
    info = find_dataset(source.name, data_dir)
    assert info.features is not None
    if source.text_key not in info.features:
        raise UserError(
            f"data.sources: {source.name!r} has no feature {source.text_key!r}; set text_key to one of "
            f"{', '.join(sorted(info.features))}"
        )
    feature = info.features[source.text_key]
    if not isinstance(feature, tfds.features.Text):
        raise UserError(
            f"data.sources: feature {source.text_key!r} of {source.name!r} is {feature}, not text; "
            "set text_key to another one"
        )
    lengths = {name: part.num_examples for name, part in info.splits.items()}
    there = ", ".join(f"{name} ({length:,} documents)" for name, length in lengths.items())
    try:
        selected = info.splits[split]
        instructions = selected.file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(
            f"data.sources: {source.name!r} has no split {split!r}; there is {there}, and slices of it such as "
            f"'{next(iter(lengths))}[98%:]'"
        ) from error
    starts = {}  # shard -> its split and its first record's position there
    for name, part in info.splits.items():
        position = 0
        for shard in part.file_instructions:
            starts[shard.filename] = name, position
            position += shard.take
    pieces = []
    for shard in instructions:
        name, position = starts[shard.filename]
        path, skip, take = os.fspath(shard.filename), int(shard.skip), int(shard.take)
        pieces.append(Piece(path, skip, take, int(shard.examples_in_shard), name, position + skip))
    num_documents = sum(piece.take for piece in pieces)
    if not num_documents:
        raise UserError(f"data.sources: split {split!r} of {source.name!r} is empty; there is {there}")
    used = {piece.split: info.splits[piece.split] for piece in pieces}
    mean_bytes = sum(int(part.num_bytes) for part in used.values()) / sum(lengths[name] for name in used)
    identity = {
        "dataset": info.full_name,
        "text_key": source.text_key,
        "shards": {name: [int(part.num_bytes), *map(int, part.shard_lengths)] for name, part in used.items()},
        "pieces": [[piece.split, piece.first, piece.take] for piece in pieces],
    }
    return Documents(
        name=source.name,
        split=split,
        text_key=source.text_key,
        pieces=pieces,
        num_bytes=round(mean_bytes * num_documents),
        fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    )


def find_dataset(name: str, data_dir: str) -> tfds.core.DatasetInfo:
    """The metadata of a dataset that is prepared in data_dir in ArrayRecord format."""
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        info = builder.info if is_prepared(builder) else None
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, KeyError, OSError):
        info = None  # tfds knows neither code nor whole files of that name, config or version
    if info is None or not info.splits:
        there = prepared_datasets(data_dir)
        raise UserError(
            f"data.sources: no dataset {name!r} in {data_dir}, where there is {', '.join(there) or 'none'}; set "
            "data.data_dir or TFDS_DATA_DIR to the folder that holds it, or prepare it with tfds in ArrayRecord format"
        )
    array_record = tfds.core.file_adapters.FileFormat.ARRAY_RECORD
    if info.file_format != array_record and array_record in info.alternative_file_formats:
        info.set_file_format(array_record, override=True, override_if_initialized=True)
    assert info.file_format is not None
    if info.file_format != array_record:
        raise UserError(
            f"data.sources: {name!r} in {builder.data_path} is in {info.file_format.value} format, which cannot be "
            f"read by position; convert it: llm-jax build convert --input={builder.data_path}"
        )
    return info


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    # The builder's own method logs a warning.
    return os.path.exists(os.path.join(builder.data_path, "dataset_info.json"))


def prepared_datasets(data_dir: str) -> list[str]:
    """Names, with versions, of the datasets prepared in a folder."""
    names = set()
    for parent, folders, files in os.walk(data_dir):
        name = os.path.relpath(parent, data_dir)
        if "dataset_info.json" in files:
            names.add(":".join(name.rsplit(os.sep, 1)))
            folders.clear()
        elif name.count(os.sep) == 2:
            folders.clear()  # name/config/version is the deepest
    return sorted(names)


def build_python_docs(data_dir: str, say: Callable[[str], None]) -> None:
    """Writes the built-in corpus into data_dir unless it is there: about 15 seconds on one core."""
    from llm_jax.data.builders import python_docs  # noqa: F401  registers the builder

    builder = tfds.builder(BUILT_IN, data_dir=data_dir, file_format="array_record")
    if is_prepared(builder):
        return
    with disk_errors(data_dir), locked(os.path.join(data_dir, BUILT_IN + ".lock")):
        if not is_prepared(builder):
            say("building the corpus python_docs from the installed packages: about 15 seconds")
            tfds.disable_progress_bar()
            # tfds announces a download, and standard output may be JSON.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """One process of this machine at a time; the lock goes with the process, however it ends."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def disk_errors(folder: str) -> Iterator[None]:
    """Turns a full or read-only disk into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"cannot write to {error.filename or folder}: {error.strerror}; {DISK_WAY_OUT}") from error
    except RuntimeError as error:  # of ArrayRecord, which gives no errno
        if "No space left" not in str(error) and "Disk quota" not in str(error):
            raise
        raise UserError(f"cannot write to {folder}: {error}; {DISK_WAY_OUT}") from error
