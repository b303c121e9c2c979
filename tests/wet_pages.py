"""The real pages of shared/data/wet, and what published implementations made of them (golden/rules.json)."""

import functools
import hashlib
import json
import pathlib

import pytest
from fastwarc import ArchiveIterator, WarcRecordType

WET = pathlib.Path(__file__).parents[2] / "shared/data/wet"
GOLDEN = pathlib.Path(__file__).parent / "golden/rules.json"


@functools.cache
def pages() -> list[tuple[str, str]]:
    """(url, text) of all 1,200."""
    if not WET.is_dir():
        pytest.skip(f"real pages are missing: {WET}")
    found = []
    for path in sorted(WET.glob("*.warc.wet.gz")):
        with open(path, "rb") as file:
            for record in ArchiveIterator(file, record_types=WarcRecordType.conversion):
                found.append((record.headers["WARC-Target-URI"], record.reader.read().decode("utf-8", "replace")))
    assert len(found) == 1200
    return found


@functools.cache
def golden() -> dict[str, dict]:
    return json.loads(GOLDEN.read_text("utf-8"))["pages"]


def key(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def judged(rule: str) -> list[tuple[str, object]]:
    """The pages that the reference has judged by this rule: (text, what it said)."""
    return [(text, golden()[key(text)][rule]) for _, text in pages() if rule in golden().get(key(text), ())]


def line_of_a_page(line: str) -> str:
    """The line; the test fails unless it is one of a real page, where these are present."""
    if WET.is_dir():
        assert any(line in text for _, text in pages()), line
    return line
