"""`llm-jax build` as a user calls it, on real pages and articles: what comes out is read back by name through tfds."""

import collections
import gzip
import hashlib
import json
import pathlib
import random
import re
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastwarc", reason="needs the extra [build]")

import tensorflow_datasets as tfds
from fastwarc.warc import ArchiveIterator

from llm_jax import cli
from llm_jax.config import Source
from llm_jax.corpus.rules.urls import normalize
from llm_jax.data.sources import open_documents

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
WET = sorted(SHARED.glob("wet/*.wet.gz"))
DUMP = SHARED / "dumps" / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
needs_pages = pytest.mark.skipif(not WET, reason=f"needs the real pages of {SHARED}")


def start(kind: str, data_dir: pathlib.Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "llm_jax", "build", kind, f"--data_dir={data_dir}", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def build(kind: str, data_dir: pathlib.Path, *flags: str) -> str:
    process = start(kind, data_dir, *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def read(name: str, data_dir: pathlib.Path) -> dict[str, list[dict[str, str]]]:
    """Each split's records, by tfds alone."""
    builder = tfds.builder(name, data_dir=data_dir)
    found = {}
    for split in builder.info.splits:
        source = builder.as_data_source(split=split)
        found[split] = [{k: v.decode() for k, v in source[i].items()} for i in range(len(source))]
    return found


def records(folder: pathlib.Path) -> dict[str, str]:
    """A digest of each file with records or metadata, by name."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("card.")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def card(folder: pathlib.Path) -> dict:
    found = json.loads((folder / "card.json").read_text())
    assert "<script" not in (folder / "card.html").read_text()
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> pathlib.Path:
    """The 1,200 pages, built by one process."""
    if not WET:
        pytest.skip(f"needs the real pages of {SHARED}")
    data_dir = tmp_path_factory.mktemp("pages")
    output = build("common_crawl", data_dir, f"--input={SHARED}/wet/*", "--workers=1", "--validation=0.1")
    assert "of 1,200 read" in output
    return data_dir


def test_common_crawl(pages):
    splits = read("common_crawl", pages)
    assert splits.keys() == {"train", "validation"} | splits.keys() & {"test"}
    kept = [record for records in splits.values() for record in records]
    assert 200 < len(kept) < 300  # of 362 in English
    originals = collections.defaultdict(list)
    for path in WET:
        for record in ArchiveIterator(gzip.open(path)):
            if uri := record.headers.get("WARC-Target-URI"):
                originals[normalize(uri)].append(record.reader.read().decode())
    for record in kept:
        assert record["language"] == "en" and record["id"] == normalize(record["url"])
        pages_text = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", "\n".join(originals[record["id"]]))
        whole = "\n".join(" ".join(line.split()) for line in pages_text.splitlines())
        for line in record["text"].splitlines():
            plain = re.split(r"<(?:email|phone|ip|card)>", " ".join(line.split()))
            assert all(part.strip() in whole for part in plain)
            assert line.endswith((".", "?", "!", '"', ">")) and len(line.split()) >= 5
    assert len({record["id"] for record in kept}) == len({record["text"] for record in kept}) == len(kept)
    seen = collections.Counter(line.lower() for record in kept for line in record["text"].splitlines())
    assert seen.most_common(1)[0][1] == 1, "a line is in two pages"
    documents = open_documents(Source(name="common_crawl"), "train", data_dir=str(pages), cache_dir=str(pages))
    assert {text.decode() for text in documents.read(range(len(documents)))} == {r["text"] for r in splits["train"]}


def test_the_card_accounts_for_every_page(pages):
    found = card(pages / "common_crawl" / "1.0.0")
    documents = found["documents"]
    splits = read("common_crawl", pages)
    assert documents["read"] == 1200 and documents["unaccounted"] == 0
    assert documents["kept"] == sum(map(len, splits.values()))
    assert {row["split"]: row["documents"] for row in found["splits"]} == {s: len(r) for s, r in splits.items()}
    by_reason = {row["reason"]: row for row in found["dropped"]}
    assert by_reason["language: not wanted"]["count"] > 700 and len(by_reason["language: not wanted"]["examples"]) == 20
    assert "min_sentences=3" in by_reason["c4: fewer than 3 sentences"]["what"]
    assert sum(row["documents"] for row in found["lengths"]) == documents["kept"]
    assert [path.suffix for path in (pages / ".building").iterdir()] == [".lock"]


def test_neither_workers_nor_a_second_call_change_a_byte(pages, tmp_path):
    before = records(pages / "common_crawl")
    flags = (f"--input={SHARED}/wet/*", "--validation=0.1")
    assert "is finished; nothing to do" in build("common_crawl", pages, *flags, "--workers=2")
    printed = subprocess.run(
        [sys.executable, "-m", "llm_jax", "build", "common_crawl", f"--data_dir={pages}", *flags, "--json"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert json.loads(printed)["read"] == 1200
    other = start("common_crawl", pages, *flags, "--nolines")
    assert "of other inputs or options" in other.communicate()[0] and other.returncode == 78
    assert records(pages / "common_crawl") == before
    build("common_crawl", tmp_path, f"--input={SHARED}/wet/*", "--workers=2", "--validation=0.1")
    assert records(tmp_path / "common_crawl") == before


@needs_pages
@pytest.mark.soak
def test_ten_kills_change_no_byte(pages, tmp_path):
    chance = random.Random(0)
    flags = (f"--input={SHARED}/wet/*", "--workers=2", "--validation=0.1")
    undisturbed = records(pages / "common_crawl")
    began = time.monotonic()
    build("common_crawl", tmp_path / "0", *flags)
    seconds = time.monotonic() - began
    assert records(tmp_path / "0" / "common_crawl") == undisturbed
    kills, begun = 0, 1
    while kills < 10:
        process = start("common_crawl", tmp_path / str(begun), *flags)
        try:
            process.communicate(timeout=chance.uniform(0.2, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        else:
            assert process.returncode == 0 and records(tmp_path / str(begun) / "common_crawl") == undisturbed
            begun += 1
    build("common_crawl", tmp_path / str(begun), *flags)
    assert records(tmp_path / str(begun) / "common_crawl") == undisturbed


@pytest.mark.skipif(not (SHARED / "warc").exists(), reason=f"needs the real pages of {SHARED}")
def test_warc_in_all_languages_with_other_rules(tmp_path):
    inputs = f"--input={SHARED}/warc/*"
    build("common_crawl", tmp_path, inputs, "--languages=", "--rules=language,personal", "--name=web/all", "--nolines")
    found = card(tmp_path / "web" / "all" / "1.0.0")
    assert len(found["languages"]) > 5 and found["documents"]["unaccounted"] == 0
    assert {row["reason"] for row in found["dropped"]} <= {
        "language: not clear", "exact duplicate", "near-duplicate",
        "older copy", "contaminated",
    }  # fmt: skip
    assert sum(map(len, read("web/all", tmp_path).values())) == found["documents"]["kept"] > 60


@pytest.mark.skipif(not DUMP.exists(), reason=f"needs the real dump of {SHARED}")
def test_wikipedia(tmp_path):
    build("wikipedia", tmp_path, f"--input={DUMP}", "--name=wikipedia_dump/20200101.en", "--test=0")
    splits = read("wikipedia_dump/20200101.en", tmp_path)
    articles = {record["title"]: record for records in splits.values() for record in records}
    assert len(articles) == 98 and "test" not in splits
    anarchism = articles["Anarchism"]
    assert anarchism["url"] == "https://en.wikipedia.org/wiki/Anarchism" and anarchism["id"] == "wikipedia:en:12"
    assert anarchism["revision"].isdigit() and anarchism["language"] == "en"
    assert len(anarchism["text"]) > 20_000 and not re.search(r"\{\{|\[\[|<ref", anarchism["text"])
    found = card(tmp_path / "wikipedia_dump" / "20200101.en" / "1.0.0")
    skipped = {row["reason"]: row["count"] for row in found["skipped"]}
    assert skipped["not an article: redirect"] > 50 and found["documents"]["unaccounted"] == 0


def test_text(tmp_path):
    """Of each kind one; equal and held-out texts are found across them."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi".split()
    chance = random.Random(0)
    texts = [" ".join(chance.choices(words, k=200)) for _ in range(60)]
    inputs = tmp_path / "inputs" / "deep"
    inputs.mkdir(parents=True)
    (inputs / "one.txt").write_text(texts[0])
    lines = [json.dumps({"body": text, "url": f"https://a.example/{i}"}) for i, text in enumerate(texts)]
    with gzip.open(inputs / "many.jsonl.gz", "wt") as file:
        file.write("\n".join([*lines, "{broken", json.dumps({"body": texts[5].upper()})]))
    evaluation = tmp_path / "questions.jsonl"
    evaluation.write_text(json.dumps({"text": " ".join(texts[9].split()[50:80])}) + "\n")
    flags = (f"--input={tmp_path}/inputs/**/*.{{txt,jsonl.gz}}", "--text_key=body", f"--evaluation={evaluation}")
    build("text", tmp_path / "data", *flags, "--name=mine", "--validation=0", "--test=0")
    splits = read("mine", tmp_path / "data")
    kept = {record["text"] for record in splits["train"]}
    assert len(splits["train"]) == 59 and texts[9] not in kept
    assert {text.lower() for text in kept} == set(texts) - {texts[9]}
    found = card(tmp_path / "data" / "mine" / "1.0.0")
    dropped = {row["reason"]: row["count"] for row in found["dropped"]}
    assert dropped == {"exact duplicate": 2, "contaminated": 1}
    assert [(row["file"], row["documents"]) for row in found["contaminated"]] == [(str(evaluation), 1)]
    assert sum(row["count"] for row in found["skipped"]) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--input=nothing/*.gz",), "there is no folder "),
        (("--input={here}", "--rules=c5"), "there is no rule 'c5'; choose of language, c4"),
        (("--input={here}", "--threshold=c4.min_sentences=many"), "'many' is no int"),
        (("--input={here}", "--threshold=c4.length=3"), "give RULE.FIELD=NUMBER, with one of"),
        (("--input={here}", "--rules=bad_words"), "bad_words needs --bad_words=FILE"),
        (("--input={here}", "--rules=c4,c4"), "c4 is named twice"),
        (("--input={here}", "--rules=c4", "--languages=de"), "--languages has no effect without the rule language"),
        (("--input={here}", "--rules=c4", "--threshold=fineweb.short_line=3"), "with one of c4.max_characters"),
        (("--input={here}", "--contamination=keep", "--evaluation=x.txt"), "has no effect"),
        (("--input={here}", "--evaluation=missing.txt"), "evaluation file missing.txt: No such file"),
        (("--input={here}", "--runner=FlinkRunner"), "give Beam's flags in one text"),
        (("--input={here}", "--together=cluster", "--nonear_duplicates"), "needs near-duplicates"),
        (("--input={here}", "--name=foo/.."), "a dataset's name is"),
        (("--input={here}", "--contamination=burn"), "choose one of drop, mask, keep"),
        (("--input={here}", "--validation=0.7", "--test=0.7"), "more than 1 in all"),
        (("--input={here}", "--name=wikipedia"), "tfds has a dataset wikipedia of its own"),
        (("--input={here}", "--config=x.py"), "--config: no such flag"),
        (("--input={here}", "more.gz"), "unexpected argument 'more.gz'"),
        ((), "needs --input=FILES"),
    ],
)
def test_wrong_flags(tmp_path, capsys, flags, words):
    here = tmp_path / "empty.warc.wet.gz"
    here.touch()
    argv = ["build", "common_crawl", f"--data_dir={tmp_path}/data", *(flag.format(here=here) for flag in flags)]
    assert cli.main(argv) == 78
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.soak
def test_beam_makes_the_same_records(tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra [beam]")
    chance = random.Random(0)
    words = [f"word{n}" for n in range(40)]
    texts = [" ".join(chance.choices(words, k=60)) for _ in range(40)]
    texts += [texts[0].upper(), texts[1] + " more", " ".join(texts[2].split()[:30] + texts[3].split()[:30])]
    for part in range(2):
        lines = [json.dumps({"text": text}) for text in texts[part::2]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    (tmp_path / "evaluation.txt").write_text(" ".join(texts[5].split()[10:30]))
    flags = (f"--input={tmp_path}/*.jsonl", "--name=mine", "--test=0.2", f"--evaluation={tmp_path}/evaluation.txt")
    build("text", tmp_path / "here", *flags)
    build("text", tmp_path / "beam", *flags, "--runner=--runner=DirectRunner")
    assert records(tmp_path / "here" / "mine") == records(tmp_path / "beam" / "mine")
    cards = [card(tmp_path / place / "mine" / "1.0.0") for place in ("here", "beam")]
    for found in cards:
        del found["date"], found["command"]
    assert cards[0] == cards[1]
    assert {row["reason"] for row in cards[0]["dropped"]} == {"exact duplicate", "near-duplicate", "contaminated"}


def test_what_the_user_has_in_the_workdir_stays(tmp_path):
    workdir = tmp_path / "work"
    workdir.mkdir()
    (workdir / "documents").mkdir()
    (workdir / "documents" / "precious.txt").write_text("An old text with five words.")
    flags = (f"--input={workdir}/**/*.txt", f"--workdir={workdir}", "--name=mine", "--validation=0", "--test=0")
    for _ in range(2):
        build("text", tmp_path / "data", *flags)
        assert [path.name for path in workdir.iterdir()] == ["documents"]
        assert [path.name for path in (workdir / "documents").iterdir()] == ["precious.txt"]
    assert len(read("mine", tmp_path / "data")["train"]) == 1


def test_hostile_texts(tmp_path):
    """Characters that become 18 of another form; one address for all; Windows line ends; fields that build uses."""
    texts = [
        "\ufdfa" * 100_000,
        *(f"Text number {n} has words of its own: {n * 7919}.\r\nAnd a line." for n in range(50)),
    ]
    fields = {"url": "https://example.com/", "cluster": "same", "split": "validation", "language": "x" * 300}
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text} | fields) for text in texts))
    build("text", tmp_path, f"--input={tmp_path}/in.jsonl", "--name=mine", "--together=cluster", "--validation=0.5")
    splits = read("mine", tmp_path)
    assert sum(map(len, splits.values())) >= 50 and len(splits["validation"]) < 45 > len(splits["train"])
    assert not any("\r" in record["text"] or "xxx" in record["language"] for s in splits.values() for record in s)


def test_nothing_left_is_no_dataset(tmp_path):
    (tmp_path / "empty.txt").touch()
    process = start("text", tmp_path / "data", f"--input={tmp_path}/empty.txt", "--name=mine")
    output, _ = process.communicate()
    assert process.returncode == 78 and "no document is left of 0 that were read; 1 no text" in output
    assert not list((tmp_path / "data").rglob("dataset_info.json"))
