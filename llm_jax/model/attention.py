"""Causal grouped-query self-attention within documents.

B batch, T query position, S key position, D width, N query heads, K key/value heads, H head width
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.attention import attention
from llm_jax.kernels.matmul import matmul
from llm_jax.model.norm import Norm
from llm_jax.model.parameter import PROJECTED, constant, gathered, weight
from llm_jax.model.position import RopeScaling, rotate
from llm_jax.parallel.sharding import Rules


class Attention(nnx.Module):
    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        out_scale: float,
        rope_theta: float | None,
        rope_scaling: RopeScaling | None,
        window: int | None,
        score_width: int | None,
        soft_cap: float | None,
        use_bias: bool,
        use_qkv_bias: bool,
        make_head_norm: Callable[[int], Norm] | None,
        implementation: str,
        dtype: jnp.dtype,
        rules: Rules,
        key: jax.Array,
    ):
        """make_head_norm: of so many heads. window: how many keys a query sees, its own with them; None: all.
        score_width: scores are divided by its square root, instead of that of head_width. soft_cap: of the scores."""
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        into, out = rules.spec("embed", "heads", None), rules.spec("heads", None, "embed")
        self.wq = weight(q_key, (width, num_heads, head_width), into, width=width)
        self.wk = weight(k_key, (width, num_kv_heads, head_width), into, width=width)
        self.wv = weight(v_key, (width, num_kv_heads, head_width), into, width=width)
        self.wo = weight(o_key, (num_heads, head_width, width), out, width=width, scale=out_scale)
        heads = rules.spec("heads", None)
        self.bq = constant(0.0, (num_heads, head_width), heads) if use_qkv_bias else None
        self.bk = constant(0.0, (num_kv_heads, head_width), heads) if use_qkv_bias else None
        self.bv = constant(0.0, (num_kv_heads, head_width), heads) if use_qkv_bias else None
        self.bo = constant(0.0, (width,), jax.P(None)) if use_bias else None
        self.q_norm = make_head_norm(num_heads) if make_head_norm else None
        self.k_norm = make_head_norm(num_kv_heads) if make_head_norm else None
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.window = window
        self.query_scale = math.sqrt(head_width / score_width) if score_width else None
        self.soft_cap = soft_cap
        self.dtype = dtype
        self.into_spec, self.out_spec = rules.spec(None, "heads", None), rules.spec("heads", None, None)
        self.implementation = implementation
        self.rules = rules

    def __call__(self, x_BTD, segments_BT, positions_BT, spec: jax.P, order=None, cache=None):
        """(output sharded as `spec`, (k_BSKH, v_BSKH)). x_BTD has its sequence sharded as within a layer.

        `order` [T] is the order in which the positions of a row stand; None: their own. Without a cache only.
        `cache` is None or (k_BSKH, v_BSKH, segments_BS, offset): room for S keys, of which `offset` are written; the T
        new ones are written behind them, and their segments stand in segments_BS already.
        """
        q_BTNH = self._project(x_BTD, self.wq, self.bq)
        k_BTKH = self._project(x_BTD, self.wk, self.bk)
        v_BTKH = self._project(x_BTD, self.wv, self.bv)
        # Henry et al. 2020, arXiv:2010.04245; per head as in Dehghani et al. 2023, arXiv:2302.05442, or over all heads
        # as in OLMo 2, arXiv:2501.00656.
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if self.rope_theta is not None:
            q_BTNH = rotate(q_BTNH, positions_BT, self.rope_theta, self.rope_scaling)
            k_BTKH = rotate(k_BTKH, positions_BT, self.rope_theta, self.rope_scaling)
        if self.query_scale is not None:
            q_BTNH *= self.query_scale
        if cache is None:
            # All keys of a row: where the sequence is sharded, they are gathered (Llama 3, arXiv:2407.21783, 3.3.2).
            whole = self.rules.spec("batch", None, "heads", None)
            k_BSKH, v_BSKH = jax.reshard(k_BTKH, whole), jax.reshard(v_BTKH, whole)
            key_segments_BS, offset = jax.reshard(segments_BT, self.rules.spec("batch", None)), 0
        else:
            k_BSKH, v_BSKH, key_segments_BS, offset = cache
            k_BSKH = jax.lax.dynamic_update_slice_in_dim(k_BSKH, k_BTKH, offset, axis=1)
            v_BSKH = jax.lax.dynamic_update_slice_in_dim(v_BSKH, v_BTKH, offset, axis=1)
        out_BTNH = attention(
            q_BTNH, k_BSKH, v_BSKH, segments_BT=segments_BT, key_segments_BS=key_segments_BS, order=order,
            offset=offset, window=self.window, soft_cap=self.soft_cap,
            implementation=self.implementation if cache is None else "reference", rules=self.rules,
        )  # fmt: skip
        wo_NHD = gathered(self.wo, self.out_spec, self.dtype)
        out_BTD = checkpoint_name(matmul(out_BTNH, wo_NHD, contracted=2, out_sharding=spec), PROJECTED)
        if self.bo is not None:
            out_BTD += self.bo[...].astype(self.dtype)
        return out_BTD, (k_BSKH, v_BSKH)

    def _project(self, x_BTD, weight_DNH, bias_NH):
        y_BTNH = checkpoint_name(matmul(x_BTD, gathered(weight_DNH, self.into_spec, self.dtype)), PROJECTED)
        return y_BTNH if bias_NH is None else y_BTNH + bias_NH[...].astype(self.dtype)
