"""The data card: what is in a dataset, where it came from and what was left out, as card.json and card.html.

What is shown is what a build has counted under these names (Stats.count; examples, where told, by Stats.example):

    stage/STAGE/documents       what left a stage; STAGE as in Facts.stages. What enters it left the one before.
    stage/STAGE/bytes           of their texts in UTF-8
    stage/STAGE/tokens          counted or estimated as Facts.tokens says
    skipped/REASON              records that could not be read and never became documents; examples
    dropped/REASON              documents left out by a rule, "c4: fewer than 3 sentences"; examples. Of the documents
                                that left the first stage, each is either dropped once or leaves the last one: the card
                                shows this sum, and how far it is off.
    changed/WHAT                changes within documents that stay, "personal: e-mail replaced"; examples
    language/CODE               documents of the finished dataset by language
    length/K                    documents of the finished dataset with 2^K to 2^(K+1)-1 characters: length_bucket()
    domain/SITE                 documents of the finished dataset by registered domain, of the TOP_DOMAINS largest
    domains                     how many registered domains there are
    licence/NAME                documents of the finished dataset by licence, where documents carry one
    cluster/KIND/SIZE           groups of SIZE duplicates of which one document stays, KIND "exact" or "near"; examples
    contaminated/FILE           documents that overlap an evaluation file; examples

What is counted under other names is listed at the end of the page. `count_document` counts language, length, licence.
Domains may be millions, too many for Stats, which is held in memory: three steps count them on disk,

    Map("sites", DOCUMENTS, card.documents_sites),
    Group("site-sizes", ("sites",), card.site_size, streams=True),
    Group("largest-sites", ("site-sizes",), card.count_largest_sites, streams=True)
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import jinja2
import markupsafe

from llm_jax.corpus.dataset import PARTIAL, Shard
from llm_jax.corpus.document import Document
from llm_jax.corpus.rules import urls
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Pair

TOP_DOMAINS = 50
SHOWN_LANGUAGES = 20  # and the rest in one line
SHOWN_INPUTS = 20  # in the HTML; the JSON has all
LARGEST_CLUSTERS = 10
LARGEST_COUNT = (1 << 64) - 1
SHOWN = "stage skipped dropped changed language length domain domains licence cluster contaminated".split()
# What no HTML file may hold or what would turn the text around it: control characters, lone surrogates, noncharacters,
# and the marks that change the direction of writing.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


@dataclasses.dataclass(kw_only=True, slots=True)
class Facts:
    """What a build knows of itself, beside what it has counted.

    Attributes:
      title: for people
      name, version: of the dataset, as in tfds
      description, homepage, citation: as in the dataset's metadata
      date: when the build began, ISO 8601
      command: as it was typed
      versions: of what took part: "llm_jax", "Python", libraries
      inputs: each input and its size in bytes, None where unknown
      stages: each stage and what it does, in order; the first reads
      tokens: how tokens are counted or estimated
      reasons: to a REASON or WHAT, where there is more to say: the threshold and its source
      options: of the build
      licences: each source and the terms under which it may be used
      evaluation: each evaluation file or split that was looked for, and what it is
      contamination: how overlap was looked for and what was done with it
      splits: as given to dataset.finish
      features: each feature of the dataset and what it is
    """

    title: str
    name: str
    version: str
    description: str
    date: str
    command: str
    versions: Mapping[str, str]
    inputs: Mapping[str, int | None]
    stages: Mapping[str, str]
    tokens: str
    licences: Mapping[str, str]
    splits: Mapping[str, Sequence[Shard]]
    features: Mapping[str, str]
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)
    evaluation: Mapping[str, str] = dataclasses.field(default_factory=dict)
    contamination: str = ""
    homepage: str = ""
    citation: str = ""


def count_document(document: Document, stats: Stats) -> None:
    """Counts what the card says of the documents of the finished dataset, except for hosts."""
    stats.count(f"language/{document.language or 'unknown'}")
    stats.count(f"length/{length_bucket(document.text)}")
    if licence := document.extra.get("licence"):
        stats.count(f"licence/{licence}")


def length_bucket(text: str) -> int:
    """K such that the text, which is not empty, has 2^K to 2^(K+1)-1 characters."""
    return len(text).bit_length() - 1


def documents_sites(key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
    """Map: the registered domain of each document that has a URL."""
    if url := Document.from_bytes(value).url:
        yield urls.domain(url).encode(), b""


def site_size(key: bytes, values: Iterator[bytes], stats: Stats) -> Iterator[Pair]:
    """Group: each site under one key, as a value that sorts by falling number of documents."""
    stats.count("domains")
    yield b"", (LARGEST_COUNT - sum(1 for _ in values)).to_bytes(8, "big") + key


def count_largest_sites(key: bytes, values: Iterator[bytes], stats: Stats) -> Iterator[Pair]:
    """Group: counts the largest sites, which come first."""
    for value in itertools.islice(values, TOP_DOMAINS):
        stats.count(f"domain/{value[8:].decode()}", LARGEST_COUNT - int.from_bytes(value[:8], "big"))
    yield from ()


def write_card(directory: str, facts: Facts, stats: Stats) -> None:
    """Writes card.json and card.html into a folder. The same facts and counts give the same bytes."""
    card = summary(facts, stats)
    for name, text in {"card.json": json.dumps(card, indent=2) + "\n", "card.html": render(card)}.items():
        path = os.path.join(directory, name)
        with open(path + PARTIAL, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)


def render(card: Mapping) -> str:
    """The card as a page that needs nothing but itself."""
    return TEMPLATES.get_template("card.html.jinja").render(
        card=card, shown_inputs=SHOWN_INPUTS, shown_languages=SHOWN_LANGUAGES
    )


def summary(facts: Facts, stats: Stats) -> dict:
    """What the card shows, as in card.json: facts as they are, counts sorted and with their shares."""
    known = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    stages = _stages(facts, stats)
    read, kept = stages[0]["documents"], stages[-1]["documents"]
    dropped = _reasons("dropped", facts, stats, read)
    left_out = sum(row["count"] for row in dropped)
    lengths = {int(k): n for k, n in _counts("length", stats).items()}
    return known | {
        "stages": stages,
        "documents": {"read": read, "dropped": left_out, "kept": kept, "unaccounted": read - left_out - kept},
        "splits": [
            {
                "split": split,
                "documents": sum(shard.count for shard in shards),
                "bytes": sum(shard.num_bytes for shard in shards),
                "shards": len(shards),
            }
            for split, shards in facts.splits.items()
        ],
        "dropped": dropped,
        "skipped": _reasons("skipped", facts, stats, read),
        "changed": _reasons("changed", facts, stats, read),
        "lengths": [
            {"from": 1 << k, "to": (2 << k) - 1, "documents": lengths.get(k, 0)}
            for k in range(min(lengths, default=0), max(lengths, default=-1) + 1)
        ],
        "languages": _largest("language", stats),
        "domains": {"number": stats.counts["domains"], "largest": _largest("domain", stats)[:TOP_DOMAINS]},
        "document_licences": _largest("licence", stats),
        "clusters": [_clusters(kind, stats) for kind in ("exact", "near")],
        "contaminated": [
            {
                "file": file,
                "what": facts.evaluation.get(file, ""),
                "documents": stats.counts[f"contaminated/{file}"],
                "examples": _examples(f"contaminated/{file}", stats),
            }
            for file in [*facts.evaluation, *sorted(_counts("contaminated", stats).keys() - facts.evaluation.keys())]
        ],
        "other": {name: n for name, n in sorted(stats.counts.items()) if name.partition("/")[0] not in SHOWN},
    }


def _stages(facts: Facts, stats: Stats) -> list[dict]:
    rows = []
    for stage, what in facts.stages.items():
        row = {name: stats.counts[f"stage/{stage}/{name}"] for name in ("documents", "bytes", "tokens")}
        before = rows[-1] if rows else row
        rows.append(
            {"stage": stage, "what": what, "of_previous": _share(row["documents"], before["documents"])}
            | {"documents_in": before["documents"], "bytes_in": before["bytes"], "tokens_in": before["tokens"]}
            | row
        )
    return rows


def _reasons(kind: str, facts: Facts, stats: Stats, read: int) -> list[dict]:
    """Most frequent first, each with its examples; shares are of the documents read."""
    counts = _counts(kind, stats)
    return [
        {
            "reason": reason,
            "what": facts.reasons.get(reason, ""),
            "count": counts[reason],
            "share": _share(counts[reason], read),
            "examples": _examples(f"{kind}/{reason}", stats),
        }
        for reason in sorted(counts, key=lambda reason: (-counts[reason], reason))
    ]


def _largest(kind: str, stats: Stats) -> list[dict]:
    counts = _counts(kind, stats)
    return [{"name": name, "documents": counts[name]} for name in sorted(counts, key=lambda n: (-counts[n], n))]


def _clusters(kind: str, stats: Stats) -> dict:
    sizes = {int(size): number for size, number in _counts(f"cluster/{kind}", stats).items()}
    largest = []
    for size in sorted(sizes, reverse=True):
        for example in _examples(f"cluster/{kind}/{size}", stats):
            largest.append({"size": size} | example)
        if len(largest) >= LARGEST_CLUSTERS:
            break
    by_power = {}
    for size, number in sizes.items():
        power = (size - 1).bit_length()  # 2, 3-4, 5-8, 9-16, ...
        by_power[power] = by_power.get(power, 0) + number
    return {
        "kind": kind,
        "clusters": sum(sizes.values()),
        "documents": sum(size * number for size, number in sizes.items()),
        "removed": sum((size - 1) * number for size, number in sizes.items()),
        "sizes": [
            {"from": (1 << power - 1) + 1, "to": 1 << power, "clusters": by_power[power]} for power in sorted(by_power)
        ],
        "largest": largest[:LARGEST_CLUSTERS],
    }


def _counts(kind: str, stats: Stats) -> dict[str, int]:
    return {name[len(kind) + 1 :]: count for name, count in stats.counts.items() if name.startswith(f"{kind}/")}


def _examples(name: str, stats: Stats) -> list[dict]:
    return [{"key": key, "text": text} for _, key, text in stats.examples.get(name, ())]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _printable(value: object) -> object:
    # Markup is what the template itself has made, of parts that have passed here before.
    if isinstance(value, str) and not isinstance(value, markupsafe.Markup):
        return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    return value


def _number(number: int) -> str:
    return f"{number:,}"


def _short(number: int) -> str:
    """Three digits and a word, for a headline."""
    for power, word in ((12, "trillion"), (9, "billion"), (6, "million")):
        if number >= 10**power:
            return f"{float(f'{number / 10**power:.3g}'):g} {word}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    """Three digits, in the largest decimal unit of which there is at least one."""
    for power, unit in ((15, "PB"), (12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if number >= 10**power:
            return f"{float(f'{number / 10**power:.3g}'):g} {unit}"
    return f"{number} bytes"


def _percent(share: float) -> str:
    """What is rare does not show as nothing."""
    return "< 0.01%" if 0 < share < 0.0001 else f"{share:.2%}" if share < 0.01 else f"{share:.1%}"


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
    autoescape=True,  # examples are what strangers have put on the web
    finalize=_printable,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"number": _number, "short": _short, "bytes": _bytes, "percent": _percent}
