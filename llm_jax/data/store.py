"""The token store: the documents of one source as token ids, read at random. store_writer.py writes it.

It is a tfds dataset (`tfds.builder_from_directory(folder).as_data_source()` reads it) with the splits `train` and
`held_out`: each record has the ids of a document as raw little-endian bytes, bos and eos included, and the document's
key in the source. Beside it lies an index of three arrays per split: `ends` (tokens up to the end of each document),
`bytes` and `words` of its text.

    FOLDER/tokens-train.array_record-00000-of-00008    appear whole or not at all, so an interrupted prepare goes on
    FOLDER/train.ends.npy, train.bytes.npy, train.words.npy
    FOLDER/features.json, dataset_info.json
    FOLDER/store.json                                  written last: with it, the store is complete
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from llm_jax.config import UserError
from llm_jax.data.sources import Piece, Records
from llm_jax.data.tokenizer import Tokenizer

SPLITS = ("train", "held_out")
DATASET = "tokens"


class Shard(NamedTuple):
    """One file to write: the documents [first, last) of a split."""

    split: str
    number: int
    count: int  # of the split's shards
    first: int
    last: int

    def path(self, folder: str) -> str:
        return os.path.join(folder, f"{DATASET}-{self.split}.array_record-{self.number:05d}-of-{self.count:05d}")

    def index_path(self, folder: str) -> str:
        return os.path.join(folder, "partial", f"{self.split}-{self.number:05d}-of-{self.count:05d}.npz")


class Spans(NamedTuple):
    """Some ranges of the concatenated documents, each R long in rows and U in tokens."""

    tokens_RU: np.ndarray
    documents_RU: np.ndarray  # number of the document each token belongs to
    starts_RU: np.ndarray  # where that document begins in the concatenation


class TokenStore:
    """One split of a complete store. Opens its files on demand, so it can be sent to a process.

    Attributes:
      name: of the source
      num_documents, num_tokens (with bos and eos), num_bytes and num_words of the text
      num_empty, num_bad: documents of the source that were left out as empty or not UTF-8
      fingerprint: hex sha256 that identifies documents, order, tokenizer and format
      tokenizer_sha256: of the tokenizer that wrote it
      ends: int64 [num_documents], bytes and words: uint32 [num_documents]; mapped into memory
    """

    def __init__(self, folder: str, split: str):
        self.folder = folder
        self.split = split
        with open(os.path.join(folder, "store.json")) as file:
            description = json.load(file)
        self.name = description["name"]
        self.fingerprint = hashlib.sha256(f"{description['fingerprint']}/{split}".encode()).hexdigest()
        self.tokenizer_sha256 = description["tokenizer_sha256"]
        self.dtype = np.dtype(description["dtype"])
        counts = description["splits"][split]
        self.num_documents = counts["documents"]
        self.num_tokens = counts["tokens"]
        self.num_bytes = counts["bytes"]
        self.num_words = counts["words"]
        self.num_empty = counts["empty"]
        self.num_bad = counts["bad"]
        lengths = counts["shard_lengths"]
        pieces = [
            Piece(Shard(split, number, len(lengths), 0, 0).path(folder), 0, length, length)
            for number, length in enumerate(lengths)
            if length
        ]
        self.records = Records(pieces, f"delete {folder} and prepare it again")

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("ends", "bytes", "words")}

    def _index(self, name: str) -> np.ndarray:
        return np.load(os.path.join(self.folder, f"{self.split}.{name}.npy"), mmap_mode="r")

    @functools.cached_property
    def ends(self) -> np.ndarray:
        return self._index("ends")

    @functools.cached_property
    def bytes(self) -> np.ndarray:
        return self._index("bytes")

    @functools.cached_property
    def words(self) -> np.ndarray:
        return self._index("words")

    def key(self, i: int) -> str:
        """The key of document i in its source, such as "train:123"."""
        return parse_record(self.records.read([i])[0])["key"].bytes_list.value[0].decode()

    def document_tokens(self, i: int) -> np.ndarray:
        """int32 ids of document i, from bos to eos."""
        return self._documents([i])[0].astype(np.int32)

    def tokens(self, first: int, last: int) -> np.ndarray:
        """int32 ids [first, last) of the concatenation of all documents."""
        if not 0 <= first <= last <= self.num_tokens:
            raise IndexError(f"tokens [{first}, {last}) of {self.num_tokens}")
        return self.spans(np.array([first]), last - first, pad=0).tokens_RU[0]

    def spans(self, first_R: np.ndarray, length: int, pad: int) -> Spans:
        """The ranges of `length` tokens from each of first_R on; what lies behind the last document is `pad`."""
        places_RU = np.asarray(first_R, np.int64)[:, None] + np.arange(length)
        documents_RU = np.searchsorted(self.ends, places_RU, side="right")
        starts_RU = np.where(documents_RU > 0, self.ends[np.maximum(documents_RU - 1, 0)], 0)
        tokens_RU = np.full(places_RU.shape, pad, np.int32)
        if length:
            last_R = np.minimum(documents_RU[:, -1], self.num_documents - 1)
            pairs = zip(documents_RU[:, 0].tolist(), last_R.tolist(), strict=True)
            needed = sorted({document for first, last in pairs for document in range(first, last + 1)})
            ids = dict(zip(needed, self._documents(needed), strict=True))
            for row, first in enumerate(places_RU[:, 0].tolist()):
                document, column = int(documents_RU[row, 0]), 0
                while column < length and document in ids:
                    end = int(self.ends[document])
                    offset = first + column - (end - len(ids[document]))
                    part = ids[document][offset : offset + length - column]
                    tokens_RU[row, column : column + len(part)] = part
                    document, column = document + 1, column + len(part)
        return Spans(tokens_RU, documents_RU, starts_RU)

    def _documents(self, indices: Sequence[int]) -> list[np.ndarray]:
        return [
            np.frombuffer(parse_record(record)["tokens"].bytes_list.value[0], self.dtype)
            for record in self.records.read(indices)
        ]


def require_tokenizer(store: TokenStore, tokenizer: Tokenizer) -> None:
    """A UserError unless the store was written with that tokenizer."""
    if store.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"token store {store.folder} was written with tokenizer {store.tokenizer_sha256[:12]}, not "
            f"{tokenizer.sha256[:12]}; use that tokenizer, or run prepare again"
        )


def is_complete(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "store.json"))


def make_record(tokens: bytes, key: str) -> bytes:
    example = tf_example_pb2.Example()
    example.features.feature["tokens"].bytes_list.value.append(tokens)
    example.features.feature["key"].bytes_list.value.append(key.encode())
    return example.SerializeToString(deterministic=True)


def parse_record(record: bytes):
    """{feature name: Feature} of a serialized tf.train.Example."""
    return tf_example_pb2.Example.FromString(record).features.feature
