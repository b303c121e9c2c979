import collections
import functools
import itertools
import json
import pathlib
import random
import re
import unicodedata

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from llm_jax.corpus import duplicates, engine, hashed_words
from llm_jax.corpus.document import Document
from llm_jax.corpus.duplicates import MinHash, document_id, near_duplicates
from llm_jax.corpus.hashed_words import ngram_hashes, word_hashes
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Group, Map, Read

WIKIPEDIA = pathlib.Path(__file__).parents[2] / "shared/data/tfds/wikipedia/20230601.en/1.0.0"


def run(steps, **collections_by_name) -> tuple[dict, Stats]:
    """What the steps make of the collections, lists of pairs, and what they count. The engine's contract in a dict."""
    found, stats = dict(collections_by_name), Stats()
    for step in steps:
        pairs = found[step.name] = []
        if isinstance(step, Map):
            for key, value in found[step.source]:
                pairs += step.function(key, value, stats)
        else:
            keys = sorted({key for source in step.sources for key, _ in found[source]})
            groups = [collections.defaultdict(list) for _ in step.sources]
            for source, group in zip(step.sources, groups, strict=True):
                for key, value in sorted(found[source]):
                    group[key].append(value)
            for key in keys:
                values = [group[key] for group in groups]
                pairs += step.function(key, *(map(iter, values) if step.streams else values), stats=stats)
    return found, stats


def by_id(documents, priority=duplicates.one_priority) -> list:
    return [(document_id(document, priority), document.to_bytes()) for document in documents]


def read(pairs) -> list[Document]:
    return [Document.from_bytes(value) for _, value in pairs]


def keys(pairs) -> list[str]:
    return sorted(document.key for document in read(pairs))


@functools.cache
def articles() -> list[str]:
    """Beginnings of 1100 real articles, 100 to 400 words each."""
    if not WIKIPEDIA.exists():
        pytest.skip("needs the articles in ../shared/data/tfds/wikipedia")
    texts, chance = [], random.Random(5)
    for path in sorted(WIKIPEDIA.glob("*.array_record*")):
        for record in ArrayRecordReader(str(path)).read(0, 500):
            text = tf_example_pb2.Example.FromString(record).features.feature["text"].bytes_list.value[0].decode()
            words = text.split(" ")
            if len(words) > 100:
                texts.append(" ".join(words[: chance.randrange(100, 400)]))
        if len(texts) >= 1100:
            break
    return texts[:1100]


# Words


def words(text: str) -> list[str]:
    """As word_hashes says it, character by character."""
    spaced = ""
    for character in unicodedata.normalize("NFKC", text):
        known = ord(character) <= hashed_words.LAST_LETTER and unicodedata.category(character)[0] in "LMN"
        own = any(first <= ord(character) <= last for first, last in hashed_words.OWN_WORD)
        folded = character.casefold() if len(character.casefold()) == 1 else character.lower()[0]
        spaced += f" {folded} " if known and own else folded if known else " "
    return [word for word in spaced.split(" ") if word]


PIECES = st.sampled_from(
    [
        "a",
        "B",
        "é",
        "e\u0301",
        "ﬁ",
        "…",
        "™",
        "ß",
        "İ",
        "Σ",
        "ς",
        "１",
        "½",
        " ",
        "\n",
        "\u00a0",
        "-",
        "_",
        "'",
        "“",
        "漢",
        "字",
    ]
    + [
        "か\u3099",
        "が",
        "ไทย",
        "각",
        "\u1100\u1161\u11a8",
        "हिन्दी",
        "\u00b4",
        "\u200c",
        "\ufe0f",
        "❤",
        "\ud800",
        "𝔘",
        "\U000e0101",
    ]
)


@given(st.lists(st.one_of(PIECES, st.characters()), max_size=30))
@settings(max_examples=300, deadline=None)
def test_word_hashes_follow_the_words(pieces):
    text = "".join(pieces)
    hashes, expected = word_hashes(text).tolist(), words(text)
    assert len(hashes) == len(expected)
    assert len(set(zip(hashes, expected, strict=True))) == len(set(hashes)) == len(set(expected))


def test_word_hashes_do_not_depend_on_the_neighbours():
    # One character that needs its neighbours, and the whole text takes another path.
    text = "½Straße, naïve “Æsop” ＡＢＣ 漢字 ไทย no_1 Ö don't"
    plain = word_hashes(text.replace("½", "1 2"))
    assert (word_hashes(text)[2:] == plain[2:]).all()
    assert (word_hashes("STRAẞE ΟΔΟΣ") == word_hashes("straße οδος")).all()
    assert word_hashes("  …\n—!").tolist() == [] and word_hashes("").tolist() == []


def test_word_hashes_of_long_words():
    one = "ab" * 5000
    assert len({word_hashes(text)[0] for text in (one, one[:-1], one[:-2] + "ba", "ba" + one[2:])}) == 4


def test_long_texts_are_looked_at_in_pieces(monkeypatch):
    texts = ["\n".join(articles()[:8]), "a  b c" * 5, "é" * 250 + " x", "漢字" * 300]
    whole = [word_hashes(text).tolist() for text in texts]
    monkeypatch.setattr("llm_jax.corpus.hashed_words.PIECE", 100)
    assert word_hashes(texts[0]).tolist() == whole[0] and word_hashes(texts[1]).tolist() == whole[1]
    assert word_hashes(texts[3]).tolist() == whole[3]
    # A longer word is cut from its start on, wherever this lies.
    assert word_hashes(texts[2]).tolist() == word_hashes("é" * 100 + " " + "é" * 100 + " " + "é" * 50 + " x").tolist()
    assert word_hashes("y y " + texts[2]).tolist()[2:] == word_hashes(texts[2]).tolist()


def test_no_two_words_of_the_articles_share_a_hash():
    found = {}
    for text in articles()[:250]:
        for word, value in zip(words(text), word_hashes(text).tolist(), strict=True):
            assert found.setdefault(value, word) == word
    assert len(found) > 8_000


def test_ngram_hashes_follow_the_ngrams():
    text = "the cat and the dog and the cat and the bird and the dog and the cat and the bird"
    lengths, seen = [1, 2, 5, 13, 20], {}
    for length, hashes in zip(lengths, ngram_hashes(word_hashes(text), lengths), strict=True):
        expected = [tuple(words(text)[i : i + length]) for i in range(len(words(text)) - length + 1)]
        assert len(hashes) == len(expected)
        seen |= dict(zip(hashes.tolist(), expected, strict=True))
        assert {seen[value] for value in hashes.tolist()} == set(expected)
        assert (ngram_hashes(word_hashes(text), [length])[0] == hashes).all()
    assert len(seen) == len(set(seen.values()))


def test_known_hashes():
    """Of another Python or machine they must be the same: inputs of one build may be read by several."""
    assert word_hashes("The cat").tolist() == [0x9227B5F61D099200, 0x7BF0FC6072032E6B]
    assert document_id(Document(key="example.com/a", text="x")).hex() == "0ab82437ddb96fed"
    assert MinHash(bands=2, rows=4).signature("one two three four five six seven").hex() == "05b6f2f544d7cbc4"


# Copies of a URL, and equal texts


def page(key: str, text: str, url: str = "", timestamp: str = "") -> Document:
    return Document(key=key, text=text, url=url, timestamp=timestamp)


def test_newest_copy_of_a_url():
    copies = [
        page("a.com", "first", "http://a.com/", "2018-01-01T00:00:00Z"),
        page("a.com", "newest", "http://a.com", "2020-01-01T00:00:00Z"),
        page("a.com", "later", "http://a.com/", "2019-06-01T00:00:00Z"),
        page("b.com", "alone", "http://b.com", "2001-01-01T00:00:00Z"),
        page("file:1", "same text", "", "2001-01-01T00:00:00Z"),
        page("file:2", "same text", "", "2001-01-01T00:00:00Z"),
    ]
    steps = [
        Map("urls", "pages", duplicates.by_key),
        Group("newest", ("urls",), duplicates.KeepNewest(), streams=True),
    ]
    results = set()
    for order in itertools.permutations(copies[:4]):
        found, stats = run(steps, pages=[(b"", copy.to_bytes()) for copy in (*order, *copies[4:])])
        assert sorted(document.text for document in read(found["newest"])) == [
            "alone",
            "newest",
            "same text",
            "same text",
        ]
        assert stats.counts == {"dropped/older copy": 2}
        results.add(str(sorted(found["newest"])) + stats.to_json())
    assert len(results) == 1
    assert all(key == document_id(Document.from_bytes(value)) for key, value in found["newest"])


def wikipedia_first(document: Document) -> int:
    return 0 if document.key.startswith("wikipedia") else 1


def test_equal_texts_across_sources():
    web = [page("x.com", "The CAT sat,\n\non  the mat!"), page("y.com", "The cat sat on a mat"), page("z.com", "!!!")]
    wiki = [
        page("wikipedia:en:1", "the cat sat on the mat"),
        page("wikipedia:en:2", "???"),
        page("wikipedia:en:3", "!!!"),
    ]
    steps = [
        Map("web-texts", "web", duplicates.by_text),
        Map("wiki-texts", "wiki", duplicates.by_text),
        Group("one", ("web-texts", "wiki-texts"), duplicates.KeepOne(wikipedia_first), streams=True),
    ]
    found, stats = run(
        steps,
        web=[(b"", document.to_bytes()) for document in web],
        wiki=[(b"", document.to_bytes()) for document in wiki],
    )
    assert keys(found["one"]) == ["wikipedia:en:1", "wikipedia:en:2", "wikipedia:en:3", "y.com"]
    assert stats.counts == {"dropped/exact duplicate": 2, "cluster/exact/2": 2}
    assert {example[1] for example in stats.examples["dropped/exact duplicate"]} == {"x.com", "z.com"}


def test_lowest_id_is_kept_whatever_the_order():
    copies = [page(f"page {n}", "one text") for n in range(40)]
    step = Group("one", ("texts",), duplicates.KeepOne(), streams=True)
    for seed in range(3):
        random.Random(seed).shuffle(copies)
        found, _ = run([step], texts=[(b"", copy.to_bytes()) for copy in copies])
        assert keys(found["one"]) == [min(copies, key=document_id).key]


def test_ids():
    documents = [page(f"page {n}", "x") for n in range(5000)]
    ids = [document_id(document) for document in documents]
    assert len(set(ids)) == 5000 and all(len(number) == 8 for number in ids)
    assert max(ids) < document_id(documents[0], lambda document: 1)
    with pytest.raises(AssertionError, match="16"):
        document_id(documents[0], lambda document: 16)


# Lines

LINES = [
    Map("lines", "pages", duplicates.lines),
    Group("repeated", ("lines",), duplicates.repeated_lines, streams=True),
    Group("unique", ("pages", "repeated"), duplicates.drop_lines),
]


def reference_unique_lines(documents: list[Document]) -> dict[str, str]:
    """Each line stays in the document with the lowest id, once, where it is first."""
    seen, texts = set(), {}
    for document in sorted(documents, key=document_id):
        kept = []
        for line in document.text.split("\n"):
            if not line.strip() or line.strip().lower() not in seen:
                kept.append(line)
                seen.add(line.strip().lower())
        texts[document.key] = "\n".join(kept)
    return {key: text for key, text in texts.items() if text.strip()}


@given(st.lists(st.lists(st.sampled_from(["One.", " one. ", "Two.", "Three.", "ÉTÉ.", "été.", "", " "]), min_size=1)))
@settings(deadline=None)
def test_lines_stay_once(texts):
    documents = [page(f"page {n}", "\n".join(lines)) for n, lines in enumerate(texts) if "".join(lines).strip()]
    found, _ = run(LINES, pages=by_id(documents))
    assert {document.key: document.text for document in read(found["unique"])} == reference_unique_lines(documents)


def test_lines_of_real_texts():
    sentences = [text.replace(". ", ".\n") for text in articles()[:60]]
    chance = random.Random(1)
    mixed = ["\n".join(chance.choice(sentences).split("\n")[:5] + [sentence]) for sentence in sentences]
    documents = [page(f"page {n}", text) for n, text in enumerate(mixed)]
    found, stats = run(LINES, pages=by_id(documents))
    assert {document.key: document.text for document in read(found["unique"])} == reference_unique_lines(documents)
    gone = sum(text.count("\n") + 1 for text in mixed) - sum(d.text.count("\n") + 1 for d in read(found["unique"]))
    assert stats.counts["changed/line dropped: repeated"] - stats.counts["dropped/all lines repeated"] <= gone
    assert gone > 100


# Near-duplicates


def shingles(tokens: list[str]) -> set:
    plain = re.findall(r"[^\W_]+", " ".join(tokens).casefold())
    return set(zip(*(plain[i:] for i in range(5)), strict=False))


def edit(tokens: list[str], chance: random.Random, others: list[str]) -> None:
    """One small edit, of the kinds that copies of a page differ by."""
    place, kind = chance.randrange(len(tokens)), chance.randrange(6)
    if kind == 0:
        tokens[place] = chance.choice(chance.choice(others).split(" "))
    elif kind == 1 and len(tokens) > 20:
        del tokens[place]
    elif kind == 2:
        tokens.insert(place, chance.choice(["[1]", "(see below)", "2018", "very"]))
    elif kind == 3 and len(tokens) > 20:
        del tokens[-chance.randrange(1, 8) :]
    elif kind == 4:
        tokens += chance.choice(others).split(" ")[: chance.randrange(1, 8)]
    else:
        other = chance.randrange(len(tokens))
        tokens[place], tokens[other] = tokens[other], tokens[place]


def edit_down_to(text: str, similarity: float, chance: random.Random, others: list[str]) -> tuple[str, float]:
    """The text with about as many edits as leave it with that Jaccard similarity of 5-word runs to itself, and what
    this is, never less."""
    original, versions = shingles(text.split(" ")), [text.split(" ")]
    for _ in range(len(versions[0]) // 3):
        versions.append(list(versions[-1]))
        edit(versions[-1], chance, others)

    def value(tokens: list[str]) -> float:
        other = shingles(tokens)
        return len(original & other) / len(original | other)

    enough, too_many = 0, len(versions)
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        enough, too_many = (middle, too_many) if value(versions[middle]) >= similarity else (enough, middle)
    return " ".join(versions[enough]), value(versions[enough])


def resolve(documents: list[Document], options: MinHash, remove: bool = True) -> tuple[list[str], Stats, dict]:
    found, stats = run(near_duplicates("pages", "unique", options, remove), pages=by_id(documents))
    return keys(found["unique"]), stats, found


def test_finds_planted_duplicates_and_leaves_distinct_documents():
    chance, texts = random.Random(11), articles()
    originals, rest = texts[:600], texts[600:]
    documents = [page(f"original {n}", text) for n, text in enumerate(originals)]
    close, distinct = {}, {}
    for n, text in enumerate(originals):
        # Most of them where they are hardest to find.
        similarity = (0.8, 0.8, 0.8, 0.8, 0.9)[n % 5]
        edited, value = edit_down_to(text, similarity, chance, rest)
        assert value >= 0.8
        close[f"copy {n}"] = (edited, value)
    for n, text in enumerate(rest):
        # Related texts up to a similarity of 0.6, and unrelated ones.
        edited, value = edit_down_to(text, 0.55, chance, originals) if n % 3 == 0 else (text, 0)
        distinct[f"distinct {n}"] = text
        if 0 < value <= 0.6:
            distinct[f"related {n}"] = edited
    documents += [page(key, text) for key, (text, _) in close.items()]
    documents += [page(key, text) for key, text in distinct.items()]
    kept, stats, _ = resolve(documents, MinHash())

    found = [n for n in range(len(originals)) if f"original {n}" not in kept or f"copy {n}" not in kept]
    assert len(found) / len(originals) >= 0.95
    hardest = [n for n in range(len(originals)) if close[f"copy {n}"][1] < 0.825]
    assert len(hardest) > 200 and len(set(found) & set(hardest)) / len(hardest) >= 0.95
    assert len(set(distinct) - set(kept)) / len(distinct) < 0.01 and len(distinct) > 400
    # Of each pair one stays.
    assert all(f"original {n}" in kept or f"copy {n}" in kept for n in range(len(originals)))
    assert stats.counts["dropped/near-duplicate"] == len(documents) - len(kept)


def test_signature_estimates_the_true_similarity():
    chance, options, errors = random.Random(3), MinHash(), []
    for text in articles()[:120]:
        edited, value = edit_down_to(text, chance.uniform(0.3, 0.95), chance, articles()[120:140])
        errors.append(options.similarity(options.signature(text), options.signature(edited)) - value)
    # Standard deviation sqrt(J (1 - J) / 192), at most 0.036; of the mean a tenth of it.
    assert abs(np.mean(errors)) < 0.012
    assert 0.02 < np.std(errors) < 0.045
    # Unrelated texts: nothing but hashes whose last byte is the same.
    signatures = [options.signature(text) for text in articles()[:150]]
    unrelated = [options.similarity(one, other) for one, other in itertools.pairwise(signatures)]
    assert abs(np.mean(unrelated)) < 0.003


@pytest.mark.parametrize(("similarity", "expected"), [(0.8, 0.985), (0.7, 0.25), (0.6, 0.0002)])
def test_probability_of_being_found(similarity, expected):
    """The table in MinHash's docstring: from simulated signatures, with bytes that agree as hashes do."""
    options, generator, trials = MinHash(), np.random.default_rng(2), 20_000
    agree = generator.random((trials, options.bands, options.rows)) < similarity + (1 - similarity) / 256
    estimates = (agree.mean(axis=(1, 2)) - 1 / 256) / (1 - 1 / 256)
    found = agree.all(axis=2).any(axis=1) & (estimates >= options.threshold)
    assert abs(found.mean() - expected) < 0.01


def test_near_duplicates_across_sources_keep_the_better_source():
    text = articles()[0]
    web, wiki = page("x.com", text + " Share this page"), page("wikipedia:en:1", text)
    for other in range(20):  # whatever the hashes of the keys
        found, _ = run(
            near_duplicates("pages", "unique", MinHash()),
            pages=by_id([page(f"x{other}.com", web.text), wiki], wikipedia_first),
        )
        assert keys(found["unique"]) == ["wikipedia:en:1"]


def test_clusters_can_be_kept_together():
    texts = articles()[:3]
    documents = [page(f"{n} {m}", text + " more" * m) for n, text in enumerate(texts) for m in range(n + 1)]
    kept, stats, found = resolve(documents, MinHash(), remove=False)
    assert kept == sorted(document.key for document in documents)
    by_cluster = collections.defaultdict(set)
    for document in read(found["unique"]):
        by_cluster[document.extra.get("cluster", "")].add(document.key)
    assert sorted(map(sorted, by_cluster.values())) == [["0 0"], ["1 0", "1 1"], ["2 0", "2 1", "2 2"]]
    kept = {name: n for name, n in stats.counts.items() if "kept" in name}
    assert kept == {f"near-duplicates/clusters of {size} kept together": 1 for size in (2, 3)}


@pytest.mark.parametrize("text", ["one", "one two", "one two three four", "漢字"])
def test_short_texts(text):
    documents = [
        page("a", text),
        page("b", text.upper() + "!"),
        page("c", text + " more"),
        page("d", "…"),
        page("e", "…"),
    ]
    kept, _, _ = resolve(documents, MinHash())
    assert len(kept) == 4 and {"c", "d", "e"} < set(kept)


def test_result_depends_on_no_order():
    documents = [page(f"{n} {m}", text + f" {m}") for n, text in enumerate(articles()[:20]) for m in range(4)]
    results = set()
    for seed in range(3):
        random.Random(seed).shuffle(documents)
        kept, stats, _ = resolve(documents, MinHash())
        results.add(f"{kept} {stats.to_json()}")
    assert len(results) == 1 and len(kept) == 20


def read_pages(path: str, stats: Stats):
    for line in pathlib.Path(path).read_text("utf-8").splitlines():
        key, text = json.loads(line)
        yield b"", page(key, text).to_bytes()


def test_in_the_engine(tmp_path):
    """All steps, in two processes and three shards, over two inputs, as one after the other in a dict."""
    numbers, plain = (1, 1, 2), [text.replace("\n", " ") for text in articles()[:12]]
    texts = [f"{text} {number}{'!' * n}\nHome" for text in plain for n, number in enumerate(numbers)]
    documents = [page(f"page {n}", text) for n, text in enumerate(texts)]
    for part in range(2):
        lines = [json.dumps([document.key, document.text]) for document in documents[part::2]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines), "utf-8")
    steps = [
        Map("urls", "pages", duplicates.by_key),
        Group("newest", ("urls",), duplicates.KeepNewest(), streams=True),
        Map("texts", "newest", duplicates.by_text),
        Group("one", ("texts",), duplicates.KeepOne(), streams=True),
        Map("lines", "one", duplicates.lines),
        Group("repeated", ("lines",), duplicates.repeated_lines, streams=True),
        Group("unique-lines", ("one", "repeated"), duplicates.drop_lines),
        *near_duplicates("unique-lines", "unique", MinHash(), remove=False),
    ]
    read_step = Read("pages", (str(tmp_path / "0.jsonl"), str(tmp_path / "1.jsonl")), read_pages)
    built = engine.run([read_step, *steps], str(tmp_path / "work"), num_workers=2, num_shards=3)
    found, stats = run(steps, pages=[(b"", document.to_bytes()) for document in documents])
    assert sorted(built.collections["unique"]) == sorted(found["unique"])
    assert built.total.to_json() == stats.to_json()
    assert len(found["one"]) == 24 and stats.counts["near-duplicates/clusters of 2 kept together"] == 12


def test_a_band_of_many_documents_makes_as_many_pairs():
    ids = (number.to_bytes(8, "big") for number in range(300_000))
    pairs = sum(1 for _ in duplicates.candidates(b"band", ids, Stats()))
    assert pairs == 299_999
    others = (number.to_bytes(8, "big") for number in range(1, 1000) for _ in range(24))
    sent = duplicates.send_signatures(bytes(8), iter([b"signature"]), others, Stats())
    assert sum(1 for _ in sent) == 999


def components(pairs: list[tuple[int, int]]) -> dict[int, int]:
    """The lowest node of each node's component, one by one."""
    lowest = {node: node for pair in pairs for node in pair}
    while any(lowest[a] != lowest[b] for a, b in pairs):
        for a, b in pairs:
            lowest[a] = lowest[b] = min(lowest[a], lowest[b])
    return lowest


def connect(pairs: list[tuple[int, int]]) -> dict[int, int]:
    values = sorted(b"".join(node.to_bytes(8, "big") for node in pair) for pair in pairs)
    ends = sorted(value for pair in values for _, value in duplicates.ends_of_pairs(b"", pair, Stats()))
    found = duplicates.clusters(b"", iter(ends), iter(values), Stats())
    return {int.from_bytes(key, "big"): int.from_bytes(value[:8], "big") for key, value in found}


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2**64 - 1) | st.integers(0, 40)), min_size=1, max_size=60))
@settings(deadline=None)
def test_clusters_are_connected_components(pairs):
    assert connect(pairs) == components(pairs)


@pytest.mark.parametrize("shape", ["chain", "star", "shuffled"])
def test_large_clusters(shape, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK", 1000)  # pairs united at once
    nodes = list(range(20_000))
    if shape == "shuffled":
        random.Random(1).shuffle(nodes)
    pairs = [(nodes[0] if shape == "star" else nodes[i], nodes[i + 1]) for i in range(len(nodes) - 1)]
    assert set(connect(pairs).values()) == {0}


def test_clusters_tell_their_sizes():
    values = [bytes([*bytes(7), a, *bytes(7), b]) for a, b in [(1, 2), (2, 3), (8, 9)]]
    ends = sorted(value for pair in values for _, value in duplicates.ends_of_pairs(b"", pair, Stats()))
    sizes = {key[-1]: value[-1] for key, value in duplicates.clusters(b"", ends, values, Stats())}
    assert sizes == {1: 3, 2: 3, 3: 3, 8: 2, 9: 2}


def test_words_of_real_pages_look_right():
    """A check by eye, written down: what counts as the same text."""
    same = ["Don’t  STOP — 50% off!", "don't stop 50 off", "DON´T stop: 50 ％ off…"]
    assert len({tuple(word_hashes(text).tolist()) for text in same}) <= 2
    assert re.findall(r"\w+", "don t stop 50 off") == words(same[0])
