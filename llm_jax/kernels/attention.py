"""Attention over keys of the same document that are not in the future.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K, H head width
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from llm_jax.parallel.sharding import Rules, num_shards

LANES = 128  # of a TPU's vector register: blocks of the sequence are multiples of it
# Queries, and keys, whose scores exist at once, at most: published for v6e (MaxText). 2048, published for v5p, does not
# fit the 16 MiB of VMEM that the compiler gives a kernel of v4, v5e and v5p by itself.
BLOCK = 1024


def zigzag(length: int, shards: int) -> np.ndarray:
    """[length]: which position of a row stands at each place, so that causal attention costs every shard the same.

    Shard i of n holds chunks i and 2n - 1 - i of 2n: of early positions, which see few keys, as many as of late ones
    (Llama 3, arXiv:2407.21783, section 3.3.2). ValueError if length does not divide by 2 * shards.
    """
    if length % (2 * shards):
        raise ValueError(f"length={length} must divide by {2 * shards}: two chunks for each of {shards} shards")
    chunks = np.arange(length).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(length)


def choose_implementation(platform: str, *, length: int, length_shards: int) -> str:
    """What `attention` is to run for rows of this length on this platform; to be asked once, at construction."""
    fits = supports_splash(length=length, length_shards=length_shards) is None
    return "splash" if platform == "tpu" and fits else "reference"


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    order: np.ndarray | None = None,
    offset: jax.Array | int = 0,
    window: int | None = None,
    implementation: str,
    rules: Rules,
) -> jax.Array:
    """Grouped-query attention, "reference" or "splash" (no offset); returns [B, T, N, H], sharded like q_BTNH."""
    arrays = dict(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKH=v_BSKH, segments_BT=segments_BT, key_segments_BS=key_segments_BS)
    if implementation == "splash":
        return splash_attention(**arrays, order=order, window=window, rules=rules)
    return reference_attention(**arrays, order=order, offset=offset, window=window)


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
) -> jax.Array:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), softmax in float32; returns [B, T, N, H].

    Query t stands at key position offset + t, and sees key s if s <= offset + t and both have the same segment id.
    With an `order` (int [T], T = S, no offset), the position of query and key number t is order[t].
    With a `window`, a query sees its own key and the window - 1 before it only (Beltagy et al. 2020, arXiv:2004.05150).
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
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS * head_width**-0.5, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return jnp.reshape(out_BTKGH, q_BTNH.shape, out_sharding=spec)


def supports_splash(*, length: int, length_shards: int) -> str | None:
    """Why splash_attention cannot run on rows of this length, sharded over so many devices; None: it can."""
    chunks = _num_chunks(length_shards)
    if length % (LANES * chunks):
        return f"length={length} must be a multiple of {LANES * chunks}: {LANES} lanes x {chunks} chunks"
    return None


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    order: np.ndarray | None = None,
    window: int | None = None,
    rules: Rules,
    interpret: bool = False,
) -> jax.Array:
    """What reference_attention computes, by JAX's Pallas kernel for TPUs: scores exist only block by block.

    T = S; q_BTNH and segments_BT are sharded as ("batch", "length", "heads", None), keys, values and their segments as
    ("batch", None, "heads", None). ValueError where supports_splash has a reason. To be called under a mesh, or within
    a shard_map over axes that these names do not stand for. `interpret` runs it without a TPU, slowly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    length, num_heads, head_width = q_BTNH.shape[1:]
    length_shards = num_shards(mesh, rules.length)
    reason = supports_splash(length=length, length_shards=length_shards)
    if reason is not None:
        raise ValueError(f"splash attention: {reason}")
    kernel = _splash_kernel(length, num_heads, length_shards, num_shards(mesh, rules.heads), order, window, interpret)
    # What the kernel is to skip differs from shard to shard of the queries. It asks for a mesh without manual axes.
    sizes = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names)
    kernel_spec = kernel.manual_sharding_spec(jax.NamedSharding(sizes, rules.spec("heads", "length")))
    kernel = jax.tree.map(jax.reshard, kernel, kernel_spec)
    q_spec, k_spec = rules.spec("batch", "length", "heads", None), rules.spec("batch", None, "heads", None)
    segments_spec, key_segments_spec = rules.spec("batch", "length"), rules.spec("batch", None)

    @functools.partial(
        jax.shard_map,
        in_specs=(kernel_spec, q_spec, k_spec, k_spec, segments_spec, key_segments_spec),
        out_specs=q_spec,
        axis_names=set(mesh.explicit_axes),  # a Pallas kernel for TPU needs all axes manual that are not so yet
        check_vma=False,  # Pallas calls do not say over which axes their results vary
    )
    def attend(kernel, q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS):
        k_BSKH, v_BSKH, key_segments_BS = (
            x if order is None else _in_natural_order(x, order) for x in (k_BSKH, v_BSKH, key_segments_BS)
        )
        q_BTNH = (q_BTNH.astype(jnp.float32) * head_width**-0.5).astype(q_BTNH.dtype)
        q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
        segment_ids = splash_attention_kernel.SegmentIds(segments_BT, key_segments_BS)
        return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segment_ids).swapaxes(1, 2)

    return attend(kernel, q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS)


def _num_chunks(length_shards: int) -> int:
    """Of zigzag order: a block of queries lies within one, or it would be late and early, and skip next to nothing."""
    return 1 if length_shards == 1 else 2 * length_shards


def _splash_kernel(length, num_heads, length_shards, head_shards, order, window, interpret):
    rows = length // _num_chunks(length_shards)
    block_q, block_kv = (
        max(n for n in range(LANES, min(BLOCK, size) + 1, LANES) if size % n == 0) for size in (rows, length)
    )
    mask = splash_attention_mask.CausalMask((length, length))
    if window is not None:
        mask = splash_attention_mask.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    if order is not None:
        mask.q_sequence = order.astype(np.int32)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        # One backward kernel for keys and values and one for queries, as published for v6e: a fused one does 5 matmuls
        # instead of 7, but writes length / block_kv partial gradients of all queries to HBM, in their dtype.
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q, block_kv=block_kv,
            block_q_dkv=block_q, block_kv_dkv=block_kv,
            block_q_dq=block_q, block_kv_dq=block_kv,
        ),
        head_shards=head_shards,
        q_seq_shards=length_shards,
        interpret=interpret,
    )  # fmt: skip


def _in_natural_order(x_BS: jax.Array, order: np.ndarray) -> jax.Array:
    """Joins the runs of neighbours in `order`, along which axis 1 lies: a few slices, where a gather copies by rows."""
    starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    runs = sorted(zip(order[starts], starts, np.append(starts[1:], len(order)), strict=True))
    return jnp.concatenate([x_BS[:, start:stop] for _, start, stop in runs], axis=1)
