"""Batches as a pure function of (seed, token stores, step), and the fixed rows of a held-out split.

A store is cut into windows of sequence_length + 1 tokens of the concatenation of its documents; neighbours share one
token, so that every token but the first is a target exactly once. An epoch of a source is a permutation of its windows,
another one each time. Rows come from the sources in the exact proportion of the weights. No state is kept.

Letters: B row of the batch, U position in a window (sequence_length + 1), T target (sequence_length), R some rows.
"""

import dataclasses
import fractions
import hashlib
from collections.abc import Sequence

import grain
import numpy as np

from llm_jax.config import UserError
from llm_jax.data.store import TokenStore
from llm_jax.data.tokenizer import PAD

LONGEST_PERIOD = 1 << 16  # rows; weights are exact, or else off by less than 1 / LONGEST_PERIOD


@dataclasses.dataclass
class Batch:
    """int32 arrays.

    tokens_BU: ids; inputs are [:, :-1], targets [:, 1:]
    segments_BU: number of the document within the row, from 1 on; 0: padding
    positions_BU: from 0 at each document's first token in the row
    """

    tokens_BU: np.ndarray
    segments_BU: np.ndarray
    positions_BU: np.ndarray


@dataclasses.dataclass
class Origin:
    """Where a row came from."""

    source: str
    window: int
    epoch: int  # how often the source had been used up before
    pieces: list[tuple[str, int, int]]  # (document key, first token in the document, number of tokens)


class TrainStream:
    """The training batches.

    Args:
      stores: by source name
      weights: by source name; share of the rows, and so of the tokens; need not sum to 1
      sequence_length: targets a row
      batch_size: rows of the global batch
      seed: of the order
    """

    def __init__(
        self,
        stores: dict[str, TokenStore],
        weights: dict[str, float],
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
    ):
        tokenizers = {store.tokenizer_sha256 for store in stores.values()}
        if len(tokenizers) > 1:
            raise UserError(f"the token stores of {', '.join(stores)} have different tokenizers; prepare them again")
        self.stores = stores
        self.weights = weights
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.names = list(stores)
        self.source_of_row = interleave([weights[name] for name in self.names])
        # A seed of its own for each source: Grain's epochs count up from it, so neighbouring seeds would share orders.
        self.orders = [
            grain.MapDataset.range(num_windows(store, sequence_length)).shuffle(seed=derived_seed(seed, name)).repeat()
            for name, store in stores.items()
        ]
        period = len(self.source_of_row)
        is_source = self.source_of_row == np.arange(len(self.names))[:, None]
        self.rows_per_period = is_source.sum(axis=1)
        self.rank_of_row = (np.cumsum(is_source, axis=1) - 1)[self.source_of_row, np.arange(period)]

    @property
    def fingerprint(self) -> dict:
        """What the batches depend on: another value here means other batches."""
        return {
            "stores": {name: store.fingerprint for name, store in self.stores.items()},
            "tokenizer": next(iter(self.stores.values())).tokenizer_sha256,
            "weights": {name: self.weights[name] / sum(self.weights.values()) for name in self.names},
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
        }

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of the global batch that makes update step + 1."""
        rows = np.arange(self.batch_size)[start:stop]
        source_R, place_R = self._places(step, rows)
        shape = len(rows), self.sequence_length + 1
        batch = Batch(*(np.empty(shape, np.int32) for _ in range(3)))
        for source, name in enumerate(self.names):
            mine = np.flatnonzero(source_R == source)
            if len(mine):
                window_R = self._windows(source, place_R[mine])
                part = cut(self.stores[name], window_R, self.sequence_length)
                batch.tokens_BU[mine] = part.tokens_BU
                batch.segments_BU[mine] = part.segments_BU
                batch.positions_BU[mine] = part.positions_BU
        return batch

    def origin(self, step: int, row: int) -> Origin:
        """Which text a row of a batch is."""
        source_R, place_R = self._places(step, np.array([row]))
        name = self.names[source_R[0]]
        store = self.stores[name]
        window = int(self._windows(source_R[0], place_R)[0])
        first = window * self.sequence_length
        last = min(first + self.sequence_length + 1, store.num_tokens)
        pieces = []
        document = int(np.searchsorted(store.ends, first, side="right"))
        while first < last:
            begin = int(store.ends[document - 1]) if document else 0
            end = min(int(store.ends[document]), last)
            pieces.append((store.key(document), first - begin, end - first))
            document, first = document + 1, end
        return Origin(name, window, int(place_R[0]) // num_windows(store, self.sequence_length), pieces)

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been gone through when `step` updates are made."""
        periods, rest = divmod(step * self.batch_size, len(self.source_of_row))
        counts = periods * self.rows_per_period + np.bincount(self.source_of_row[:rest], minlength=len(self.names))
        return {
            name: int(count) / num_windows(store, self.sequence_length)
            for (name, store), count in zip(self.stores.items(), counts, strict=True)
        }

    def _places(self, step: int, row_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row, and how many rows of that source came before it since step 0."""
        periods_R, rest_R = np.divmod(step * self.batch_size + row_R, len(self.source_of_row))
        source_R = self.source_of_row[rest_R]
        return source_R, periods_R * self.rows_per_period[source_R] + self.rank_of_row[rest_R]

    def _windows(self, source: int, place_R: np.ndarray) -> np.ndarray:
        order = self.orders[source]
        return np.array([order[place] for place in place_R.tolist()], np.int64)


class HeldOut:
    """The windows of a held-out split, in order: every target once."""

    def __init__(self, store: TokenStore, sequence_length: int):
        self.store = store
        self.sequence_length = sequence_length
        self.num_rows = num_windows(store, sequence_length)

    def rows(self, windows_B: np.ndarray) -> Batch:
        """These windows; one from num_rows on is all padding."""
        return cut(self.store, windows_B, self.sequence_length)

    def documents_BT(self, windows_B: np.ndarray) -> np.ndarray:
        """int64: the document number of each target of these windows; -1: none to count (padding or a bos)."""
        # From the index alone: no token is read.
        places_BU = windows_B[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        documents_BU = np.searchsorted(self.store.ends, places_BU, side="right")
        inputs_BT, targets_BT = documents_BU[:, :-1], documents_BU[:, 1:]
        return np.where((targets_BT == inputs_BT) & (targets_BT < self.store.num_documents), targets_BT, -1)


def num_windows(store: TokenStore, sequence_length: int) -> int:
    """The last one may be padded."""
    return -(-(store.num_tokens - 1) // sequence_length)


def cut(store: TokenStore, window_R: np.ndarray, sequence_length: int) -> Batch:
    """The windows of a store."""
    first_R = window_R * sequence_length
    spans = store.spans(first_R, sequence_length + 1, pad=PAD)
    offset_U = np.arange(sequence_length + 1)
    is_text_RU = spans.documents_RU < store.num_documents
    segments_RU = spans.documents_RU - spans.documents_RU[:, :1] + 1
    positions_RU = offset_U - np.maximum(spans.starts_RU - first_R[:, None], 0)
    return Batch(
        tokens_BU=spans.tokens_RU,
        segments_BU=np.where(is_text_RU, segments_RU, 0).astype(np.int32),
        positions_BU=np.where(is_text_RU, positions_RU, 0).astype(np.int32),
    )


def derived_seed(seed: int, name: str) -> int:
    """32 bits that differ between sources and between runs."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def interleave(weights: Sequence[float]) -> np.ndarray:
    """int [period]: the source of each row, to be repeated for ever.

    Up to any row n, source k has given n * weight[k] / sum(weights) rows, off by less than one (earliest-deadline rule
    for just-in-time sequences: G. Steiner and S. Yeomans, Management Science 39(6), 1993).
    """
    # Of a float, the shortest decimal is what was meant: 0.7 is 7/10.
    exact = [fractions.Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = int(np.lcm.reduce([share.denominator for share in shares], dtype=object))
    if period > LONGEST_PERIOD:
        period = LONGEST_PERIOD
    counts = [max(1, int(share * period)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * period)
    for k in by_remainder[: period - sum(counts)]:
        counts[k] += 1
    period = sum(counts)  # one more for each weight below 1 / LONGEST_PERIOD
    given = [0] * len(counts)
    sources = np.empty(period, np.int64)
    for row in range(period):
        # Row j of source k may come once j < (row + 1) * share, and must have come by (j + 1) / share.
        ready = [k for k, count in enumerate(counts) if given[k] * period < (row + 1) * count]
        chosen = min(ready, key=lambda k: (-(-(given[k] + 1) * period // counts[k]), k))
        given[chosen] += 1
        sources[row] = chosen
    return sources
