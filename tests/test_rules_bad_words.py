"""Bad words against the expression C4 searches with."""

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wet_pages import pages

from llm_jax.config import UserError
from llm_jax.corpus.rules import Dropped
from llm_jax.corpus.rules.bad_words import BadWords

WORDS = ("arse", "s&m", "two words", "words in line", "crème", "🖕", "a.s.s", "x_y")


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("What an ARSE!", True),
        ("A parsed line of arsenic", False),
        ("arse_", False),
        ("Bits of s&m, they say", True),
        ("ums&ms", False),
        ("These are two words.", True),
        ("These are two  words, two-words.", False),
        ("une Crème brûlée", True),
        ("cre\u0300me", False),
        ("so🖕there", True),
        ("the class a.s.s.", True),
    ],
)
def test_by_hand(text, dropped):
    assert isinstance(BadWords(WORDS)(text), Dropped) == dropped


def test_scripts_without_spaces():
    rule = BadWords(("坏话", "โกง", "sm"))
    assert rule("他说坏话了") == Dropped("bad words", "坏话")
    assert rule("คนโกงกัน") == Dropped("bad words", "โกง")
    assert rule("a small thing") == "a small thing"


def test_read(tmp_path):
    path = tmp_path / "words"
    path.write_text("Two Words \n\narse\n性\n", "utf-8")
    rule = BadWords.read(str(path))
    assert rule == BadWords(("arse", "two words"))
    rule("fills the caches")
    assert pickle.loads(pickle.dumps(rule))("an arse").rule == "bad words"
    for bad in (b"", b"\xff\xfe"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="bad_words="):
            BadWords.read(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        BadWords.read(str(tmp_path / "none"))


def c4_finds(words: tuple[str, ...], text: str) -> bool:
    return bool(re.search(rf"(?:\W|^)({'|'.join(map(re.escape, words))})(?:\W|$)", text.lower()))


@given(st.lists(st.sampled_from([*WORDS[:5], *WORDS[6:], " ", " ", "_", "-", "e", "s", "\n", "É"]), max_size=12))
def test_as_c4(parts):
    words, text = WORDS[:5] + WORDS[6:], "".join(parts)
    assert isinstance(BadWords(words)(text), Dropped) == c4_finds(words, text)


def test_real_pages_as_c4():
    words = ("terms of use", "cookie policy", "javascript", "sign in", "e-mail", "new york", "covid-19", "hunger")
    found = [isinstance(BadWords(words)(text), Dropped) for _, text in pages()[::6]]
    assert found == [c4_finds(words, text) for _, text in pages()[::6]]
    assert 10 < sum(found) < 190
