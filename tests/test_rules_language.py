"""Language identification on known lines, and against the same model on whole pages."""

import pickle
import socket

import pytest
from wet_pages import judged

from llm_jax.corpus.rules import Dropped
from llm_jax.corpus.rules.language import Language, identify


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("We appreciate your feedback. Fisher Scientific is always working to improve our content for you.", "en"),
        ("Der Vertrag wurde gestern\nin Berlin unterzeichnet, und niemand war überrascht.", "de"),
        ("Le traité a été signé hier à Paris,\r\net personne n'en fut surpris.", "fr"),
        ("Договор был подписан вчера в Москве, и никто не удивился.", "ru"),
        ("条约昨天在北京签署，没有人感到惊讶。", "zh"),
    ],
)
def test_known_lines(text, language):
    found, probability = identify(text)
    assert found == language and 0.65 < probability <= 1.0001
    assert Language(("xx", language))(text) == text
    assert Language(("xx",))(text) == Dropped("language: not wanted", f"{language} {probability:.2f}")
    assert Language()(text) == text


def test_what_is_no_language_is_not_clear():
    for text in ("12345 67890", " \n ", "\0"):
        assert Language()(text).rule == "language: not clear"


def test_needs_no_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "create_connection", None)
    from llm_jax.corpus.rules import language

    language._detector.cache_clear()
    language.identify.cache_clear()
    assert identify("The quick brown fox jumps over the lazy dog.")[0] == "en"
    assert pickle.loads(pickle.dumps(Language(("en",)))) == Language(("en",))


def test_real_pages_as_with_their_whole_text():
    """English by FineWeb's rule from 1,000 characters, and from all."""
    more = fewer = 0
    for text, (language, probability) in judged("language"):
        found = not isinstance(Language(("en",))(text), Dropped)
        expected = language == "en" and probability > 0.65
        more += found and not expected
        fewer += expected and not found
    assert (more, fewer) == (1, 0)
