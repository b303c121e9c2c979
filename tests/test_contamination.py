import collections
import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_duplicates import articles, by_id, page, read, run

from llm_jax.config import UserError
from llm_jax.corpus import contamination
from llm_jax.corpus.contamination import Decontaminate, FindMatches, Text, Uncommon, read_evaluation, write_index
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Group, Map

QUESTION = "Which of the two brothers, Abel or Cain, was the first to build a city in the land of Nod, and why?"
SHORT = "What is the capital city of Burkina Faso?"  # 8 words
TINY = "To be or not to be"


def steps(index, mask=False, common=10) -> list:
    return [
        Map("matches", "pages", FindMatches(index)),
        Group("uncommon", ("matches",), Uncommon(common), streams=True),
        Group("clean", ("pages", "uncommon"), Decontaminate(index, mask)),
    ]


def decontaminate(tmp_path, texts, documents, mask=False, common=10) -> tuple[dict[str, str], Stats]:
    """The texts that stay, by key."""
    index = write_index(str(tmp_path / "index"), texts, Stats())
    found, stats = run(steps(index, mask, common), pages=by_id(documents))
    return {document.key: document.text for document in read(found["clean"])}, stats


def evaluation(*texts: str, source: str = "eval.jsonl") -> list[Text]:
    return [Text(source, False, text) for text in texts]


def held_out(*texts: str) -> list[Text]:
    return [Text("validation", True, text) for text in texts]


def test_documents_with_the_text_of_an_evaluation_file_are_dropped_and_listed(tmp_path):
    documents = [
        page(
            "copy",
            "Quiz: WHICH of the two brothers - Abel or Cain - was the\nfirst to build a city in Nod? Answer: Cain.",
        ),
        page(
            "other words", "Which of the three brothers was the first to build a town in the land of Nod, and why not?"
        ),
        page("short", f"A quiz. {SHORT.lower()} Ouagadougou."),
        page("part of short", "the capital city of burkina faso is Ouagadougou, and it is what you think"),
        page("tiny", TINY),
    ]
    documents.append(page("whole", "Before. " + QUESTION + " After."))
    kept, stats = decontaminate(tmp_path, evaluation(QUESTION, SHORT, TINY), documents)
    assert set(kept) == {"other words", "part of short", "tiny"}
    assert stats.counts == {"contaminated/eval.jsonl": 3, "dropped/contaminated": 3}
    matched = {key: text for _, key, text in stats.examples["contaminated/eval.jsonl"]}
    assert matched["copy"] == "WHICH of the two brothers - Abel or Cain - was the\nfirst to build a city in"
    assert matched["whole"] == QUESTION and matched["short"] == SHORT.lower()


def test_masking_cuts_out_the_matches(tmp_path):
    text = f"Before — it all. “{QUESTION}” After.\n\n{SHORT} Ouagadougou. {QUESTION}"
    kept, stats = decontaminate(
        tmp_path, evaluation(QUESTION, SHORT), [page("a", text), page("b", QUESTION)], mask=True
    )
    assert kept == {"a": "Before — it all.\nAfter.\nOuagadougou."}
    assert stats.counts["dropped/contaminated"] == 1  # nothing is left of b
    assert stats.counts["changed/contaminated words cut out"] == 22 + 8 + 22


def test_masking_where_normalising_changes_lengths(tmp_path):
    strange = "İstanbul ﬁve … Straße ½ ´acute´ 漢字とか\u3099 e\u0301té ™ — \x1f ﷺ"
    text = f"{strange} {QUESTION.upper()} {strange}"
    kept, _ = decontaminate(tmp_path, evaluation(QUESTION), [page("a", text)], mask=True)
    assert kept == {"a": f"{strange}\n{strange}"}


def test_the_source_of_a_match_is_named(tmp_path):
    texts = evaluation(QUESTION, source="one.txt") + held_out(QUESTION, SHORT) + evaluation(SHORT, source="two.txt")
    _, stats = decontaminate(tmp_path, texts, [page("a", QUESTION), page("b", SHORT), page("c", QUESTION + SHORT)])
    # What an evaluation file has too is not put down to the split.
    assert stats.counts == {"contaminated/one.txt": 2, "contaminated/two.txt": 2, "dropped/contaminated": 3}


@pytest.mark.parametrize(("copies", "kept"), [(10, 0), (11, 11)])
def test_common_phrases_of_held_out_documents_are_ignored(tmp_path, copies, kept):
    notice = "By using this site you agree to the storing and handling of all your data by us and others."
    documents = [page(f"page {n}", f"Text {n}. {notice}") for n in range(copies)]
    found, stats = decontaminate(tmp_path, held_out(notice), documents)
    assert len(found) == kept
    assert bool(stats.counts["contamination/runs of held-out words ignored as common"]) == bool(kept)


def test_common_phrases_of_evaluation_files_count(tmp_path):
    documents = [page(f"page {n}", f"Text {n}. {QUESTION}") for n in range(40)]
    assert decontaminate(tmp_path, evaluation(QUESTION), documents)[0] == {}


def test_only_training_documents_are_looked_at(tmp_path):
    documents = [page(split, QUESTION) for split in ("train", "validation", "test")]
    for document in documents:
        document.extra["split"] = document.key
    assert set(decontaminate(tmp_path, held_out(QUESTION), documents)[0]) == {"validation", "test"}


def test_documents_that_share_an_id(tmp_path):
    index = write_index(str(tmp_path / "index"), evaluation(QUESTION), Stats())
    pages = [(b"8 bytes.", page(key, text).to_bytes()) for key, text in (("a", QUESTION), ("b", "Nothing."))]
    found, stats = run(steps(index), pages=pages)
    assert [document.key for document in read(found["clean"])] == ["b"]
    assert stats.counts == {"contaminated/eval.jsonl": 1, "dropped/contaminated": 1}


def reference(texts: list[str], documents: list[str]) -> list[bool]:
    """Whether each document shares 13 words on end with one of the texts, or holds all of a shorter one of 8 to 12."""

    def runs(text, length):
        words = re.findall(r"[^\W_]+", text.casefold())
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    wanted = collections.defaultdict(set)
    for text in texts:
        length = min(13, len(re.findall(r"[^\W_]+", text)))
        if length >= 8:
            wanted[length] |= runs(text, length)
    return [any(wanted[length] & runs(document, length) for length in wanted) for document in documents]


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=16), max_size=4),
    st.lists(st.lists(st.sampled_from("abc"), max_size=40), min_size=1, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_agrees_with_sets_of_words(tmp_path_factory, texts, documents):
    texts, documents = [" ".join(text) for text in texts], [" ".join(document) for document in documents]
    pages = [page(f"{n}", text or "-") for n, text in enumerate(documents)]
    kept, _ = decontaminate(tmp_path_factory.mktemp("index"), evaluation(*texts), pages)
    assert [f"{n}" not in kept for n in range(len(documents))] == reference(texts, documents)


def test_real_texts_with_planted_sentences(tmp_path):
    chance, texts = random.Random(7), articles()
    items, documents = texts[:80], texts[80:400]
    planted = {}
    for n in chance.sample(range(len(documents)), 60):
        words = chance.choice(items).split(" ")
        start = chance.randrange(len(words) - 25)
        planted[n] = " ".join(words[start : start + 25])
        half = len(documents[n]) // 2
        documents[n] = f"{documents[n][:half]} {planted[n]} {documents[n][half:]}"
    pages = [page(f"{n}", text) for n, text in enumerate(documents)]
    kept, _ = decontaminate(tmp_path, evaluation(*items), pages)
    expected = reference(items, documents)
    assert [f"{n}" not in kept for n in range(len(documents))] == expected
    assert all(expected[n] for n in planted) and sum(expected) < 70

    masked, _ = decontaminate(tmp_path, evaluation(*items), pages, mask=True)
    assert not any(reference(items, list(masked.values())))
    assert sum(map(len, masked.values())) > 0.97 * sum(
        len(text) for n, text in enumerate(documents) if n not in planted
    )


def test_index_larger_than_its_buffer(tmp_path, monkeypatch):
    texts = [*evaluation(*articles()[:40]), *held_out(*articles()[30:60])]
    whole = write_index(str(tmp_path / "whole"), texts, Stats())
    monkeypatch.setattr(contamination, "BUFFER_BYTES", 10_000)
    parts = write_index(str(tmp_path / "parts"), texts, Stats())
    assert whole.digest == parts.digest
    hashes = np.fromfile(tmp_path / "parts/hashes", "<u8")
    assert (np.diff(hashes) > 0).all() and len(hashes) > 5000
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["about.json", "hashes", "sources"]


def test_index_is_replaced_and_says_what_it_could_not_take(tmp_path):
    stats = Stats()
    first = write_index(str(tmp_path / "index"), evaluation(QUESTION), stats)
    second = write_index(str(tmp_path / "index"), evaluation(TINY, ""), stats)
    assert first.digest != second.digest
    assert stats.counts["contamination/eval.jsonl: items of fewer than 8 words, not looked for"] == 2
    found, _ = run(steps(second), pages=by_id([page("a", QUESTION)]))
    assert len(found["clean"]) == 1


def test_evaluation_files(tmp_path):
    (tmp_path / "a.txt").write_text("First.\nSecond.", "utf-8")
    (tmp_path / "b.jsonl").write_text(
        f"{json.dumps({'text': 'é', 'answer': 3})}\n\n{json.dumps({'text': 'x'})}\n", "utf-8"
    )
    text, lines = str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")
    assert list(read_evaluation(text)) == [Text(text, False, "First.\nSecond.")]
    assert list(read_evaluation(lines)) == [Text(lines, False, "é"), Text(lines, False, "x")]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"x", "kind"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', "line 2"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', "line 3"),
        ("a.jsonl", b"{\n", "line 1"),
        ("a.txt", b"abc\xff", "UTF-8"),
        ("missing.txt", None, "No such file"),
    ],
)
def test_bad_evaluation_files(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem) as error:
        list(read_evaluation(str(tmp_path / name)))
    assert name in str(error.value) and "\n" not in str(error.value)
