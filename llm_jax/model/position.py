"""Where a token stands in its document.

B batch, T position, N heads, H head width, D width
"""

import jax
import jax.numpy as jnp


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """RoPE (Su et al. 2021, arXiv:2104.09864): turns pair (i, i + H/2) by position * theta^(-2i/H), in float32."""
    half = x_BTNH.shape[-1] // 2
    frequency_H = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
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
