"""C4's rules on real lines, and against tensorflow_datasets' clean_page with punkt on real pages."""

import pickle

import pytest
from wet_pages import judged, key, line_of_a_page

from llm_jax.corpus.rules import Dropped
from llm_jax.corpus.rules.c4 import C4, count_sentences

GOOD = [
    "This item is a non-standard voltage; please ensure you are ordering the correct product.",
    "Your feedback has been submitted. Fisher Scientific is always working to improve our content for you. "
    "We appreciate your feedback.",
    '"That\'s a huge part of the voters," Chisholm said. "Especially in this community."',
]


def clean(*lines: str) -> str | Dropped:
    return C4()("\n".join([*GOOD, *lines]))


def test_good_lines_stay():
    for line in GOOD:
        line_of_a_page(line)
    assert clean() == "\n".join(GOOD)
    assert pickle.loads(pickle.dumps(C4())) == C4()


@pytest.mark.parametrize(
    "line",
    [
        "• Now Available: Hydranal, Chromasolv, and More from Honeywell",  # no mark
        "Have you ever noticed 'The Hunger Games' Mockingjay looks EXACTLY like...",  # an ellipsis is none
        "Depth (English)\t\t    14 in.",  # 4 words
        "By using the above code and embedding this image, you consent to Getty Images' Terms of Use.",
        "This website uses cookies. By continuing to use this website you are giving consent to cookies being used. "
        "Visit our Privacy and Cookie Policy.",
        "Use of this Web site constitutes acceptance of our Terms and Conditions of Use and Privacy Policy.",
    ],
)
def test_real_lines_that_go(line):
    assert clean(line_of_a_page(line)) == "\n".join(GOOD)


@pytest.mark.parametrize(
    "line",
    [
        "You must have JavaScript enabled to view this page.",
        f"A word of {'a' * 1001} characters is none at all.",
        "A citation at the end hides the mark. [1]",  # leaves a space, as in C4
    ],
)
def test_other_lines_that_go(line):
    assert clean(line) == "\n".join(GOOD)


def test_citations_are_taken_out():
    line = line_of_a_page(
        "Used it put out the fire on Hagrid's hut after Thorfinn Rowle had set it on fire, "
        "during the Battle of the Astronomy Tower.[9]"
    )
    assert clean(line) == "\n".join([*GOOD, line.removesuffix("[9]")])
    assert clean("One[edit] two[citation needed] three[] four five.").endswith("One two three four five.")


def test_pages_that_go():
    assert clean(line_of_a_page("Welcome back, {* welcomeName *}!")).rule == "c4: curly bracket"
    assert clean("Hello {* welcomeName *}!") == "\n".join(GOOD)  # only 4 words: not looked at
    assert clean("Here stands Lorem Ipsum for the text.").rule == "c4: lorem ipsum"
    assert C4()("Menu\nHome\n").rule == "c4: no line left"
    assert C4()(GOOD[0]) == Dropped("c4: fewer than 3 sentences", "1 sentences")
    assert C4()("A sentence with five words. " * 10_000).rule == "c4: page too long"
    assert C4()(C4(end_marks=(), min_sentences=1)("Five words and no mark")).rule == "c4: no line left"


def test_sentences():
    assert count_sentences(GOOD[1], 9) == 3
    assert count_sentences(GOOD[1], 2) == 2
    assert count_sentences("Mr. J. Smith of the U.S. Army vs. Dr. No... in a film.", 9) == 1
    assert count_sentences('Really?! Yes. "No!" (He left.) 3.5 is a number.', 9) == 5
    assert count_sentences("  ", 9) == 0
    assert C4().enough_sentences("One.\nTwo.\nThree.") == "One.\nTwo.\nThree."
    assert C4().enough_sentences("One.\nTwo.").rule == "c4: fewer than 3 sentences"


def test_real_pages_as_clean_page():
    """The same pages and the same texts, with our sentences for punkt's."""
    for text, expected in judged("c4"):
        result = C4()(text)
        assert (None if isinstance(result, Dropped) else key(result)) == expected
