"""Attention for one CPU device: some queries at a time, against no more keys than they may see.

XLA's CPU compiler has no kernel that keeps scores in the cache, so passes over them are most of the time. Here they
cover half of the square, and the weights are kept for the backward pass in the computation's dtype, not divided by
their sum: what is small is divided instead. The backward products get operands that lie as kernels.matmul wants them.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K, H head width, M = G times the
queries of a block
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from llm_jax.kernels.matmul import transposed, unsharded

QUERIES = 128  # of a block


def supports_blocks(*, num_devices: int, soft_cap: float | None) -> str | None:
    """Why cpu_attention cannot run; None: it can."""
    if num_devices > 1:
        return f"{num_devices} devices share the work, and it is for one"
    if soft_cap is not None:
        return f"it has no soft cap, and model.attention_soft_cap is {soft_cap}"
    return None


def cpu_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, segments_BT: jax.Array, window: int | None = None
) -> jax.Array:
    """What reference_attention computes where queries and keys are the same positions.

    To be called under a mesh of one device.
    """
    spec = jax.typeof(q_BTNH).sharding.spec
    batch, length, num_heads, head_width = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    q_BTKGH = unsharded(q_BTNH).reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_width)
    arrays = unsharded(k_BSKH), unsharded(v_BSKH), unsharded(segments_BT)
    return jax.reshard(_attend(q_BTKGH, *arrays, window).reshape(q_BTNH.shape), spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BTKGH, k_BSKH, v_BSKH, segments_BT, window):
    return _forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, window)[0]


def _forward(q_BTKGH, k_BSKH, v_BSKH, segments_BT, window):
    dtype, shape = q_BTKGH.dtype, q_BTKGH.shape
    q_BKGTH = _laid_out(q_BTKGH, (0, 2, 3, 1, 4))
    k_BKSH, v_BKSH = _laid_out(k_BSKH, (0, 2, 1, 3)), _laid_out(v_BSKH, (0, 2, 1, 3))
    k_BKHS = transposed(k_BKSH)
    parts, kept = [], []
    for queries, keys in _blocks(shape[1], window):
        scores_BKMS = _dot(_of_block(q_BKGTH, queries), k_BKHS[..., keys]) * shape[-1] ** -0.5
        seen_BKMS = _seen(segments_BT, queries, keys, window, shape[3])
        scores_BKMS = jnp.where(seen_BKMS, scores_BKMS, -1e30)
        weights_BKMS = jnp.exp(scores_BKMS - jnp.max(scores_BKMS, axis=-1, keepdims=True)).astype(dtype)
        sum_BKM1 = jnp.sum(weights_BKMS, axis=-1, keepdims=True, dtype=jnp.float32)
        out_BKMH = _dot(weights_BKMS, v_BKSH[:, :, keys]) / sum_BKM1
        parts.append(_by_heads(out_BKMH.astype(dtype), shape[3]))
        kept.append((weights_BKMS, sum_BKM1))
    out_BKGTH = jnp.concatenate(parts, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4), (q_BKGTH, k_BKSH, v_BKSH, out_BKGTH, kept)


def _backward(window, residuals, d_out_BTKGH):
    q_BKGTH, k_BKSH, v_BKSH, out_BKGTH, kept = residuals
    dtype, (_, _, group, length, head_width) = q_BKGTH.dtype, q_BKGTH.shape
    d_out_BKGTH = _laid_out(d_out_BTKGH, (0, 2, 3, 1, 4))
    v_BKHS = transposed(v_BKSH)
    # Of each query the sum of its weights times their gradients (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
    delta_BKGT1 = jnp.sum(d_out_BKGTH.astype(jnp.float32) * out_BKGTH, axis=-1, keepdims=True)
    parts, d_k_BKSH, d_v_BKSH = [], jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32)
    for (queries, keys), (weights_BKMS, sum_BKM1) in zip(_blocks(length, window), kept, strict=True):
        d_out_BKMH = (_of_block(d_out_BKGTH, queries) / sum_BKM1).astype(dtype)
        delta_BKM1 = _of_block(delta_BKGT1, queries) / sum_BKM1
        d_weights_BKMS = _dot(d_out_BKMH, v_BKHS[..., keys])
        d_scores_BKMS = (weights_BKMS * (d_weights_BKMS - delta_BKM1) * head_width**-0.5).astype(dtype)
        parts.append(_by_heads(_dot(d_scores_BKMS, k_BKSH[:, :, keys]).astype(dtype), group))
        d_k_BKSH = d_k_BKSH.at[:, :, keys].add(_dot(transposed(d_scores_BKMS), _of_block(q_BKGTH, queries)))
        d_v_BKSH = d_v_BKSH.at[:, :, keys].add(_dot(transposed(weights_BKMS), d_out_BKMH))
    d_q_BTKGH = jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4)
    d_k_BSKH, d_v_BSKH = (x.astype(dtype).transpose(0, 2, 1, 3) for x in (d_k_BKSH, d_v_BKSH))
    return d_q_BTKGH, d_k_BSKH, d_v_BSKH, None


_attend.defvjp(_forward, _backward)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys that one of them may see)."""
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def _seen(segments_BT, queries, keys, window, group):
    positions_T, positions_S = jnp.arange(queries.start, queries.stop), jnp.arange(keys.start, keys.stop)
    past_TS = positions_S[None, :] <= positions_T[:, None]
    if window is not None:
        past_TS &= positions_S[None, :] > positions_T[:, None] - window
    seen_BTS = (segments_BT[:, queries, None] == segments_BT[:, None, keys]) & past_TS
    return jnp.tile(seen_BTS, (1, group, 1))[:, None]


def _of_block(x_BKGTH, queries):
    part_BKGTH = x_BKGTH[:, :, :, queries]
    return part_BKGTH.reshape(*part_BKGTH.shape[:2], -1, part_BKGTH.shape[-1])


def _by_heads(x_BKMH, group):
    return x_BKMH.reshape(*x_BKMH.shape[:2], group, -1, x_BKMH.shape[-1])


def _laid_out(x, dims):
    """Its dimensions in that order in memory, too; see kernels.matmul.transposed."""
    x = x.transpose(dims)
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
