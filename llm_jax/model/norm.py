"""Normalisation over the last dimension, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.model.parameter import constant


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467); `centred`, LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, *, centred: bool, use_bias: bool, epsilon: float):
        self.scale = constant(1.0, (width,), jax.P(None))
        self.bias = constant(0.0, (width,), jax.P(None)) if use_bias else None
        self.centred = centred
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.centred:
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y *= self.scale[...]
        if self.bias is not None:
            y += self.bias[...]
        return y.astype(x.dtype)
