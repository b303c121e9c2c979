"""Steps that remove what a build holds more than once: copies of a page, equal texts, lines, and near-duplicates.

    Map   by_key          (hash of the key, document)
    Group KeepNewest      (id, document)                             streams
    Map   by_text         (hash of the words, document)
    Group KeepOne         (id, document)                             streams
    Map   lines           (hash of a line, id)
    Group repeated_lines  (id, hash of a line that another keeps)    streams
    Group drop_lines      (id, document)                             sources: documents, repeated lines
    near_duplicates(...)  (id, document)

`id` is document_id(). Of documents that are equal the one with the lowest id stays: one of the best source and, within
it, of the lowest hash, which favours no site (C4 chooses so too). Ids have 60 bits of hash: of n documents n^2 / 2^61
pairs are expected to share one (0.004 of 100 million, 0.4 of a billion); the two are then kept or dropped together.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import rensa

from llm_jax.corpus.document import Document
from llm_jax.corpus.hashed_words import ngram_hashes, word_hashes
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Group, Map, Pair, Step

PRIORITIES = 16
ID_BYTES = 8
CHUNK = 1 << 18  # pairs of near-duplicates united at once
Priority = Callable[[Document], int]


def one_priority(document: Document) -> int:
    return 0


def document_id(document: Document, priority: Priority = one_priority) -> bytes:
    """8 bytes that sort by priority, 0 (kept first) to 15, then by a hash of the document's key."""
    rank = priority(document)
    assert 0 <= rank < PRIORITIES, f"priority {rank} of {document.key!r} is not within 0..{PRIORITIES - 1}"
    return (rank << 60 | int.from_bytes(_hash(document.key, 8), "big") >> 4).to_bytes(ID_BYTES, "big")


def _hash(text: str, num_bytes: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=num_bytes).digest()


# Copies of a page, and equal texts


def by_key(key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
    """Map: documents under a hash of their keys; those of web pages are normalised addresses."""
    yield _hash(Document.from_bytes(value).key, 16), value


def by_text(key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
    """Map: documents under a hash of their words, as word_hashes() has them; a text without words as it is."""
    text = Document.from_bytes(value).text
    words = word_hashes(text).tobytes() or text.encode("utf-8", "surrogatepass")
    yield hashlib.blake2b(words, digest_size=16).digest(), value


@dataclasses.dataclass(frozen=True)
class KeepNewest:
    """Group: the newest document by its timestamp, under its id; of equally old ones that with the lowest bytes."""

    priority: Priority = one_priority  # for the id alone

    def __call__(self, key: bytes, *sources: Iterable[bytes], stats: Stats) -> Iterator[Pair]:
        document, value, _ = _best(sources, lambda document: document.timestamp, "older copy", stats)
        yield document_id(document, self.priority), value


@dataclasses.dataclass(frozen=True)
class KeepOne:
    """Group: the document with the lowest id, under it."""

    priority: Priority = one_priority

    def __call__(self, key: bytes, *sources: Iterable[bytes], stats: Stats) -> Iterator[Pair]:
        document, value, size = _best(sources, self._rank, "exact duplicate", stats)
        if size > 1:
            _count_cluster("exact", size, document, stats)
        yield document_id(document, self.priority), value

    def _rank(self, document: Document) -> int:
        return -int.from_bytes(document_id(document, self.priority), "big")


def _best(sources: Iterable[Iterable[bytes]], rank: Callable, reason: str, stats: Stats) -> tuple[Document, bytes, int]:
    """The document of the highest rank and, of several, the lowest bytes; these; how many there were. Holds two."""
    values = itertools.chain.from_iterable(sources)
    best_value, size = next(values), 1
    best = Document.from_bytes(best_value)
    for value in values:
        dropped = Document.from_bytes(value)
        ranks = rank(dropped), rank(best)
        if ranks[0] > ranks[1] or ranks[0] == ranks[1] and value < best_value:
            best, best_value, dropped = dropped, value, best
        _count_dropped(dropped, reason, stats)
        size += 1
    return best, best_value, size


def _count_dropped(document: Document, reason: str, stats: Stats) -> None:
    stats.count(f"dropped/{reason}")
    stats.example(f"dropped/{reason}", document.key, document.text)


def _count_cluster(kind: str, size: int, document: Document, stats: Stats) -> None:
    stats.count(f"cluster/{kind}/{size}")
    stats.example(f"cluster/{kind}/{size}", document.key, document.text)


# Lines


def line_hashes(text: str) -> list[bytes]:
    """Of each line 8 bytes, b"" for a blank one. As in tfds's c4_utils.py, outer spaces and case make no difference."""
    lines = [line.strip() for line in text.lower().split("\n")]
    return [_hash(line, 8) if line else b"" for line in lines]


def lines(key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
    """Map: the id of each document, which is its key here, under the hashes of its lines.

    Meant for cleaned web pages: of headings such as "History" one document in the whole build keeps its own.
    """
    for line in dict.fromkeys(line_hashes(Document.from_bytes(value).text)):
        if line:
            yield line, key


def repeated_lines(key: bytes, ids: Iterable[bytes], stats: Stats) -> Iterator[Pair]:
    """Group: the line under all ids but the lowest, which is the first."""
    for loser in itertools.islice(ids, 1, None):
        yield loser, key


def drop_lines(key: bytes, documents: list[bytes], repeated: list[bytes], stats: Stats) -> Iterator[Pair]:
    """Group: documents without their repeated lines, and with the first of those they repeat themselves, as in C4. One
    that loses all is dropped; C4 also drops those left with fewer than 3 sentences, which is for a later step."""
    for value in documents:
        document = Document.from_bytes(value)
        gone, kept = set(repeated), []
        for line, digest in zip(document.text.split("\n"), line_hashes(document.text), strict=True):
            if digest in gone:
                stats.count("changed/line dropped: repeated")
                stats.example("changed/line dropped: repeated", document.key, line)
            else:
                kept.append(line)
                gone.add(digest or b"blank")
        text = "\n".join(kept)
        if len(text) == len(document.text):
            yield key, value
        elif text.strip():
            yield key, dataclasses.replace(document, text=text).to_bytes()
        else:
            _count_dropped(document, "all lines repeated", stats)


# Near-duplicates


@dataclasses.dataclass(frozen=True)
class MinHash:
    """What near-duplicates are: texts whose sets of runs of `shingle` words have a Jaccard similarity near 1.

    Of `bands` x `rows` MinHashes (Broder 1997) one byte each is kept. Two texts are compared if all rows of a band
    agree, and are duplicates if the share of agreeing bytes then says a similarity of `threshold`. FineWeb (Penedo et
    al. 2024) has 14 x 8 and does not compare, which finds too few at 0.8. The probability of being found, from the
    binomial distribution:

        similarity              0.4     0.5     0.6   0.65    0.7   0.75    0.8    0.85     0.9
        14 x 8, no threshold    1 %   5.5 %    22 %   37 %   57 %   78 %   92 %    99 %  99.9 %
        20 x 8, 0.72            0 %     0 %  0.06 %  2.5 %   25 %   74 %   97 %  99.8 %   100 %
        24 x 8, 0.72            0 %     0 %  0.02 %  1.8 %   25 %   79 %   98 %  99.9 %   100 %
        24 x 8, no threshold  1.6 %   9.2 %    34 %   55 %   76 %   92 %   99 %  99.9 %   100 %

    A text of fewer words than `shingle` is one run; one without words has no near-duplicates.
    """

    bands: int = 24
    rows: int = 8
    shingle: int = 5  # words
    threshold: float = 0.72
    seed: int = 1

    def signature(self, text: str) -> bytes | None:
        """bands * rows bytes, band by band; None for a text without words."""
        words = word_hashes(text)
        if not len(words):
            return None
        [shingles] = ngram_hashes(words, [min(self.shingle, len(words))])
        ends = np.array([0, len(shingles)], np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, ends, self.bands * self.rows, self.seed)
        return np.array(matrix.to_rows()[0], np.uint32).astype(np.uint8).tobytes()

    def similarity(self, one: bytes, other: bytes) -> float:
        """The estimated Jaccard similarity; its standard deviation is 0.03 at 0.8. Different hashes agree in their last
        byte once in 256 times, which is corrected for."""
        agreeing = np.mean(np.frombuffer(one, np.uint8) == np.frombuffer(other, np.uint8))
        return float((agreeing - 1 / 256) / (1 - 1 / 256))


@dataclasses.dataclass(frozen=True)
class Signatures:
    """Map: the signature of each document under its id."""

    options: MinHash

    def __call__(self, key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
        signature = self.options.signature(Document.from_bytes(value).text)
        if signature:
            yield key, signature


@dataclasses.dataclass(frozen=True)
class Bands:
    """Map: the id of each document under its bands."""

    options: MinHash

    def __call__(self, key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
        rows = self.options.rows
        for band in range(self.options.bands):
            yield band.to_bytes(2, "big") + value[band * rows : (band + 1) * rows], key


def candidates(key: bytes, ids: Iterable[bytes], stats: Stats) -> Iterator[Pair]:
    """Group: each id of a band under the lowest, which is the first: as many pairs as there are ids, however many."""
    ids = iter(ids)
    center = next(ids)
    for other in ids:
        if other != center:
            yield center, other


def send_signatures(key: bytes, signatures: Iterable[bytes], others: Iterable[bytes], stats: Stats) -> Iterator[Pair]:
    """Group: this id and its signature under each id that it is to be compared with."""
    signature = next(iter(signatures))
    for other, _ in itertools.groupby(others):
        yield other, key + signature


@dataclasses.dataclass(frozen=True)
class Compare:
    """Group: (b"", id + id) for each pair of near-duplicates. A document has at most as many pairs as bands."""

    options: MinHash

    def __call__(self, key: bytes, signatures: list[bytes], sent: list[bytes], stats: Stats) -> Iterator[Pair]:
        for value in sent:
            stats.count("near-duplicates/pairs compared")
            if self.options.similarity(signatures[0], value[ID_BYTES:]) >= self.options.threshold:
                stats.count("near-duplicates/pairs found")
                yield b"", key + value[:ID_BYTES]


def ends_of_pairs(key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
    """Map: the two ids of a pair, each by itself."""
    yield b"", value[:ID_BYTES]
    yield b"", value[ID_BYTES:]


def clusters(key: bytes, ends: Iterable[bytes], pairs: Iterable[bytes], stats: Stats) -> Iterator[Pair]:
    """Group: under each id the lowest id and the size of its cluster; clusters are what pairs connect.

    Union-find over all pairs of the build, in arrays: takes 16 bytes of memory per document that has a near-duplicate.
    """
    ids = _distinct(ends)
    parents = np.arange(len(ids), dtype=np.uint32)
    for chunk in _chunks(pairs):
        _unite(parents, *np.searchsorted(ids, chunk.reshape(-1, 2).T))
    sizes = np.zeros(len(ids), np.uint32)
    for start in range(0, len(ids), CHUNK):
        roots = _roots(parents, parents[start : start + CHUNK])
        parents[start : start + CHUNK] = roots
        np.add.at(sizes, roots, 1)
    for start in range(0, len(ids), CHUNK):
        roots = parents[start : start + CHUNK]
        columns = ids[start : start + CHUNK], ids[roots], sizes[roots]
        members, lowest, size = (column.astype(">u8").tobytes() for column in columns)
        for i in range(0, len(members), ID_BYTES):
            yield members[i : i + ID_BYTES], lowest[i : i + ID_BYTES] + size[i : i + ID_BYTES]


def _chunks(values: Iterable[bytes]) -> Iterator[np.ndarray]:
    values = iter(values)
    while data := b"".join(itertools.islice(values, CHUNK)):
        yield np.frombuffer(data, ">u8").astype(np.uint64)


def _distinct(values: Iterable[bytes]) -> np.ndarray:
    """Each of the ids, which come in order, once."""
    parts, last = [np.zeros(0, np.uint64)], None
    for chunk in _chunks(values):
        chunk = np.unique(chunk)
        parts.append(chunk[1:] if chunk[0] == last else chunk)
        last = chunk[-1]
    return np.concatenate(parts)


def _roots(parents: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The root of each node. Halves the paths on the way."""
    while True:
        above = parents[parents[nodes]]
        if (above == nodes).all():
            return nodes
        parents[nodes] = above
        nodes = above


def _unite(parents: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Joins the trees of each pair of nodes, the higher root below the lower: so there are no circles."""
    while len(one):
        one, other = _roots(parents, one), _roots(parents, other)
        apart = one != other
        one, other = one[apart], other[apart]
        np.minimum.at(parents, np.maximum(one, other), np.minimum(one, other).astype(parents.dtype))


@dataclasses.dataclass(frozen=True)
class ResolveNearDuplicates:
    """Group: documents without near-duplicates. If these are not to be removed, all documents of a cluster bear its
    id as extra["cluster"], by which splits.py keeps them together."""

    remove: bool = True

    def __call__(self, key: bytes, documents: list[bytes], cluster: list[bytes], stats: Stats) -> Iterator[Pair]:
        for value in documents:
            if not cluster:
                yield key, value
                continue
            document = Document.from_bytes(value)
            first, size = cluster[0][:ID_BYTES], int.from_bytes(cluster[0][ID_BYTES:], "big")
            if first == key and self.remove:
                _count_cluster("near", size, document, stats)
            elif first == key:
                stats.count(f"near-duplicates/clusters of {size} kept together")
            if not self.remove:
                document.extra["cluster"] = first.hex()
                yield key, document.to_bytes()
            elif first == key:
                yield key, value
            else:
                _count_dropped(document, "near-duplicate", stats)


def near_duplicates(documents: str, name: str, options: MinHash, remove: bool = True) -> list[Step]:
    """The steps from a collection of documents under their ids to one without near-duplicates called `name`."""
    step = [f"{name}.{part}" for part in ("signatures", "bands", "candidates", "sent", "pairs", "ends", "clusters")]
    signatures, bands, candidate, sent, pairs, ends, cluster = step
    return [
        Map(signatures, documents, Signatures(options)),
        Map(bands, signatures, Bands(options)),
        Group(candidate, (bands,), candidates, streams=True),
        Group(sent, (signatures, candidate), send_signatures, streams=True),
        Group(pairs, (signatures, sent), Compare(options)),
        Map(ends, pairs, ends_of_pairs),
        Group(cluster, (ends, pairs), clusters, streams=True),
        Group(name, (documents, cluster), ResolveNearDuplicates(remove)),
    ]
