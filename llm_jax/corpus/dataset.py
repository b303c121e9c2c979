"""Writing documents as a genuine tfds dataset in ArrayRecord, shard by shard, without TensorFlow.

    folder = dataset_folder(data_dir, "wikipedia_dump/20261101.en", "1.0.0")   # made if it is not there
    shard = write_shard(documents, shard_path(folder, "wikipedia_dump", "train", 3, 16))   # each in any process
    finish(folder, name, version, {"train": [shard, ...]}, ...)   # once, when all shards are there

Every byte written follows from the documents, the names and the version: no clock, no machine, no number of workers.
Until `finish` has written dataset_info.json, which it does last, tfds and llm_jax.data.sources see no dataset.

A dataset gets a name that tfds does not know itself (`wikipedia_dump`, not `wikipedia`): a name and a version of tfds
promise the records of its own builder, and for a name it knows tfds takes the features from its code, not from files.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds
import tensorflow_datasets.text  # noqa: F401  without it, tfds without TensorFlow does not know c4 and wikipedia
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from llm_jax.config import UserError
from llm_jax.corpus.document import Document

FEATURES = {
    "text": "never empty",
    "url": "as it was found; empty where there is none",
    "title": "empty where there is none",
    "timestamp": "when it was fetched or written, ISO 8601 in UTC; empty if unknown",
    "language": "ISO 639-1 code where there is one, else 639-3; empty if unknown",
    "id": "unique in the dataset and stable over builds",
    "origin": "file and record it was read from",
}
NAME = re.compile(r"[a-z][a-z0-9_]*(/[\w+-][\w+.-]*)?", re.ASCII)
PARTIAL = ".partial"  # ends the names of files that are being written
# Each record compressed by itself, so that reading one decompresses one: zstd level 3, 42 % of English text.
# Level 9 saves 1.5 % of the text and takes five times as long.
WRITER_OPTIONS = "group_size:1,zstd:3"


class Shard(NamedTuple):
    """What a finished shard holds."""

    count: int  # records
    num_bytes: int  # of the records before compression


def dataset_folder(data_dir: str, name: str, version: str) -> str:
    """Makes DATA_DIR/NAME[/CONFIG]/VERSION, where tfds looks for that dataset, and returns its path.

    Raises:
      UserError: the name or the version is not one for tfds, or tfds has a dataset of its own by that name
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"name={name}: a dataset's name is small letters, digits and _, optionally with /CONFIG of letters, digits "
            "and _ + - . after it; try my_corpus or my_corpus/en"
        )
    dataset = name.partition("/")[0]
    if dataset in tfds.list_builders(with_community_datasets=False):
        raise UserError(f"name={name}: tfds has a dataset {dataset} of its own; choose another, such as my_{dataset}")
    if not tfds.core.Version.is_valid(version):
        raise UserError(f"version={version}: a version is three numbers; try 1.0.0")
    folder = os.path.join(data_dir, *name.split("/"), version)
    os.makedirs(folder, exist_ok=True)
    return folder


def is_finished(folder: str) -> bool:
    """Whether `finish` has been here."""
    return os.path.exists(os.path.join(folder, "dataset_info.json"))


def shard_path(folder: str, name: str, split: str, number: int, count: int) -> str:
    """The file of shard `number` of `count` of a split."""
    dataset = name.partition("/")[0]
    return os.path.join(folder, f"{dataset}-{split}.array_record-{number:05d}-of-{count:05d}")


def write_shard(documents: Iterable[Document], path: str, extra: Sequence[str] = ()) -> Shard:
    """Writes a shard in the order given: either all of it appears under `path`, or nothing.

    Args:
      documents: of the shard; one at a time is in memory
      path: of shard_path
      extra: the names in Document.extra that are features of this dataset, such as "revision"; absent values are empty

    Raises:
      UserError: the disk is full, or `path` belongs to a finished dataset
    """
    if is_finished(os.path.dirname(path)):
        raise UserError(
            f"{os.path.dirname(path)}: holds a finished dataset, which is never written to; remove it, or choose "
            "another name or version"
        )
    return write_records((serialize(document, extra) for document in documents), path)


def serialize(document: Document, extra: Sequence[str] = ()) -> bytes:
    """The document as a tf.train.Example, as tfds writes features of type Text."""
    values = {
        "text": document.text,
        "url": document.url,
        "title": document.title,
        "timestamp": document.timestamp,
        "language": document.language,
        "id": document.key,
        "origin": document.origin,
    } | {name: document.extra.get(name, "") for name in extra}
    example = tf_example_pb2.Example()
    for name in sorted(values):
        example.features.feature[name].bytes_list.value.append(values[name].encode())
    return example.SerializeToString(deterministic=True)


def write_records(records: Iterable[bytes], path: str) -> Shard:
    """Writes serialized records as write_shard does, wherever it is."""
    temporary = f"{path}.{uuid.uuid4().hex}{PARTIAL}"  # of this attempt alone: engines may start a task twice
    count = num_bytes = 0
    try:
        writer = ArrayRecordWriter(temporary, WRITER_OPTIONS)
        for record in records:
            writer.write(record)
            count += 1
            num_bytes += len(record)
        writer.close()
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # whoever is told that it is finished may rely on it
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except RuntimeError as error:  # of ArrayRecord, which gives no errno
        if "No space left" not in str(error) and "Disk quota" not in str(error):
            raise
        raise UserError(
            f"{path}: cannot be written ({str(error).split(';')[0]}); make room and run the same command again: what "
            "is finished is kept"
        ) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return Shard(count, num_bytes)


def finish(
    folder: str,
    name: str,
    version: str,
    splits: Mapping[str, Sequence[Shard]],
    *,
    description: str,
    citation: str = "",
    homepage: str = "",
    licence: str = "",
    extra: Mapping[str, str] | None = None,
) -> None:
    """Checks that the shards are there and writes the metadata, dataset_info.json last: now it is a dataset.

    Args:
      folder, name, version: as of dataset_folder
      splits: what write_shard returned for each shard of each split, in order. A split without documents is left out.
      description, citation, homepage, licence: go into dataset_info.json, the licence also into the file LICENSE
      extra: the names given to write_shard, each with a few words of what it is

    Raises:
      UserError: a shard is missing or does not hold what it should, or there is no document at all
    """
    splits = {split: shards for split, shards in splits.items() if sum(shard.count for shard in shards)}
    if not splits:
        raise UserError(f"name={name}: no document is left, so there is no dataset; see what was dropped, and why")
    for split, shards in splits.items():
        for number, shard in enumerate(shards):
            path = shard_path(folder, name, split, number, len(shards))
            found = num_records(path)
            if found != shard.count:
                problem = "missing or cut off" if found is None else f"{found} records, not {shard.count}"
                raise UserError(
                    f"{path}: {problem}; remove the folder `shards` of the build's workdir and run it again"
                )
    info = _dataset_info(folder, name, version, splits, extra or {}, description, citation, homepage, licence)
    partial = os.path.join(folder, f"metadata{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    os.mkdir(partial)
    info.write_to_directory(partial)
    for file in sorted(os.listdir(partial), key=lambda file: (file == "dataset_info.json", file)):
        os.replace(os.path.join(partial, file), os.path.join(folder, file))
    os.rmdir(partial)
    for file in os.listdir(folder):
        if file.endswith(PARTIAL):
            os.unlink(os.path.join(folder, file))  # the beginnings of processes that were killed


def num_records(path: str) -> int | None:
    """How many records a shard holds; None if it is missing or cut off, or no ArrayRecord file."""
    reader = ArrayRecordReader(path)
    return reader.num_records() if reader.ok() else None


def _dataset_info(
    folder: str,
    name: str,
    version: str,
    splits: Mapping[str, Sequence[Shard]],
    extra: Mapping[str, str],
    description: str,
    citation: str,
    homepage: str,
    licence: str,
) -> tfds.core.DatasetInfo:
    dataset, _, config = name.partition("/")
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=dataset,
        config_name=config or None,
        version=tfds.core.Version(version),
        data_dir=folder,
        module_name="",  # no code: tfds reads it from its files
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=description,
        features=tfds.features.FeaturesDict(
            {feature: tfds.features.Text(doc=doc) for feature, doc in (FEATURES | dict(extra)).items()}
        ),
        citation=citation,
        homepage=homepage,
        license=licence,
    )
    info.set_file_format(tfds.core.file_adapters.FileFormat.ARRAY_RECORD)
    info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[shard.count for shard in shards],
                    num_bytes=sum(shard.num_bytes for shard in shards),
                )
                for split, shards in splits.items()
            ]
        )
    )
    return info
