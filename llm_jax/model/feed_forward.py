"""The position-wise feed-forward layer.

B batch, T position, D width, F feed-forward width
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.matmul import matmul
from llm_jax.model.parameter import UP, constant, gathered, weight
from llm_jax.parallel.sharding import Rules

GELU = functools.partial(jax.nn.gelu, approximate=True)  # the tanh form, as in GPT-2 and Gemma


class FeedForward(nnx.Module):
    """SwiGLU or GEGLU (Shazeer 2020, arXiv:2002.05202), or GELU without a gate."""

    def __init__(
        self,
        *,
        width: int,
        feed_forward_width: int,
        out_scale: float,
        activation: str,
        use_bias: bool,
        dtype: jnp.dtype,
        rules: Rules,
        key: jax.Array,
    ):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        gated = activation != "gelu"
        into, out = rules.spec("embed", "feed_forward"), rules.spec("feed_forward", "embed")
        self.w_gate = weight(gate_key, (width, feed_forward_width), into, width=width) if gated else None
        self.w_up = weight(up_key, (width, feed_forward_width), into, width=width)
        self.w_down = weight(down_key, (feed_forward_width, width), out, width=width, scale=out_scale)
        inner = rules.spec("feed_forward")
        self.b_gate = constant(0.0, (feed_forward_width,), inner) if gated and use_bias else None
        self.b_up = constant(0.0, (feed_forward_width,), inner) if use_bias else None
        self.b_down = constant(0.0, (width,), jax.P(None)) if use_bias else None
        self.activation = jax.nn.silu if activation == "swiglu" else GELU
        self.dtype = dtype
        self.into_spec, self.out_spec = rules.spec(None, "feed_forward"), rules.spec("feed_forward", None)

    def __call__(self, x_BTD, spec: jax.P):
        """x_BTD has its sequence sharded as within a layer; the result is sharded as `spec`."""
        up_BTF = checkpoint_name(self._project(x_BTD, self.w_up, self.b_up), UP)
        if self.w_gate is None:
            hidden_BTF = self.activation(up_BTF)
        else:
            hidden_BTF = self.activation(self._project(x_BTD, self.w_gate, self.b_gate)) * up_BTF
        w_down_FD = gathered(self.w_down, self.out_spec, self.dtype)
        out_BTD = matmul(hidden_BTF, w_down_FD, out_sharding=spec)
        return out_BTD if self.b_down is None else out_BTD + self.b_down[...].astype(self.dtype)

    def _project(self, x_BTD, weight_DF, bias_F):
        y_BTF = matmul(x_BTD, gathered(weight_DF, self.into_spec, self.dtype))
        return y_BTF if bias_F is None else y_BTF + bias_F[...].astype(self.dtype)
