"""FineWeb's rules on lines counted by hand, and against datatrove on real pages."""

import pytest
from wet_pages import judged, line_of_a_page

from llm_jax.corpus.rules import Dropped
from llm_jax.corpus.rules.fineweb import FineWeb

MENU = "• Now Available: Hydranal, Chromasolv, and More from Honeywell"
SENTENCE = "This item is a non-standard voltage; please ensure you are ordering the correct product."


def lines(count: int, line: str) -> list[str]:
    return [f"{number} {line}" for number in range(count)]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ([*lines(7, MENU), SENTENCE, "", "  "], None),  # 1 of 8 is 0.125
        ([*lines(8, MENU), SENTENCE], "too few lines end in punctuation"),
        (["只有一句话而已，不过这一句话稍微长一点，所以不算短行。"] + ["真的很长的一行文字" * 4], None),
        ([*lines(2, "Short line."), SENTENCE], None),  # 2 of 3 is 0.667
        ([*lines(3, "Short line."), SENTENCE], "too many short lines"),
        ([*lines(3, SENTENCE), SENTENCE, SENTENCE], "characters in duplicate lines"),
        (["unbelievable-incomprehensible.", "incomprehensible/unbelievable!!"], None),
        (
            ["incomprehensibleunbelievable000."] + [f"incomprehensibleunbelievable{i:03}" for i in range(3)],
            "too many l",
        ),
        (["", " "], "empty"),
    ],
)
def test_rules(text, rule):
    line_of_a_page(MENU)
    line_of_a_page(SENTENCE)
    text = "\n".join(text)
    result = FineWeb()(text)
    assert result == text if rule is None else result.rule.startswith(f"fineweb: {rule}"), result


DATATROVE = {
    "": None,
    "line_punct_ratio": "fineweb: too few lines end in punctuation",
    "short_line_ratio": "fineweb: too many short lines",
    "char_dup_ratio": "fineweb: characters in duplicate lines",
}


def test_real_pages_as_datatrove():
    for text, expected in judged("fineweb"):
        result = FineWeb()(text)
        assert (result.rule if isinstance(result, Dropped) else None) == DATATROVE[expected]
