import collections
import fractions
import types

import numpy as np
import pytest
from tiny_corpus import TOPICS, CharacterTokenizer, concatenation, write_corpus

from llm_jax.config import Source, UserError
from llm_jax.data.sources import open_documents
from llm_jax.data.store_writer import prepare_store
from llm_jax.data.stream import HeldOut, TrainStream, interleave

LENGTH = 64  # targets a row
TEXTS = {"a": [text[:500] for text in TOPICS[:12]], "b": [text[:60] for text in TOPICS[12:40]]}
HELD_OUT = [text[:300] for text in TOPICS[40:45]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{source: (train, held-out store)}"""
    pairs = {}
    for name, texts in TEXTS.items():
        folder = tmp_path_factory.mktemp(name)
        write_corpus(folder, {"train": texts, "validation": HELD_OUT})
        documents = [
            open_documents(Source(name="tiny"), split, data_dir=str(folder), cache_dir="unused")
            for split in ("train", "validation")
        ]
        pairs[name] = prepare_store(
            *documents, CharacterTokenizer(), cache_dir=str(folder), num_workers=1, skip_bad_documents=False
        )
    return pairs


@pytest.fixture(scope="module")
def stores(pairs):
    return {name: pair[0] for name, pair in pairs.items()}


def make(stores, *, weights=None, sequence_length=LENGTH, batch_size=5, seed=1) -> TrainStream:
    weights = weights or dict.fromkeys(stores, 1.0)
    return TrainStream(stores, weights, sequence_length=sequence_length, batch_size=batch_size, seed=seed)


def arrays(batch) -> tuple:
    return batch.tokens_BU, batch.segments_BU, batch.positions_BU


def assert_equal(one, other):
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


def reference_row(texts: list[str], window: int, sequence_length: int = LENGTH) -> tuple[list, list, list]:
    """Tokens, segments and positions of a window, token by token."""
    stream = [(document, token) for document, text in enumerate(texts) for token in concatenation([text])]
    tokens, segments, positions = [], [], []
    previous = None
    for place in range(window * sequence_length, (window + 1) * sequence_length + 1):
        if place >= len(stream):
            row = 3, 0, 0
        else:
            document, token = stream[place]
            if document != previous:
                row = token, (segments[-1] + 1 if segments else 1), 0
            else:
                row = token, segments[-1], positions[-1] + 1
            previous = document
        for values, value in zip((tokens, segments, positions), row, strict=True):
            values.append(value)
    return tokens, segments, positions


def num_windows(texts: list[str], sequence_length: int = LENGTH) -> int:
    return -(-(len(concatenation(texts)) - 1) // sequence_length)


def test_every_row_is_the_window_its_origin_says(stores):
    stream = make(stores, weights={"a": 0.7, "b": 0.3})
    for step in range(12):
        batch = stream.batch(step)
        assert all(array.shape == (5, LENGTH + 1) and array.dtype == np.int32 for array in arrays(batch))
        for row in range(5):
            origin = stream.origin(step, row)
            expected = reference_row(TEXTS[origin.source], origin.window)
            for array, values in zip(arrays(batch), expected, strict=True):
                np.testing.assert_array_equal(array[row], values)


def test_origin_finds_the_text_again(stores):
    stream = make(stores)
    for step in range(6):
        batch = stream.batch(step)
        for row in range(5):
            origin = stream.origin(step, row)
            found = []
            for key, first, length in origin.pieces:
                split, number = key.split(":")
                assert split == "train"
                found.extend(concatenation([TEXTS[origin.source][int(number)]])[first : first + length])
            np.testing.assert_array_equal(batch.tokens_BU[row][batch.segments_BU[row] > 0], found)


@pytest.mark.parametrize("sequence_length", [1, 7, 64, 10_000])
def test_an_epoch_covers_every_target_exactly_once(stores, sequence_length):
    texts = TEXTS["b"]
    windows = num_windows(texts, sequence_length)
    stream = make({"b": stores["b"]}, batch_size=windows, sequence_length=sequence_length)
    orders = []
    for epoch in range(3):
        batch = stream.batch(epoch)
        order = [stream.origin(epoch, row).window for row in range(windows)]
        assert sorted(order) == list(range(windows))
        assert {stream.origin(epoch, row).epoch for row in range(windows)} == {epoch}
        rows = batch.tokens_BU[np.argsort(order)]
        targets = rows[:, 1:].ravel()
        reference = concatenation(texts)
        np.testing.assert_array_equal(targets[: len(reference) - 1], reference[1:])
        assert (targets[len(reference) - 1 :] == 3).all() and rows[0, 0] == 1
        orders.append(order)
    if windows > 10:
        assert len({tuple(order) for order in orders}) == 3  # each epoch has an order of its own


def test_a_batch_is_a_pure_function_of_the_step(stores):
    stream = make(stores)
    later = stream.batch(9)
    for step in (0, 3, 9):
        stream.batch(step)
    assert_equal(stream.batch(9), later)
    assert_equal(make(stores).batch(9), later)


@pytest.mark.parametrize(
    "parts", [[(0, 5)], [(0, 1), (1, 5)], [(0, 2), (2, 4), (4, 5)], [(i, i + 1) for i in range(5)]]
)
def test_any_split_of_the_rows_gives_the_same_rows(stores, parts):
    stream = make(stores)
    whole = stream.batch(4)
    cut = [arrays(stream.batch(4, start, stop)) for start, stop in parts]
    for array, pieces in zip(arrays(whole), zip(*cut, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), array)


def test_the_batch_size_changes_the_cut_and_not_the_order(stores):
    rows = np.concatenate([make(stores, batch_size=5).batch(step).tokens_BU for step in range(6)])
    np.testing.assert_array_equal(
        rows, np.concatenate([make(stores, batch_size=6).batch(s).tokens_BU for s in range(5)])
    )


def test_seeds_and_sources_have_orders_of_their_own(stores):
    def order(seed, stores=stores, step=0):
        stream = make(stores, batch_size=40, seed=seed)
        return [(origin.source, origin.window) for origin in (stream.origin(step, row) for row in range(40))]

    windows = num_windows(TEXTS["a"])
    twice = {"a": stores["a"], "c": stores["a"]}
    both = order(1, twice)
    assert [w for name, w in both if name == "a"] != [w for name, w in both if name == "c"]
    assert order(1) != order(2)
    # Grain numbers the epochs on from the seed: the second epoch of one seed must not be the first of the next.
    epochs = {
        (seed, epoch): tuple(
            make({"a": stores["a"]}, batch_size=windows, seed=seed).origin(epoch, row).window for row in range(windows)
        )
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(epochs.values())) == 9


def test_the_order_is_the_one_it_always_was():
    """Kept: with another order, for instance of a newer Grain, an old run could not be resumed exactly."""
    of_100_windows = types.SimpleNamespace(
        num_tokens=100 * LENGTH + 1, ends=np.array([100 * LENGTH + 1]), key=str, tokenizer_sha256=""
    )
    stream = make(dict.fromkeys("ab", of_100_windows), weights={"a": 2, "b": 1}, batch_size=12, seed=7)
    found = [(origin.source, origin.window) for origin in (stream.origin(3, row) for row in range(12))]
    assert found == GOLDEN


GOLDEN = [
    ("a", 21),
    ("a", 17),
    ("b", 39),
    ("a", 34),
    ("a", 72),
    ("b", 86),
    ("a", 92),
    ("a", 50),
    ("b", 96),
    ("a", 1),
    ("a", 26),
    ("b", 88),
]


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 1], [0.7, 0.3], [0.1, 0.2, 0.7], [1, 2.5, 3.25, 0.01], [5, 5, 5, 1], [1 / 3, 2 / 3], [1e-9, 1.0]],
)
def test_weights_hold_at_every_row(weights):
    sources = interleave(weights)
    total = sum(fractions.Fraction(repr(float(weight))) for weight in weights)
    rows = np.tile(sources, 2) if len(sources) < 5000 else sources
    for k, weight in enumerate(weights):
        share = fractions.Fraction(repr(float(weight))) / total
        given = np.cumsum(rows == k)
        wanted = np.arange(1, len(rows) + 1) * float(share)
        # Exactly within one row, or within one row of a share that is off by at most 1 / 65536.
        assert np.abs(given - wanted).max() < (1 if share.denominator <= 1 << 16 else 2.1)
        assert (rows == k).any()


def test_weights_are_those_of_the_rows_of_the_stream(stores):
    stream = make(stores, weights={"a": 6, "b": 2}, batch_size=8)
    for step in range(5):
        names = collections.Counter(stream.origin(step, row).source for row in range(8))
        assert names == {"a": 6, "b": 2}
    windows = {name: num_windows(texts) for name, texts in TEXTS.items()}
    assert stream.epochs(10) == {"a": 60 / windows["a"], "b": 20 / windows["b"]}
    assert stream.epochs(0) == {"a": 0, "b": 0}


def test_the_fingerprint_names_everything_a_batch_depends_on(stores):
    prints = [
        make(stores).fingerprint,
        make(stores, weights={"a": 1, "b": 2}).fingerprint,
        make(stores, sequence_length=32).fingerprint,
        make(stores, batch_size=4).fingerprint,
        make(stores, seed=2).fingerprint,
        make({"a": stores["a"]}).fingerprint,
    ]
    assert all(one != other for i, one in enumerate(prints) for other in prints[:i])
    assert prints[0] == make(stores).fingerprint == make(stores, weights={"a": 5, "b": 5}).fingerprint


def test_stores_of_different_tokenizers_are_refused(stores, monkeypatch):
    monkeypatch.setattr(stores["b"], "tokenizer_sha256", "other")
    with pytest.raises(UserError, match="the token stores of a, b have different tokenizers"):
        make(stores)


def test_held_out_rows_are_the_windows_in_order(pairs):
    held_out = HeldOut(pairs["a"][1], LENGTH)
    assert held_out.num_rows == num_windows(HELD_OUT)
    batch = held_out.rows(np.arange(held_out.num_rows + 2))
    for window in range(held_out.num_rows + 2):
        for array, values in zip(arrays(batch), reference_row(HELD_OUT, window), strict=True):
            np.testing.assert_array_equal(array[window], values)
    assert_equal(held_out.rows(np.array([4, 1])), type(batch)(*(array[[4, 1]] for array in arrays(batch))))


def test_held_out_targets_belong_to_documents(pairs):
    held_out = HeldOut(pairs["a"][1], LENGTH)
    documents = held_out.documents_BT(np.arange(held_out.num_rows + 1)).ravel()
    # Every token of a document but its bos is counted, once.
    expected = np.concatenate([[i, *[i] * len(text), -1] for i, text in enumerate(HELD_OUT)])[:-1]
    np.testing.assert_array_equal(documents[: len(expected)], expected)
    assert (documents[len(expected) :] == -1).all()
    counts = collections.Counter(documents.tolist())
    assert [counts[i] for i in range(len(HELD_OUT))] == [len(text) + 1 for text in HELD_OUT]
