"""Attention over keys of the same document that are not in the future.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K, H head width
"""

import jax
import jax.numpy as jnp


def reference_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    offset: jax.Array | int = 0,
) -> jax.Array:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), softmax in float32; returns [B, T, N, H].

    Query t stands at key position offset + t, and sees key s if s <= offset + t and both have the same segment id.
    To be called under a mesh.
    """
    batch, num_queries, num_heads, head_width = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    # The shardings are stated: a reshape that meets dimensions of size 1 (one row, one head of a group) loses them.
    spec = jax.typeof(q_BTNH).sharding.spec
    grouped = (batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_width)
    q_BTKGH = jnp.reshape(q_BTNH, grouped, out_sharding=jax.P(*spec[:3], None, spec[3]))
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    past_TS = jnp.arange(k_BSKH.shape[1])[None, :] <= offset + jnp.arange(num_queries)[:, None]
    seen_BTS = (segments_BT[:, :, None] == key_segments_BS[:, None, :]) & past_TS
    # A finite mask value: a row without any visible key (padding) gives a uniform, unused average and no NaN.
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS * head_width**-0.5, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return jnp.reshape(out_BTKGH, q_BTNH.shape, out_sharding=spec)
