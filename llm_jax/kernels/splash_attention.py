"""Attention by JAX's Pallas kernel for TPUs, and the order of a row whose positions are sharded.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K, H head width
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from llm_jax.parallel.sharding import Rules, num_shards

RESULTS = "attention_results"  # what splash attention gives its backward pass, and cuDNN's result: for remat policies
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
    soft_cap: float | None = None,
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
    head_shards = num_shards(mesh, rules.heads)
    kernel = _splash_kernel(length, num_heads, length_shards, head_shards, order, window, soft_cap, interpret)
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


def _splash_kernel(length, num_heads, length_shards, head_shards, order, window, soft_cap, interpret):
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
        residual_checkpoint_name=RESULTS,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )  # fmt: skip


def _in_natural_order(x_BS: jax.Array, order: np.ndarray) -> jax.Array:
    """Joins the runs of neighbours in `order`, along which axis 1 lies: a few slices, where a gather copies by rows."""
    starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    runs = sorted(zip(order[starts], starts, np.append(starts[1:], len(order)), strict=True))
    return jnp.concatenate([x_BS[:, start:stop] for _, start, stop in runs], axis=1)
