"""Words by vectors against the same words by a regular expression."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wet_pages import pages

from llm_jax.corpus.rules.words import LETTER, PLAIN, hash_of, hashes_of_runs, words

ONE_LETTER = r"[^\W\d_]"
WORD = re.compile(
    r"['’]?\w+(?:[.,:@&\xad]\w+|[-–/]\d\w*)*"
    rf"(?:(?:(?<=[^\w'’]{ONE_LETTER})|(?<=\A{ONE_LETTER}))\.(?!\w)\.*)?|\.+|-+|[^\w\s]"
)


def assert_same(text: str) -> None:
    expected, found = WORD.findall(text), words(text)
    assert found.lengths.tolist() == [len(word) for word in expected]
    assert found.hashes.tolist() == [hash_of(word) for word in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('He said: "I don\'t know..."', ["He", "said", ":", '"', "I", "don", "'t", "know", "...", '"']),
        ("well-known COVID-19, 1,000.5 km/h", ["well", "-", "known", "COVID-19", ",", "1,000.5", "km", "/", "h"]),
        ("In the U.S. at 10:30 on 10/12/2014.", ["In", "the", "U.S.", "at", "10:30", "on", "10/12/2014", "."]),
        ("a@b.org  •\t中文。ok--yes", ["a@b.org", "•", "中文", "。", "ok", "--", "yes"]),
        (" \n", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text).hashes.tolist() == [hash_of(word) for word in expected]


def test_kinds():
    kinds = words("Word 12 x1 % _ é ... 中文。").kinds
    assert [bool(kind & LETTER) for kind in kinds] == [True, False, True, False, False, True, False, True, False]
    assert [bool(kind & PLAIN) for kind in kinds] == [True, True, True, False, False, True, False, True, False]


@given(st.text(alphabet="aUé1_.,:@-–/'’ \n中!\U0001f600\U000e0001", max_size=60))
def test_words_as_by_regular_expression(text):
    assert_same(text)


@given(st.text(max_size=60))
def test_runs_as_by_regular_expression(text):
    assert hashes_of_runs(text).tolist() == [hash_of(run) for run in re.findall(r"\w+", text)]


def test_real_pages_as_by_regular_expression():
    for _, text in pages()[::16]:
        assert_same(text)


def test_long_texts_have_the_same_hashes():
    text = "some words " * 30_000
    assert np.array_equal(words(text).hashes, np.tile([hash_of("some"), hash_of("words")], 30_000))
