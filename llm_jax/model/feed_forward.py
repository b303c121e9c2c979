"""The position-wise feed-forward layer.

B batch, T position, D width, F feed-forward width
"""

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.model.parameter import constant, gathered, weight
from llm_jax.parallel.sharding import Rules


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202) if `gated`, else GELU (tanh form, as GPT-2)."""

    def __init__(
        self,
        *,
        width: int,
        feed_forward_width: int,
        out_scale: float,
        gated: bool,
        use_bias: bool,
        dtype: jnp.dtype,
        rules: Rules,
        key: jax.Array,
    ):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        into, out = rules.spec("embed", "feed_forward"), rules.spec("feed_forward", "embed")
        self.w_gate = weight(gate_key, (width, feed_forward_width), into, width=width) if gated else None
        self.w_up = weight(up_key, (width, feed_forward_width), into, width=width)
        self.w_down = weight(down_key, (feed_forward_width, width), out, width=width, scale=out_scale)
        inner = rules.spec("feed_forward")
        self.b_gate = constant(0.0, (feed_forward_width,), inner) if gated and use_bias else None
        self.b_up = constant(0.0, (feed_forward_width,), inner) if use_bias else None
        self.b_down = constant(0.0, (width,), jax.P(None)) if use_bias else None
        self.dtype = dtype
        self.into_spec, self.out_spec = rules.spec(None, "feed_forward"), rules.spec("feed_forward", None)

    def __call__(self, x_BTD, spec: jax.P):
        """x_BTD has its sequence sharded as within a layer; the result is sharded as `spec`."""
        up_BTF = self._project(x_BTD, self.w_up, self.b_up)
        if self.w_gate is None:
            hidden_BTF = jax.nn.gelu(up_BTF, approximate=True)
        else:
            hidden_BTF = jax.nn.silu(self._project(x_BTD, self.w_gate, self.b_gate)) * up_BTF
        w_down_FD = gathered(self.w_down, self.out_spec, self.dtype)
        out_BTD = jnp.einsum("BTF,FD->BTD", hidden_BTF, w_down_FD, out_sharding=spec)
        return out_BTD if self.b_down is None else out_BTD + self.b_down[...].astype(self.dtype)

    def _project(self, x_BTD, weight_DF, bias_F):
        y_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, gathered(weight_DF, self.into_spec, self.dtype))
        return y_BTF if bias_F is None else y_BTF + bias_F[...].astype(self.dtype)
