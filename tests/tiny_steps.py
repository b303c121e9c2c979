"""Small builds for the tests of the engines. main() is for processes of their own."""

import collections
import dataclasses
import os
import pathlib
import random
import resource
import signal

from llm_jax.corpus import engine
from llm_jax.corpus.steps import Group, Map, Read, Step

MEMORY_BYTES = 1_000_000  # to sort in


def read_lines(input, stats):
    with open(input, "rb") as file:
        for number, line in enumerate(file):
            stats.count("lines/read")
            yield b"%s:%d" % (os.path.basename(input).encode(), number), line.rstrip()


def split_words(key, value, stats):
    words = value.lower().split()
    stats.count("words/read", len(words))
    yield from ((word, b"1") for word in words)


def first_line_of_words(key, value, stats):
    yield from ((word, key) for word in sorted(set(value.lower().split())))


def count_words(word, ones, *, stats):
    if len(ones) == 1:
        stats.count("words/once")
        stats.example("words/once", word.decode("utf-8", "replace"), repr(word))
    yield word, b"%d" % len(ones)


def join_words(word, counts, lines, *, stats):
    stats.count("words/different")
    yield word, counts[0] + b" from " + lines[0]


def most_frequent(key, counts, *, stats):
    """All words together, as a stream: how many are as frequent."""
    totals = collections.Counter(int(count) for count in counts)
    yield key, repr(sorted(totals.items())).encode()


@dataclasses.dataclass(frozen=True)
class OneKey:
    key: bytes

    def __call__(self, key, value, stats):
        yield self.key, value


def word_build(inputs: list[str]) -> list[Step]:
    """Word counts, a join of two sources, and a group of one key."""
    return [
        Read("lines", tuple(inputs), read_lines),
        Map("words", "lines", split_words),
        Map("places", "lines", first_line_of_words),
        Group("counts", ("words",), count_words),
        Group("joined", ("counts", "places"), join_words),
        Map("all", "counts", OneKey(b"")),
        Group("frequencies", ("all",), most_frequent, streams=True),
    ]


def random_pairs(input, stats):
    """As many pairs of 2 kB as the name of the input says."""
    generator = random.Random(input)
    for _ in range(int(input.split("-")[-1])):
        yield generator.randbytes(8), generator.randbytes(2000)


def total_bytes(key, values, *, stats):
    yield key, b"%d" % sum(map(len, values))


def same(key, values, *, stats):
    yield from ((key, value) for value in values)


def large_build(inputs: list[str]) -> list[Step]:
    return [
        Read("pairs", tuple(inputs), random_pairs),
        Group("grouped", ("pairs",), same),
        Map("all", "grouped", OneKey(b"")),
        Group("size", ("all",), total_bytes, streams=True),
    ]


@dataclasses.dataclass(frozen=True)
class Kill:
    """Kills its process at a line, the first time only if there is a file to remember it by."""

    line: bytes
    remember: str | None = None

    def __call__(self, key, value, stats):
        if value == self.line and not (self.remember and os.path.exists(self.remember)):
            if self.remember:
                pathlib.Path(self.remember).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield key, value


@dataclasses.dataclass(frozen=True)
class Fail:
    """Raises an error at a line, unless there is the file `repaired`."""

    line: bytes
    error: type
    repaired: str | None = None

    def __call__(self, key, value, stats):
        if value == self.line and not (self.repaired and os.path.exists(self.repaired)):
            raise self.error("cannot do that")
        yield key, value


@dataclasses.dataclass(frozen=True)
class FullDisk:
    """As long as the file exists, no file of this process can grow larger than so many bytes."""

    exists: str
    size: int

    def __call__(self, input, stats):
        limit = self.size if os.path.exists(self.exists) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        yield from random_pairs(input, stats)


def wait_for_ever(input, stats):
    """Prints its process."""
    os.write(1, f"{os.getpid()}\n".encode())  # in one piece: others write too
    signal.pause()
    yield b"", b""


def endless_build(inputs: list[str]) -> list[Step]:
    return [Read("endless", tuple(inputs), wait_for_ever)]


def main(build, workdir, num_workers, *inputs):
    engine.run(globals()[build](inputs), workdir, num_workers=int(num_workers), num_shards=3, memory_bytes=MEMORY_BYTES)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)  # kB, of the largest process
