"""Training documents that hold text of evaluation files or of held-out splits: found by shared runs of 13 words.

    index = write_index(folder, texts, stats)   # once, of what training must not hold
    Map   FindMatches(index)       (hash of a run of words, id + number of the text's source)
    Group Uncommon(common)         (id, hash + number of the source)            streams
    Group Decontaminate(index, mask)  (id, document)                           sources: documents, matches

Words are those of hashed_words.word_hashes: case, punctuation and spacing make no difference. The rule is that of Brown
et al. (2020, appendix C): runs of 13 words; of a shorter item all its words, at least 8, as fewer are found by chance.
They ignore runs that collide with more than 10 training documents: common phrases, legal boilerplate. So does Uncommon,
but only for runs of held-out splits, of which every web page brings some. A run of an evaluation file always counts: a
well-known question is on more than 10 pages, and they are what is looked for. Of 10^12 runs
of training words against 10^9 of the index, 54 are expected to match by chance: hashes have 64 bits.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.config import UserError
from llm_jax.corpus.document import Document
from llm_jax.corpus.duplicates import ID_BYTES
from llm_jax.corpus.hashed_words import ngram_hashes, word_hashes
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Pair

LENGTH = 13  # words
SHORTEST = 8  # words of an item that is looked for as a whole
HELD_OUT = 0x8000  # set in the numbers of sources that are splits of the build
ENTRY = np.dtype([("hash", "<u8"), ("source", "<u2")])
BUCKETS = 256  # parts that are sorted one after the other, so that the index may be larger than memory
BUFFER_BYTES = 1 << 26
ARRAY_BYTES = 100  # what an array takes besides its elements
FILTER_BITS = 26  # 64 MiB of memory, at most
HASH_BYTES = 8


# The index


@dataclasses.dataclass(frozen=True)
class Index:
    """A folder with the runs of words that training must not hold.

    Attributes:
      folder: hashes (sorted uint64), sources (uint16 for each hash: the first that has it, evaluation files before
        splits) and about.json
      digest: sha256 of the contents
    """

    folder: str
    digest: str


class Text(NamedTuple):
    """One item of an evaluation file, or a held-out document."""

    source: str  # the file's path, or the split's
    held_out: bool  # of the build
    text: str


def read_evaluation(path: str) -> Iterator[Text]:
    """The text of a .txt file, or of the field "text" of each line of a .jsonl file.

    Raises:
      UserError: the file is missing, not UTF-8, of another kind, or a line is without a text
    """
    way_out = "give .txt files, or .jsonl files with a field text, in UTF-8"
    if not path.endswith((".txt", ".jsonl")):
        raise UserError(f"evaluation file {path}: of a kind that cannot be read; {way_out}")
    try:
        with open(path, encoding="utf-8") as file:
            if path.endswith(".txt"):
                yield Text(path, False, file.read())
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    item = json.loads(line)
                    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
                        raise UserError(f"evaluation file {path}, line {number}: has no field text; {way_out}")
                    yield Text(path, False, item["text"])
    except OSError as error:
        raise UserError(f"evaluation file {path}: {error.strerror}; {way_out}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"evaluation file {path}: not UTF-8 ({error.reason} at byte {error.start}); {way_out}"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"evaluation file {path}, line {number}: not JSON ({error.msg}); {way_out}") from error


def write_index(folder: str, texts: Iterable[Text], stats: Stats) -> Index:
    """Writes the index of the texts, in place of one that is there. A run of words that several files have is put down
    to the one that comes first.

    Memory does not grow with the texts. Counts the items that are too short to be looked for, by source.
    """
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    names: dict[tuple[bool, str], int] = {}  # evaluation files are numbered from 0, splits from HELD_OUT
    lengths = set()
    buckets = _Buckets(partial)
    for source, held_out, text in texts:
        number = names.setdefault((held_out, source), len(names) + held_out * HELD_OUT)
        words = word_hashes(text)
        if len(words) < SHORTEST:
            stats.count(f"contamination/{source}: items of fewer than {SHORTEST} words, not looked for")
            continue
        length = min(LENGTH, len(words))
        lengths.add(length)
        [hashes] = ngram_hashes(words, [length])
        buckets.add(np.unique(hashes), number)
    digest = buckets.finish()
    about = json.dumps({"lengths": sorted(lengths), "sources": {n: source for (_, source), n in names.items()}})
    digest.update(about.encode())
    with open(os.path.join(partial, "about.json"), "w", encoding="utf-8") as file:
        file.write(about)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return Index(folder, digest.hexdigest())


class _Buckets:
    """Hashes and their sources, by the hashes' first byte, in files that are sorted one by one into the index."""

    def __init__(self, folder: str):
        self.folder = folder
        self.waiting: list[np.ndarray] = []
        self.waiting_bytes = 0

    def add(self, hashes: np.ndarray, source: int) -> None:
        entries = np.empty(len(hashes), ENTRY)
        entries["hash"], entries["source"] = hashes, source
        self.waiting.append(entries)
        self.waiting_bytes += entries.nbytes + ARRAY_BYTES
        if self.waiting_bytes > BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            entries = np.concatenate(self.waiting)
            entries = entries[np.argsort(entries["hash"])]
            borders = np.searchsorted(entries["hash"] >> np.uint64(56), np.arange(1, BUCKETS, dtype=np.uint64))
            for number, part in enumerate(np.split(entries, borders)):
                with open(self._path(number), "ab") as file:
                    file.write(part.tobytes())  # whose errors, unlike those of tofile, say what is wrong
        self.waiting, self.waiting_bytes = [], 0

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, f"bucket-{number:03}")

    def finish(self) -> "hashlib._Hash":
        """Writes `hashes` and `sources`, without repetitions, and returns their digest."""
        self._flush()
        digest = hashlib.sha256()
        with (
            open(os.path.join(self.folder, "hashes"), "wb") as hashes,
            open(os.path.join(self.folder, "sources"), "wb") as sources,
        ):
            for number in range(BUCKETS):
                if not os.path.exists(self._path(number)):
                    continue
                entries = np.fromfile(self._path(number), ENTRY)
                entries = entries[np.lexsort((entries["source"], entries["hash"]))]
                os.unlink(self._path(number))
                entries = entries[np.diff(entries["hash"], prepend=~entries["hash"][:1]) != 0]
                for column, file in (("hash", hashes), ("source", sources)):
                    data = entries[column].tobytes()
                    file.write(data)
                    digest.update(data)
        return digest


# Looking up


class _Lookup(NamedTuple):
    """An index, open."""

    hashes: np.ndarray
    sources: np.ndarray
    lengths: list[int]
    names: dict[int, str]
    possible: np.ndarray  # bool, by the first bits of a hash: whether the index has one that begins so
    shift: np.uint64


@functools.lru_cache(maxsize=1)
def _open(index: Index) -> _Lookup:
    with open(os.path.join(index.folder, "about.json"), encoding="utf-8") as file:
        about = json.load(file)
    names = {int(number): name for number, name in about["sources"].items()}
    if not about["lengths"]:
        return _Lookup(np.zeros(0, "<u8"), np.zeros(0, "<u2"), [], names, np.zeros(0, bool), np.uint64(0))
    hashes = np.memmap(os.path.join(index.folder, "hashes"), "<u8", "r")
    sources = np.memmap(os.path.join(index.folder, "sources"), "<u2", "r")
    bits = min((16 * len(hashes)).bit_length(), FILTER_BITS)
    possible, shift = np.zeros(1 << bits, bool), np.uint64(64 - bits)
    for start in range(0, len(hashes), 1 << 20):
        possible[hashes[start : start + (1 << 20)] >> shift] = True
    return _Lookup(hashes, sources, about["lengths"], names, possible, shift)


def _find(hashes: np.ndarray, lookup: _Lookup) -> tuple[np.ndarray, np.ndarray]:
    """Those of the hashes that the index has, each once, and their places there."""
    hashes = np.unique(hashes[lookup.possible[hashes >> lookup.shift]])
    places = np.minimum(np.searchsorted(lookup.hashes, hashes), len(lookup.hashes) - 1)
    found = lookup.hashes[places] == hashes
    return hashes[found], places[found]


@dataclasses.dataclass(frozen=True)
class FindMatches:
    """Map: a document's id and the number of the source under each hash in the index of a run of its words. None for
    documents of another split than train (see splits.py)."""

    index: Index

    def __call__(self, key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
        document = Document.from_bytes(value)
        if document.extra.get("split", "train") != "train":
            return
        lookup = _open(self.index)
        for runs in ngram_hashes(word_hashes(document.text), lookup.lengths):
            hashes, places = _find(runs, lookup)
            for digest, source in zip(hashes, lookup.sources[places], strict=True):
                yield int(digest).to_bytes(HASH_BYTES, "big"), key + int(source).to_bytes(2, "big")


@dataclasses.dataclass(frozen=True)
class Uncommon:
    """Group: a hash and the number of its source under the ids of the documents that have it, unless it is common: a
    run of a held-out split that is in more than `common` training documents."""

    common: int = 10

    def __call__(self, key: bytes, values: Iterable[bytes], stats: Stats) -> Iterator[Pair]:
        values = iter(values)
        first = list(itertools.islice(values, self.common + 1))
        source = first[0][ID_BYTES:]
        if len(first) > self.common and int.from_bytes(source, "big") >= HELD_OUT:
            stats.count("contamination/runs of held-out words ignored as common")
            return
        for value in itertools.chain(first, values):
            yield value[:ID_BYTES], key + source


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """Group: documents without what the index has in common with them.

    Attributes:
      mask: only the words of the matches are cut out, up to the spaces around them, and what is left on either side put
        on lines of its own; otherwise the document is dropped. One of which nothing is left is dropped in both cases.
    """

    index: Index
    mask: bool = False

    def __call__(self, key: bytes, documents: list[bytes], matches: list[bytes], stats: Stats) -> Iterator[Pair]:
        if not matches:
            yield from ((key, value) for value in documents)
            return
        lookup = _open(self.index)
        by_source = collections.defaultdict(list)
        for match in matches:
            by_source[int.from_bytes(match[HASH_BYTES:], "big")].append(int.from_bytes(match[:HASH_BYTES], "big"))
        for value in documents:
            document = Document.from_bytes(value)
            words, tokens = word_hashes(document.text), _token_of_each_word(document.text)
            touched = np.zeros(len(words), bool)
            for source, hashes in sorted(by_source.items()):
                inside = _inside(words, lookup.lengths, np.array(hashes, np.uint64))
                if not inside.any():  # the matches are of another document with this id
                    continue
                begin, end = _spans(inside, tokens)[0]
                stats.count(f"contaminated/{lookup.names[source]}")
                stats.example(f"contaminated/{lookup.names[source]}", document.key, document.text[begin:end])
                touched |= inside
            text = _cut(document.text, _spans(touched, tokens)) if self.mask else ""
            if not touched.any():
                yield key, value
            elif text:
                stats.count("changed/contaminated words cut out", int(touched.sum()))
                yield key, dataclasses.replace(document, text=text).to_bytes()
            else:
                stats.count("dropped/contaminated")
                stats.example("dropped/contaminated", document.key, document.text)


def _inside(words: np.ndarray, lengths: Sequence[int], hashes: np.ndarray) -> np.ndarray:
    """[words] bool: whether a word is within a run that has one of the hashes."""
    change = np.zeros(len(words) + 1, int)
    for length, runs in zip(lengths, ngram_hashes(words, lengths), strict=True):
        starts = np.flatnonzero(np.isin(runs, hashes))
        change[starts] += 1
        change[starts + length] -= 1
    return np.cumsum(change[:-1]) > 0


def _token_of_each_word(text: str) -> np.ndarray:
    """[words, 2]: where the token begins and ends, a run of characters without spaces, that each word is part of."""
    tokens = [match.span() for match in re.finditer(r"\S+", text)]
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # a word that the text cannot have
    words = word_hashes(f" {mark} ".join(text[begin:end] for begin, end in tokens))
    marks = np.flatnonzero(words == word_hashes(mark))
    counts = np.diff(marks, prepend=-1, append=len(words)) - 1
    return np.repeat(tokens, counts, axis=0)


def _spans(inside: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[runs, 2]: where the text of each run of words that are inside begins and ends."""
    steps = np.diff(inside.astype(np.int8), prepend=0, append=0)
    first, last = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1) - 1
    return np.stack([tokens[first, 0], tokens[last, 1]], axis=1)


def _cut(text: str, spans: np.ndarray) -> str:
    """The text without the spans: what is left between them, each piece on a line of its own."""
    borders = [0, *spans.ravel(), len(text)]
    pieces = [text[begin:end].strip() for begin, end in zip(borders[::2], borders[1::2], strict=True)]
    return "\n".join(piece for piece in pieces if piece)
