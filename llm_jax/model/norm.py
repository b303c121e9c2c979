"""Normalisation over the last dimensions, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.model.parameter import constant


class Norm(nnx.Module):
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467); `centred`, LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, *sizes: int, centred: bool, use_bias: bool, epsilon: float, spec: jax.P | None = None):
        """sizes: of the last dimensions, over all of which is normalised; spec: how they are sharded."""
        spec = spec or jax.P(*[None] * len(sizes))
        self.scale = constant(1.0, sizes, spec)
        self.bias = constant(0.0, sizes, spec) if use_bias else None
        self.axes = tuple(range(-len(sizes), 0))
        self.centred = centred
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.centred:
            y -= jnp.mean(y, axis=self.axes, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=self.axes, keepdims=True) + self.epsilon)
        y *= self.scale[...]
        if self.bias is not None:
            y += self.bias[...]
        return y.astype(x.dtype)
