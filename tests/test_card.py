"""The data card, read back by an HTML parser and checked against counts made here."""

import collections
import html.parser
import itertools
import json
import re

import pytest

from llm_jax.corpus import card
from llm_jax.corpus.dataset import Shard
from llm_jax.corpus.document import Document
from llm_jax.corpus.stats import Stats

EVIL = (
    "<script>alert('pwned')</script><img src=x onerror=alert(1)></blockquote></details></table><h1 id=evil>big</h1>"
    "<!-- ]]> --> &lt;b&gt; &amp; {{ 7 * 7 }} {% raw %} <svg/onload=alert(2)> javascript:alert(3) \"quoted\" 'so'"
)
EVIL_URL = "http://evil.example/\"'><script>alert(4)</script>"
VOID = {"meta", "br", "img", "link", "input", "hr", "rect", "base", "source", "area", "col", "embed", "track", "wbr"}


def facts(**changes) -> card.Facts:
    known = dict(
        title="A small crawl",
        name="small/en",
        version="1.0.0",
        description="For a test.",
        date="2026-11-22",
        command="llm-jax build common_crawl --input='*.wet.gz' --data_dir=data",
        versions={"llm_jax": "0.1"},
        inputs={"a.wet.gz": 1_500_000, "gs://bucket/b.wet.gz": None},
        stages={"read": "records", "clean": "all rules", "duplicates": "exact and near"},
        tokens="bytes / 4.",
        licences={"Common Crawl": "terms of use"},
        splits={"train": [Shard(400, 4000), Shard(300, 3000)], "validation": [Shard(20, 200)]},
        features={"text": "never empty"},
        reasons={"c4: fewer than 5 sentences": "Raffel et al. 2020, section 2.2"},
        evaluation={"test.txt": "a test set", "other.txt": ""},
        contamination="By 13-grams.",
    )
    return card.Facts(**known | changes)


def counted() -> Stats:
    stats = Stats()
    for stage, (documents, size, tokens) in {
        "read": (1200, 12_000_000, 3_000_000),
        "clean": (900, 9_000_000, 2_250_000),
        "duplicates": (720, 7_200_000, 1_800_000),
    }.items():
        stats.count(f"stage/{stage}/documents", documents)
        stats.count(f"stage/{stage}/bytes", size)
        stats.count(f"stage/{stage}/tokens", tokens)
    for name, count in {
        "skipped/truncated gzip member": 3,
        "dropped/c4: fewer than 5 sentences": 299,
        "dropped/c4: <b>bold</b>": 1,
        "dropped/duplicate: near": 180,
        "changed/personal: e-mail replaced": 12,
        "language/en": 700,
        "language/de": 20,
        "domains": 2,
        "domain/example.org": 600,
        "domain/example.com": 120,
        "cluster/near/2": 100,
        "cluster/near/3": 20,
        "cluster/near/41": 1,
        "contaminated/test.txt": 7,
        "contaminated/unforeseen.txt": 2,
        "split/train": 700,
    }.items():
        stats.count(name, count)
    for k, count in {8: 20, 9: 400, 12: 300}.items():
        stats.count(f"length/{k}", count)
    stats.example("dropped/c4: fewer than 5 sentences", EVIL_URL, EVIL)
    for i in range(30):
        stats.example("dropped/duplicate: near", f"http://example.org/{i}", f"copy {i}")
    stats.example("cluster/near/41", "http://example.org/41", "cookies")
    stats.example("cluster/near/2", "http://example.org/2", "two")
    stats.example("skipped/truncated gzip member", "a.wet.gz:record 17", "\ud800 \x00 \u202eturned round")
    return stats


class Page(html.parser.HTMLParser):
    """Elements, attributes and texts of a page; fails where an end tag does not fit."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.text, self.rows, self.style = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, head: str) -> list[str]:
        (row,) = [row for row in self.rows if row and row[0].strip() == head]
        return [cell.strip() for cell in row[1:] if cell.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    card.write_card(str(folder), facts(), counted())
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "card.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads((folder / "card.json").read_text("utf-8"))


def test_the_funnel(page, data):
    stages = [
        (row["stage"], row["documents_in"], row["documents"], row["bytes"], row["tokens"]) for row in data["stages"]
    ]
    assert stages == [
        ("read", 1200, 1200, 12_000_000, 3_000_000),
        ("clean", 1200, 900, 9_000_000, 2_250_000),
        ("duplicates", 900, 720, 7_200_000, 1_800_000),
    ]
    assert page.row("clean all rules") == ["900", "75.0%", "9 MB", "2,250,000"]
    assert data["documents"] == {"read": 1200, "dropped": 480, "kept": 720, "unaccounted": 0}
    assert "not accounted for" not in "".join(page.text)
    figures = [text.strip() for text in page.text if text.strip()]
    for name, value in {"Documents": "720", "Text": "7.2 MB", "Tokens": "1.8 million"}.items():
        assert figures[figures.index(name) + 1] == value


def test_a_sum_that_is_off_is_said(tmp_path):
    stats = counted()
    stats.count("dropped/duplicate: near", -5)
    card.write_card(str(tmp_path), facts(), stats)
    assert "5 documents are not accounted for" in (tmp_path / "card.html").read_text()


def test_reasons_with_their_examples(page, data):
    assert [(row["reason"], row["count"]) for row in data["dropped"]] == [
        ("c4: fewer than 5 sentences", 299),
        ("duplicate: near", 180),
        ("c4: <b>bold</b>", 1),
    ]
    assert data["dropped"][1]["share"] == 0.15
    assert page.row("duplicate: near") == ["180", "15.0%"]
    assert page.row("c4: <b>bold</b>") == ["1", "0.08%"]
    assert page.row("personal: e-mail replaced") == ["12"]
    assert len(data["dropped"][1]["examples"]) == 20
    texts = collections.Counter(page.text)
    assert sum(texts[f"copy {i}"] for i in range(30)) == 20
    assert "Raffel et al. 2020, section 2.2" in page.text


def test_distributions(page, data):
    assert [(row["from"], row["to"], row["documents"]) for row in data["lengths"]] == [
        (256, 511, 20),
        (512, 1023, 400),
        (1024, 2047, 0),
        (2048, 4095, 0),
        (4096, 8191, 300),
    ]
    assert page.row("512 – 1,023") == ["400", "55.6%"]
    assert page.row("de") == ["20", "2.8%"]
    assert page.row("example.org") == ["600", "83.3%"]
    assert page.row("train") == ["700", "7 kB", "2"]
    assert page.row("gs://bucket/b.wet.gz") == ["unknown"]
    assert page.row("split/train") == ["700"]  # counted under a name that the card does not know


def test_duplicates_and_contamination(page, data):
    exact, near = data["clusters"]
    assert (exact["clusters"], near["clusters"]) == (0, 121)
    assert near["documents"] == 100 * 2 + 20 * 3 + 41 and near["removed"] == near["documents"] - 121
    assert [(row["from"], row["to"], row["clusters"]) for row in near["sizes"]] == [
        (2, 2, 100),
        (3, 4, 20),
        (33, 64, 1),
    ]
    assert [(row["size"], row["key"]) for row in near["largest"]] == [
        (41, "http://example.org/41"),
        (2, "http://example.org/2"),
    ]
    assert page.row("33 – 64") == ["1", "0.83%"]
    found = {row["file"]: row["documents"] for row in data["contaminated"]}
    assert found == {"test.txt": 7, "other.txt": 0, "unforeseen.txt": 2}
    assert page.row("test.txt") == ["7"]


def test_hostile_texts_stay_texts(page, data):
    assert EVIL in page.text and EVIL_URL in page.text  # as parsed: exactly what was crawled
    assert data["dropped"][0]["examples"] == [{"key": EVIL_URL, "text": EVIL}]
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base"}
    assert [tag for tag, _ in page.elements].count("h1") == 1
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")] and "style" not in names and "src" not in names


def test_characters_that_no_page_may_hold(folder, page, data):
    (example,) = data["skipped"][0]["examples"]
    assert example["text"] == "\ud800 \x00 \u202eturned round"  # card.json has them as escapes
    assert "\ufffd \ufffd \ufffdturned round" in page.text
    text = (folder / "card.html").read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)


def test_it_needs_nothing_but_itself(page):
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for _, attributes in page.elements if "href" in attributes]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    assert not re.search(r"url\(|@import|http|\\", page.style)


def test_structure_for_those_who_do_not_see_it(page):
    assert ("html", {"lang": "en"}) in page.elements
    for tag, attributes in page.elements:
        if tag == "svg":  # the numbers stand beside it
            assert attributes["aria-hidden"] == "true"
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_contrast(page, scheme):
    """WCAG 2.2, 1.4.3 (text, 4.5) and 1.4.11 (bars, 3; on paper too)."""
    light, dark, paper = re.findall(r":root \{(.*?)\}", page.style, re.DOTALL)
    block = {"light": light, "dark": dark, "print": paper}[scheme]
    colours = {name: luminance(value) for name, value in re.findall(r"--(\w+): (#\w+);", block)}
    assert len(colours) == 9

    def contrast(a: str, b: str) -> float:
        low, high = sorted((colours[a], colours[b]))
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "sheet", "quote"):
        for ink in ("text", "soft", "accent", "warn"):
            assert contrast(ink, ground) >= 4.5, (ink, ground)
    assert contrast("bar", "sheet") >= 3 and contrast("bar", "quote") >= 3


def test_bytes_do_not_depend_on_the_order_of_counting(folder, tmp_path):
    whole, parts = counted(), [Stats(), Stats()]
    for i, (name, count) in enumerate(whole.counts.items()):
        parts[i % 2].count(name, count)
    for i, (name, examples) in enumerate(whole.examples.items()):
        for _, key, text in reversed(examples):
            parts[i % 2].example(name, key, text)
    stats = [Stats.from_json(part.to_json()) for part in reversed(parts)]
    card.write_card(str(tmp_path), facts(), Stats().merge(stats))
    for name in ("card.html", "card.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_counted_at_all(tmp_path):
    card.write_card(str(tmp_path), facts(evaluation={}, contamination="", reasons={}, inputs={}), Stats())
    text = "".join(Page((tmp_path / "card.html").read_text("utf-8")).text)
    assert "Of 0 documents read, 0 were dropped and 0 kept" in text
    assert "was not compared with any evaluation text" in text


def test_large_numbers(tmp_path):
    stats = Stats()
    for stage in ("read", "clean", "duplicates"):
        stats.count(f"stage/{stage}/documents", 1_234_567_890)
        stats.count(f"stage/{stage}/bytes", 5_432_100_000_000)
        stats.count(f"stage/{stage}/tokens", 1_300_000_000_000)
    for i in range(300):
        stats.count(f"language/l{i:03d}", 1000 - i)
        stats.count(f"domain/d{i:03d}.example", 1000 - i)
    inputs = {f"part-{i:05d}.wet.gz": 100_000_000 for i in range(90_000)}
    card.write_card(str(tmp_path), facts(inputs=inputs), stats)
    page = Page((tmp_path / "card.html").read_text("utf-8"))
    for text in ("1.23 billion", "5.43 TB", "1.3 trillion"):
        assert text in page.text
    assert page.row("280 others") == [f"{sum(1000 - i for i in range(20, 300)):,}", "0.02%"]
    assert (tmp_path / "card.html").stat().st_size < 200_000
    data = json.loads((tmp_path / "card.json").read_text())
    assert len(data["inputs"]) == 90_000 and len(data["domains"]["largest"]) == card.TOP_DOMAINS


def test_what_is_counted_of_a_document():
    stats = Stats()
    for text, language in [("x" * 255, "en"), ("x" * 256, "en"), ("x" * 511, "de"), ("é", "")]:
        card.count_document(Document("k", text, language=language, extra={"licence": "CC0"}), stats)
    assert stats.counts == {
        "length/7": 1,
        "length/8": 2,
        "length/0": 1,
        "language/en": 2,
        "language/de": 1,
        "language/unknown": 1,
        "licence/CC0": 4,
    }


def test_the_largest_sites_are_counted_exactly(monkeypatch):
    monkeypatch.setattr(card, "TOP_DOMAINS", 3)
    number = {"a.example": 5, "b.co.uk": 300, "c.example": 7, "d.example": 5, "e.example": 1}
    urls = [f"https://www{i % 3}.{name}/{i}" for name, count in number.items() for i in range(count)] + [""]
    stats = Stats()

    def group(pairs, function):
        pairs = sorted(pairs)
        for key, values in itertools.groupby(pairs, lambda pair: pair[0]):
            yield from function(key, (value for _, value in values), stats=stats)

    documents = [Document(str(i), "text", url=url).to_bytes() for i, url in enumerate(urls)]
    sites = [pair for value in documents for pair in card.documents_sites(b"", value, stats)]
    assert list(group(group(sites, card.site_size), card.count_largest_sites)) == []
    assert stats.counts == {"domains": 5, "domain/b.co.uk": 300, "domain/c.example": 7, "domain/a.example": 5}
