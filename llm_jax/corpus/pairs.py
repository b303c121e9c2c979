"""Files of pairs (key, value), written once and read from front to back, and sorting more of them than memory holds.

A file is a row of blocks. A block is the length and the CRC-32 of what follows (two little-endian uint32), then zstd,
level 1, of the msgpack array [key, value, key, value, ...].
"""

import dataclasses
import heapq
import itertools
import operator
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import fsspec
import msgpack
import zstandard

from llm_jax.config import UserError
from llm_jax.corpus.steps import Pair

BLOCK_BYTES = 1 << 17  # of keys and values, before compression; a longer pair has a block of its own
PAIR_BYTES = 150  # what Python needs for a pair besides its bytes
FAN_IN = 96  # runs merged at once, each with an open file and a block in memory
HEADER = struct.Struct("<II")


class Run(NamedTuple):
    """The bytes of a file from start to end: whole blocks."""

    path: str
    start: int
    end: int


class PairWriter:
    """Writes pairs to an open file. What it holds back goes out by flush().

    Attributes:
      position: bytes written
      pairs: taken
    """

    def __init__(self, file: BinaryIO):
        self.position = 0
        self.pairs = 0
        self._file = file
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._block = []
        self._block_bytes = 0

    def write(self, key: bytes, value: bytes) -> None:
        self._block += (key, value)
        self._block_bytes += len(key) + len(value)
        self.pairs += 1
        if self._block_bytes >= BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._block:
            data = self._compressor.compress(msgpack.packb(self._block))
            self._file.write(HEADER.pack(len(data), zlib.crc32(data)))
            self._file.write(data)
            self.position += HEADER.size + len(data)
            self._block = []
            self._block_bytes = 0


def read_pairs(run: Run) -> Iterator[Pair]:
    """Raises UserError if a block is damaged or missing."""
    return itertools.chain.from_iterable(_blocks(run))


def _blocks(run: Run) -> Iterator[Iterable[Pair]]:
    decompressor = zstandard.ZstdDecompressor()
    # Read block by block, so that a buffer would only be copied from.
    is_local = "://" not in run.path
    with open(run.path, "rb", buffering=0) if is_local else fsspec.open(run.path, "rb") as file:
        position = file.seek(run.start)
        while position < run.end:
            header = file.read(HEADER.size)
            length, checksum = HEADER.unpack(header) if len(header) == HEADER.size else (0, None)
            left = run.end - position - HEADER.size
            data = file.read(length) if length <= left else b""
            if len(data) != length or zlib.crc32(data) != checksum:
                raise UserError(
                    f"{run.path}: the block at byte {position} is damaged; check the disk, delete this file and run "
                    "the same command again: it makes the file anew"
                )
            position += HEADER.size + length
            flat = msgpack.unpackb(decompressor.decompress(data))
            yield zip(flat[::2], flat[1::2], strict=True)


class Sorter:
    """Takes pairs in any order and writes them to an open file as sorted runs, so many at a time as memory allows.

    Attributes:
      runs: [shard, start, end] of each, complete after flush(). A pair belongs to shard crc32(key) % num_shards.
    """

    def __init__(self, file: BinaryIO, num_shards: int, memory_bytes: int):
        self.runs: list[tuple[int, int, int]] = []
        self.writer = PairWriter(file)
        self._shards: list[list[Pair]] = [[] for _ in range(num_shards)]
        self._memory_bytes = memory_bytes
        self._held_bytes = 0

    def add(self, key: bytes, value: bytes) -> None:
        self._shards[zlib.crc32(key) % len(self._shards)].append((key, value))
        self._held_bytes += len(key) + len(value) + PAIR_BYTES
        if self._held_bytes > self._memory_bytes:
            self.flush()

    def flush(self) -> None:
        for shard, pairs in enumerate(self._shards):
            if pairs:
                pairs.sort()
                start = self.writer.position
                for key, value in pairs:
                    self.writer.write(key, value)
                self.writer.flush()
                self.runs.append((shard, start, self.writer.position))
                pairs.clear()
        self._held_bytes = 0


def merge(runs: Iterable[Run], folder: str, fan_in: int = FAN_IN) -> Iterator[Pair]:
    """The pairs of sorted runs in order, with their repetitions. More runs than fan_in are first merged to fewer, in
    files of the folder, which must be empty."""
    runs = list(runs)
    level = 0
    while len(runs) > fan_in:
        merged = []
        for first in range(0, len(runs), fan_in):
            path = os.path.join(folder, f"{level}-{first}")
            with open(path, "wb") as file:
                writer = PairWriter(file)
                for key, value in heapq.merge(*map(read_pairs, runs[first : first + fan_in])):
                    writer.write(key, value)
                writer.flush()
            merged.append(Run(path, 0, writer.position))
        if level:
            for run in runs:
                os.unlink(run.path)
        runs = merged
        level += 1
    return heapq.merge(*map(read_pairs, runs))


def group(sources: Iterable[Iterable[Pair]]) -> Iterator[tuple[bytes, list[Iterator[bytes]]]]:
    """Each key of sorted sources, with an iterator over its values in each; they end when the next key is asked for."""
    groups = [itertools.groupby(source, operator.itemgetter(0)) for source in sources]
    heads = [next(group, None) for group in groups]
    while keys := [head[0] for head in heads if head]:
        key = min(keys)
        yield key, [map(operator.itemgetter(1), head[1] if head and head[0] == key else ()) for head in heads]
        heads = [
            next(group, None) if head and head[0] == key else head for group, head in zip(groups, heads, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Collection:
    """What a step of a build has made. Iterated over, it gives the pairs, file after file.

    Attributes:
      files: to be read by read_pairs(), in this or other processes
      pairs: their number
    """

    files: tuple[Run, ...]
    pairs: int

    def __iter__(self) -> Iterator[Pair]:
        return itertools.chain.from_iterable(map(read_pairs, self.files))

    def __len__(self) -> int:
        return self.pairs
