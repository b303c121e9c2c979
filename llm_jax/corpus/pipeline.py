"""What a build does, as steps for any engine: read, clean, remove duplicates, split; then decontaminate and write.

There are two parts, as what is held out must be known before training documents that overlap it can be found:

    first:   read and clean -> newest copy of each address -> one of equal texts -> (lines) -> near-duplicates -> splits
    second:  runs of words shared with held-out and evaluation texts -> shards of the dataset -> counts for the card
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from llm_jax.corpus import card, common_crawl, contamination, dataset, duplicates, text, wikipedia
from llm_jax.corpus.document import Document, Skipped
from llm_jax.corpus.pairs import Run, read_pairs
from llm_jax.corpus.rules import Dropped, Rule, urls
from llm_jax.corpus.rules.c4 import C4
from llm_jax.corpus.rules.language import identify
from llm_jax.corpus.rules.personal import Personal
from llm_jax.corpus.splits import Splits
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Group, Map, Pair, Read, Step

READERS = {"common_crawl": common_crawl.read, "wikipedia": wikipedia.read, "text": text.read}
EXTRA = {"common_crawl": {}, "text": {}, "wikipedia": {"revision": "the number of the revision the text is of"}}
STAGES = {
    "read": "what the inputs hold",
    "clean": "what the rules leave",
    "newest": "the newest copy of each page",
    "exact": "one of equal texts",
    "lines": "lines that another document has too, taken out",
    "near": "one of near-duplicates",
    "decontaminated": "nothing that is held out or in an evaluation file",
    "dataset": "what was written",
}
SHARD_BYTES = 250_000_000  # of text, about; a split's shards follow from its size alone
SPLIT_BYTES = "bytes before decontamination"
BYTES_PER_TOKEN = 4
TOKENS = f"estimated as bytes of UTF-8 / {BYTES_PER_TOKEN}; `llm-jax prepare` counts them with a tokenizer"


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the records of a build, besides its inputs.

    Attributes:
      kind: of READERS
      rules: in their order
      lines: whether a line stays in one document only
      near: what near-duplicates are; None leaves them
      splits: shares, and what stays together
      contamination: "drop" documents that overlap, "mask" the words, or "keep" them
      reader: keyword arguments of the reader, in pairs
    """

    kind: str
    rules: tuple[Rule, ...]
    lines: bool
    near: duplicates.MinHash | None
    splits: Splits
    contamination: str
    reader: tuple[tuple[str, object], ...] = ()

    @property
    def stages(self) -> list[str]:
        left_out = {"lines": not self.lines, "near": self.near is None or self.splits.together == "cluster"}
        left_out["decontaminated"] = self.contamination == "keep"
        return [stage for stage in STAGES if not left_out.get(stage)]


def first_part(inputs: Sequence[str], options: Options) -> list[Step]:
    """The last step is "split": (id, document) with extra["split"]."""
    clean = Clean(READERS[options.kind], options.reader, options.rules, by_address=options.kind == "common_crawl")
    steps: list[Step] = [
        Read("clean", tuple(inputs), clean),
        Group("newest", ("clean",), Counted("newest", duplicates.KeepNewest()), streams=True),
        Map("texts", "newest", duplicates.by_text),
        Group("exact", ("texts",), Counted("exact", duplicates.KeepOne()), streams=True),
    ]
    if options.lines:
        c4 = next((rule for rule in options.rules if isinstance(rule, C4)), None)
        steps += [
            Map("lines", steps[-1].name, duplicates.lines),
            Group("repeated-lines", ("lines",), duplicates.repeated_lines, streams=True),
            Group("unique-lines", (steps[-1].name, "repeated-lines"), Counted("lines", DropLines(c4))),
        ]
    if options.near is not None:
        *before, last = duplicates.near_duplicates(
            steps[-1].name, "near", options.near, remove=options.splits.together != "cluster"
        )
        steps += [*before, dataclasses.replace(last, function=Counted("near", last.function))]
    return [*steps, Map("split", steps[-1].name, SplitAndCount(options.splits))]


def second_part(
    files: Sequence[str], options: Options, index: contamination.Index | None, shards: "WriteShard"
) -> list[Step]:
    """files: the collection "split" of the first part. "shards": (split and number, JSON of the count and bytes)."""
    steps: list[Step] = [Read("documents", tuple(files), read_file)]
    if index is not None:
        mask = options.contamination == "mask"
        steps += [
            Map("matches", "documents", contamination.FindMatches(index)),
            Group("uncommon", ("matches",), contamination.Uncommon(), streams=True),
            Group(
                "decontaminated",
                ("documents", "uncommon"),
                Counted("decontaminated", contamination.Decontaminate(index, mask)),
            ),
        ]
    last = steps[-1].name
    return [
        *steps,
        Map("placed", last, Place(shards.counts)),
        Group("shards", ("placed",), shards, streams=True),
        Map("sites", last, card.documents_sites),
        Group("site-sizes", ("sites",), card.site_size, streams=True),
        Group("largest-sites", ("site-sizes",), card.count_largest_sites, streams=True),
    ]


@dataclasses.dataclass(frozen=True)
class Clean:
    """Read: the documents of an input that pass the rules, under a hash of their keys.

    Attributes:
      read, options: a reader, and keyword arguments
      rules: in their order
      by_address: a document's key becomes its normalised URL
    """

    read: Callable[..., Iterator[Document | Skipped]]
    options: tuple[tuple[str, object], ...]
    rules: tuple[Rule, ...]
    by_address: bool

    def __call__(self, path: str, stats: Stats) -> Iterator[Pair]:
        for item in self.read(path, **dict(self.options)):
            if isinstance(item, Document) and not is_unicode(item):
                item = Skipped("broken encoding", item.origin, "lone surrogates")
            if isinstance(item, Skipped):
                stats.count(f"skipped/{item.reason}")
                stats.example(f"skipped/{item.reason}", item.origin, item.detail)
                continue
            count_stage("read", item, stats)
            if self.by_address:
                item.key = urls.normalize(item.url)
            if not item.language:
                item.language, _ = identify(item.text)
            if self._passes(item, stats):
                count_stage("clean", item, stats)
                yield from duplicates.by_key(b"", item.to_bytes(), stats)

    def _passes(self, document: Document, stats: Stats) -> bool:
        """Runs the rules in order, up to the first that drops the document."""
        for rule in self.rules:
            if isinstance(rule, Personal):
                result, replaced = rule.replace(document.text)
                for kind, count in replaced.items():
                    if count:
                        stats.count(f"changed/personal: {kind} replaced", count)
            else:
                result = rule(document.text)
            if isinstance(result, Dropped):
                drop(document, result, stats)
                return False
            document.text = result
        return True


@dataclasses.dataclass(frozen=True)
class DropLines:
    """Group: as duplicates.drop_lines; pages that lost a line must still have enough sentences, where the rules of C4
    are asked for (Raffel et al. 2020, section 2.2)."""

    rule: C4 | None

    def __call__(self, key: bytes, documents: list[bytes], repeated: list[bytes], stats: Stats) -> Iterator[Pair]:
        for _, value in duplicates.drop_lines(key, documents, repeated, stats):
            document = Document.from_bytes(value)
            result = document.text
            if self.rule is not None and value not in documents:
                result = self.rule.enough_sentences(document.text)
            if isinstance(result, Dropped):
                drop(document, result._replace(rule=f"{result.rule}, without repeated lines"), stats)
            else:
                yield key, value


@dataclasses.dataclass(frozen=True)
class Counted:
    """Map or Group: as `function`, whose values are documents, which are counted as what leaves a stage."""

    stage: str
    function: Callable[..., Iterable[Pair]]

    def __call__(self, key: bytes, *values, stats: Stats | None = None) -> Iterator[Pair]:
        if stats is None:  # as a Map gives it
            *values, stats = values
        for pair in self.function(key, *values, stats=stats):
            count_stage(self.stage, Document.from_bytes(pair[1]), stats)
            yield pair


@dataclasses.dataclass(frozen=True)
class SplitAndCount:
    """Map: as `splits`; counts bytes, from which the number of shards follows."""

    splits: Splits

    def __call__(self, key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
        for pair in self.splits(key, value, stats):
            document = Document.from_bytes(pair[1])
            stats.count(f"{SPLIT_BYTES}/{document.extra['split']}", len(document.text.encode()))
            yield pair


def read_file(path: str, stats: Stats) -> Iterator[Pair]:
    """Read: the pairs of a file of an earlier part."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
    return read_pairs(Run(path, 0, size))


@dataclasses.dataclass(frozen=True)
class Place:
    """Map: id and document under "SPLIT/NUMBER" of its shard, by its id, so that sites and inputs are mixed."""

    counts: tuple[tuple[str, int], ...]  # shards of each split

    def __call__(self, key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
        split = Document.from_bytes(value).extra["split"]
        number = int.from_bytes(key, "big") % dict(self.counts)[split]
        yield f"{split}/{number}".encode(), key + value


@dataclasses.dataclass(frozen=True)
class WriteShard:
    """Group: writes a shard of the dataset, and says what it holds.

    Attributes:
      folder, name: of dataset.dataset_folder
      counts: shards of each split
      extra: features besides dataset.FEATURES
    """

    folder: str
    name: str
    counts: tuple[tuple[str, int], ...]
    extra: tuple[str, ...]

    def __call__(self, key: bytes, values: Iterable[bytes], stats: Stats) -> Iterator[Pair]:
        split, number = key.decode().split("/")
        path = dataset.shard_path(self.folder, self.name, split, int(number), dict(self.counts)[split])
        shard = dataset.write_shard(self._documents(values, stats), path, self.extra)
        yield key, json.dumps(shard).encode()

    def empty(self, split: str, number: int) -> dataset.Shard:
        """Writes a shard without documents: in a small split, chance may leave one so."""
        path = dataset.shard_path(self.folder, self.name, split, number, dict(self.counts)[split])
        return dataset.write_shard((), path, self.extra)

    def _documents(self, values: Iterable[bytes], stats: Stats) -> Iterator[Document]:
        for value in values:
            document = Document.from_bytes(value[duplicates.ID_BYTES :])
            count_stage("dataset", document, stats)
            card.count_document(document, stats)
            yield document


def shard_counts(stats: Stats) -> tuple[tuple[str, int], ...]:
    """How many shards each split gets, by what the first part has counted."""
    sizes = {name.partition("/")[2]: n for name, n in stats.counts.items() if name.startswith(f"{SPLIT_BYTES}/")}
    return tuple((split, -(-size // SHARD_BYTES)) for split, size in sorted(sizes.items()))


def looked_for(split: Iterable[Pair], evaluation: Sequence[str]) -> Iterator[contamination.Text]:
    """What training documents must not hold: the evaluation files, then the held-out documents of the build."""
    yield from itertools.chain.from_iterable(map(contamination.read_evaluation, evaluation))
    for _, value in split:
        document = Document.from_bytes(value)
        if document.extra["split"] != "train":
            yield contamination.Text(document.extra["split"], True, document.text)


def count_stage(stage: str, document: Document, stats: Stats) -> None:
    size = len(document.text.encode())
    stats.count(f"stage/{stage}/documents")
    stats.count(f"stage/{stage}/bytes", size)
    stats.count(f"stage/{stage}/tokens", size // BYTES_PER_TOKEN)


def drop(document: Document, dropped: Dropped, stats: Stats) -> None:
    stats.count(f"dropped/{dropped.rule}")
    detail = f"[{dropped.detail}] " if dropped.detail else ""
    stats.example(f"dropped/{dropped.rule}", document.key, detail + document.text)


def is_unicode(document: Document) -> bool:
    """Whether all of it can be written as UTF-8."""
    try:
        for text_of in (document.text, document.url, document.title, document.key, document.origin):
            text_of.encode()
    except UnicodeEncodeError:
        return False
    return True
