"""Which updates are spikes: a loss or gradient norm far above those of the updates before. Pure; runs in the step.

W window: the updates looked back on
"""

import dataclasses

import jax
import jax.numpy as jnp

MAD_TO_DEVIATION = 1.4826  # of a normal distribution (Rousseeuw & Croux 1993)
SMALLEST_DEVIATION = 1e-3  # of the median


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The last W accepted updates, in a ring; replicated."""

    loss_W: jax.Array  # float32
    grad_norm_W: jax.Array  # float32
    count: jax.Array  # int32: updates accepted so far; the oldest of a full ring is at count % W


def empty(window: int) -> History:
    return History(jnp.zeros((window,)), jnp.zeros((window,)), jnp.zeros((), jnp.int32))


def spike(history: History, loss: jax.Array, grad_norm: jax.Array, threshold: float) -> jax.Array:
    """bool[]: whether one of them is finite and above median + threshold * deviation of a full window.

    The deviation is the robust one, 1.4826 times the median of the distances from the median (MAD), but at least 0.001
    of the median: a window of nearly equal values would make a spike of rounding.
    """

    def above(value, values_W):
        middle = _median(values_W)
        deviation = MAD_TO_DEVIATION * _median(jnp.abs(values_W - middle))
        limit = middle + threshold * jnp.maximum(deviation, SMALLEST_DEVIATION * middle)
        return jnp.isfinite(value) & (value > limit)

    full = history.count >= history.loss_W.size
    return full & (above(loss, history.loss_W) | above(grad_norm, history.grad_norm_W))


def accept(history: History, loss: jax.Array, grad_norm: jax.Array, keep: jax.Array) -> History:
    """The history with this update in place of the oldest; as it is where `keep` (bool[]) is False."""
    window = history.loss_W.size
    here_W = keep & (jnp.arange(window) == history.count % window)
    return History(
        jnp.where(here_W, loss, history.loss_W),
        jnp.where(here_W, grad_norm, history.grad_norm_W),
        history.count + keep,
    )


def _median(values_W: jax.Array) -> jax.Array:
    sorted_W = jnp.sort(values_W)
    return (sorted_W[(values_W.size - 1) // 2] + sorted_W[values_W.size // 2]) / 2
