"""How likely a model finds given tokens: rows of any length, in few compiled programs.

B row, T position, U = T + 1 tokens of a row
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.kernels.splash_attention import LANES
from llm_jax.model.transformer import Transformer
from llm_jax.parallel.sharding import global_rows, num_shards
from llm_jax.training.losses import token_losses

losses = jax.jit(token_losses, static_argnames="chunk")


class Row(NamedTuple):
    """Tokens of one document, of which the last `scored` are predicted from all before them."""

    tokens: Sequence[int]
    scored: int


class Score(NamedTuple):
    nll: float  # of the scored tokens together, in nats
    greedy: bool  # each of them is the likeliest one


def score(
    model: Transformer, rows: Sequence[Row], *, mesh: jax.sharding.Mesh, batch_size: int, chunk: int | None
) -> list[Score]:
    """In the order of the rows, whose number and lengths are the same in every process. Under the mesh."""
    shards = num_shards(mesh, model.rules.batch)
    batch_size = -(-batch_size // shards) * shards
    sharding = jax.NamedSharding(mesh, model.rules.spec("batch", None))
    found: dict[int, Score] = {}
    lengths = [padded(len(row.tokens) - 1, mesh, model) for row in rows]
    longest_first = sorted(range(len(rows)), key=lambda i: -lengths[i])
    while longest_first:
        length = lengths[longest_first[0]]
        numbers = [i for i in longest_first[:batch_size] if lengths[i] == length]
        longest_first = longest_first[len(numbers) :]
        batch = {name: np.zeros((batch_size, length + 1), np.int32) for name in ("tokens", "segments", "positions")}
        for b, i in enumerate(numbers):
            count = len(rows[i].tokens)
            batch["tokens"][b, :count] = rows[i].tokens
            batch["segments"][b, :count] = 1
            batch["positions"][b, :count] = np.arange(count)
        arrays = global_rows(
            lambda first, last, batch=batch: {name: array[first:last] for name, array in batch.items()},
            batch_size,
            sharding,
        )
        nll_BT, rank_BT = multihost_utils.process_allgather(losses(model, arrays, chunk=chunk), tiled=True)
        for b, i in enumerate(numbers):
            end = len(rows[i].tokens) - 1
            scored = slice(end - rows[i].scored, end)
            found[i] = Score(float(np.sum(nll_BT[b, scored], dtype=np.float64)), bool(np.all(rank_BT[b, scored] < 1)))
    return [found[i] for i in range(len(rows))]


def padded(length: int, mesh: jax.sharding.Mesh, model: Transformer) -> int:
    """The next length that programs are compiled for: as kernels and a sharded sequence want it, doubled each time."""
    shards = num_shards(mesh, model.rules.length)
    size = LANES * (2 * shards if shards > 1 else 1)
    while size < length:
        size *= 2
    return size


def windows(tokens: Sequence[int], length: int, stride: int) -> list[Row]:
    """Each token but the first is scored once, with at most `length` tokens before it: windows begin `stride` apart,
    and in each those are scored that the one before did not reach."""
    rows, reached = [], 0
    for first in range(0, max(1, len(tokens) - 1), stride):
        last = min(first + length, len(tokens) - 1)
        rows.append(Row(tokens[first : last + 1], last - reached))
        reached = last
        if last == len(tokens) - 1:
            break
    return rows
