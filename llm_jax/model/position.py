"""Where a token stands in its document.

B batch, T position, N heads, H head width, D width
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequencies for rows longer than those of the first training; see config.Model."""

    factor: float
    # Of turns in original_length: pairs with more than `high` keep their frequency, those with fewer than `low` get it
    # divided by factor, and between them is a line. None: all are divided (Chen et al. 2023, arXiv:2306.15595).
    low: float | None = None
    high: float | None = None
    original_length: int | None = None

    def __call__(self, frequency_H: jax.Array) -> jax.Array:
        if self.low is None or self.high is None or self.original_length is None:
            return frequency_H / self.factor
        turns_H = self.original_length * frequency_H / (2 * math.pi)
        kept_H = jnp.clip((turns_H - self.low) / (self.high - self.low), 0, 1)
        return frequency_H * (kept_H + (1 - kept_H) / self.factor)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """RoPE (Su et al. 2021, arXiv:2104.09864): turns pair (i, i + H/2) by position * theta^(-2i/H), in float32."""
    half = x_BTNH.shape[-1] // 2
    frequency_H = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency_H = scaling(frequency_H)
    angle_BTNH = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H
    cos, sin = jnp.cos(angle_BTNH), jnp.sin(angle_BTNH)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def sinusoidal(positions_BT: jax.Array, width: int) -> jax.Array:
    """[B, T, D] of sines, then cosines (Vaswani et al. 2017, arXiv:1706.03762, section 3.5), float32."""
    half = width // 2
    frequency_D = 10_000.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTD = positions_BT[:, :, None].astype(jnp.float32) * frequency_D
    return jnp.concatenate([jnp.sin(angle_BTD), jnp.cos(angle_BTD)], axis=-1)
