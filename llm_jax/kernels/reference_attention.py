"""Attention over keys of the same document that are not in the future: the plain definition.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K, H head width
"""

import jax
import jax.numpy as jnp
import numpy as np


def reference_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    order: np.ndarray | None = None,
    offset: jax.Array | int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), softmax in float32; returns [B, T, N, H].

    Query t stands at key position offset + t, and sees key s if s <= offset + t and both have the same segment id.
    With an `order` (int [T], T = S, no offset), the position of query and key number t is order[t].
    With a `window`, a query sees its own key and the window - 1 before it only (Beltagy et al. 2020, arXiv:2004.05150).
    With a `soft_cap`, scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv:2408.00118, section 2.2).
    To be called under a mesh.
    """
    batch, num_queries, num_heads, head_width = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    # The shardings are stated: a reshape that meets dimensions of size 1 (one row, one head of a group) loses them.
    spec = jax.typeof(q_BTNH).sharding.spec
    grouped = (batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_width)
    q_BTKGH = jnp.reshape(q_BTNH, grouped, out_sharding=jax.P(*spec[:3], None, spec[3]))
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if order is None:
        key_positions_S, positions_T = jnp.arange(k_BSKH.shape[1]), offset + jnp.arange(num_queries)
    else:
        key_positions_S = positions_T = jnp.asarray(order)
    past_TS = key_positions_S[None, :] <= positions_T[:, None]
    if window is not None:
        past_TS &= key_positions_S[None, :] > positions_T[:, None] - window
    seen_BTS = (segments_BT[:, :, None] == key_segments_BS[:, None, :]) & past_TS
    # A finite mask value: a row without any visible key (padding) gives a uniform, unused average and no NaN.
    scores_BKGTS *= head_width**-0.5
    if soft_cap is not None:
        scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return jnp.reshape(out_BTKGH, q_BTNH.shape, out_sharding=spec)
