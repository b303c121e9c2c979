"""Attention over keys of the same document that are not in the future.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K, H head width
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # documents within a row have no public name yet
from jax._src.lib import cuda_versions
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from llm_jax.config import UserError
from llm_jax.kernels.cpu_attention import cpu_attention, supports_blocks
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


def choose_implementation(
    wanted: str,
    platform: str,
    *,
    length: int,
    length_shards: int,
    head_width: int,
    dtype: jnp.dtype,
    soft_cap: float | None,
    capability: str | None = None,
    num_devices: int = 1,
) -> tuple[str, str | None]:
    """(what `attention` is to run, why not the platform's kernel); to be asked once, at construction.

    wanted: config.Model.attention, "auto" or a name; UserError if that one cannot serve. soft_cap: of the scores.
    capability: of the GPU, as "9.0"; None if there is none at hand, and then it is one that will do.
    """

    homes = {"splash": "tpu", "cudnn": "gpu", "blocks": "cpu"}

    def obstacle(name: str) -> str | None:
        home = homes.get(name, platform)
        if platform != home:
            return f"it runs on {home.upper()}, not on {platform.upper()}"
        if name == "splash":
            return supports_splash(length=length, length_shards=length_shards)
        if name == "cudnn":
            return supports_cudnn(
                length_shards=length_shards,
                head_width=head_width,
                dtype=dtype,
                soft_cap=soft_cap,
                capability=capability,
            )
        if name == "blocks":
            return supports_blocks(num_devices=num_devices, soft_cap=soft_cap)
        return None

    if wanted != "auto":
        reason = obstacle(wanted)
        if reason is not None:
            raise UserError(f"model.attention={wanted} cannot serve this run: {reason}; try model.attention=auto")
        return wanted, None
    kernel = next(name for name, home in homes.items() if home == platform)
    reason = obstacle(kernel)
    return (kernel, None) if reason is None else ("reference", f"{kernel} cannot serve this run: {reason}")


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
    soft_cap: float | None = None,
    implementation: str,
    rules: Rules,
) -> jax.Array:
    """Grouped-query attention; returns [B, T, N, H], sharded like q_BTNH. The `implementation` changes no result:

    "reference"; "splash" (no offset); "cudnn" and "blocks" (no offset, order or soft cap; keys of the same segments).
    """
    arrays = dict(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKH=v_BSKH, segments_BT=segments_BT, key_segments_BS=key_segments_BS)
    if implementation == "splash":
        return splash_attention(**arrays, order=order, window=window, soft_cap=soft_cap, rules=rules)
    if implementation == "cudnn":
        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT=segments_BT, window=window, rules=rules)
    if implementation == "blocks":
        return cpu_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT=segments_BT, window=window)
    return reference_attention(**arrays, order=order, offset=offset, window=window, soft_cap=soft_cap)


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


def supports_cudnn(
    *, length_shards: int, head_width: int, dtype: jnp.dtype, soft_cap: float | None, capability: str | None
) -> str | None:
    """Why cudnn_attention cannot run; None: it can. capability: as of choose_implementation.

    The limits are those of JAX's jax/_src/cudnn/fused_attention_stablehlo.py, and of
    https://github.com/NVIDIA/cudnn-frontend, include/cudnn_frontend/node/sdpa_support_surface.h.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, and model.dtype is {jnp.dtype(dtype)}"
    if soft_cap is not None:
        return f"it has no soft cap, and model.attention_soft_cap is {soft_cap}"
    if head_width % 8 or head_width > 256:
        return f"the head width {head_width} must be a multiple of 8 and at most 256"
    if length_shards > 1:
        return f"parallel.context={length_shards} shards the sequence"
    if capability is not None and (not capability[0].isdigit() or float(capability) < 9):
        return f"the GPU has compute capability {capability}, and documents within a row need NVIDIA's 9.0 (Hopper)"
    version = None if cuda_versions is None else cuda_versions.cudnn_get_version()
    if version is not None and version < 91002:
        return f"cuDNN {version} is installed, and before 91002 (9.10.2) there are known bugs"
    return None


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array,
    window: int | None = None,
    rules: Rules,
) -> jax.Array:
    """What reference_attention computes where queries and keys have the same segments, each id one run of neighbours,
    by cuDNN's kernel for NVIDIA GPUs: scores exist only block by block, and documents cost no mask.

    See supports_cudnn. Sharded as for splash_attention, and to be called where that may be. The kernel has room for
    max_documents in a row; where a row of a device has more, all its rows take the reference, some queries at a time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    q_spec, k_spec = rules.spec("batch", "length", "heads", None), rules.spec("batch", None, "heads", None)

    @functools.partial(
        jax.shard_map,
        in_specs=(q_spec, k_spec, k_spec, rules.spec("batch", "length")),
        out_specs=q_spec,
        axis_names=set(mesh.explicit_axes),
        check_vma=False,  # the kernel does not say over which axes its results vary
    )
    def attend(q_BTNH, k_BSKH, v_BSKH, segments_BT):
        return _within_documents(q_BTNH, k_BSKH, v_BSKH, segments_BT, window)

    return checkpoint_name(attend(q_BTNH, k_BSKH, v_BSKH, segments_BT), RESULTS)


def max_documents(length: int) -> int:
    """In a row of so many tokens, for cudnn_attention: one for each 64. The kernel reserves 4 bytes a query, head and
    document: a few percent of what a layer keeps."""
    return max(16, length // 64)


def documents(segments_BT: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(lengths [B, M], starts [B, M + 1], whether no row has more than M = `most`): of each run of the same id in a
    row, int32, and behind the last one -1, as cuDNN's entry point in JAX wants it. They cover the row."""
    length = segments_BT.shape[1]
    first_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    find = functools.partial(jnp.flatnonzero, size=most + 1, fill_value=length)
    starts_BM = jax.vmap(find)(first_BT).astype(jnp.int32)
    lengths_BM = jnp.diff(starts_BM, axis=1)
    fit = jnp.all(starts_BM[:, -1] == length)
    return jnp.where(lengths_BM > 0, lengths_BM, -1), jnp.where(starts_BM < length, starts_BM, -1), fit


# The backward pass runs the kernel's forward pass again. Kept instead, as cond would have it, both branches would copy
# queries, keys and values, and the kernel's own sums take the room of max_documents rows.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _within_documents(q_BTNH, k_BSKH, v_BSKH, segments_BT, window):
    return _by_kernel_or_queries(lambda attend, *qkv: attend(*qkv), segments_BT, window, q_BTNH, k_BSKH, v_BSKH)


def _forward(q_BTNH, k_BSKH, v_BSKH, segments_BT, window):
    out_BTNH = _within_documents(q_BTNH, k_BSKH, v_BSKH, segments_BT, window)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _backward(window, kept, gradient_BTNH):
    *qkv, segments_BT = kept

    def pull_back(attend, gradient_BTNH, *qkv):
        return jax.vjp(attend, *qkv)[1](gradient_BTNH)

    return *_by_kernel_or_queries(pull_back, segments_BT, window, gradient_BTNH, *qkv), None


_within_documents.defvjp(_forward, _backward)


def _by_kernel_or_queries(run, segments_BT, window, *arrays):
    """run(attend, *arrays), where attend(q_BTNH, k_BSKH, v_BSKH) is what can serve these rows."""
    lengths_BM, starts_BM, fit = documents(segments_BT, max_documents(segments_BT.shape[1]))
    kernel = functools.partial(_packed, lengths_BM, starts_BM, window)
    return jax.lax.cond(
        fit,
        functools.partial(run, kernel),
        functools.partial(run, functools.partial(_by_queries, segments_BT, window)),
        *arrays,
    )


def _packed(lengths_BM, starts_BM, window, q_BTNH, k_BSKH, v_BSKH):
    if q_BTNH.size >= 2**31:
        raise ValueError(f"cuDNN counts {q_BTNH.shape} queries of a device in int32; use more train.microbatches")
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    if group > 1 and jax.__version_info__ < (0, 11, 2):
        # It takes fewer heads of keys from wrong places: https://github.com/jax-ml/jax/pull/39521
        k_BSKH, v_BSKH = (jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
    return cudnn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, q_seqlen=lengths_BM, kv_seqlen=lengths_BM, q_offsets=starts_BM, kv_offsets=starts_BM,
        scale=q_BTNH.shape[3] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL, sliding_window_length=window,
    )  # fmt: skip


def _by_queries(segments_BT, window, q_BTNH, k_BSKH, v_BSKH):
    length = q_BTNH.shape[1]
    size = math.gcd(length, LANES)

    @jax.checkpoint
    def attend(offset):
        some_BTNH, ids_BT = (jax.lax.dynamic_slice_in_dim(x, offset, size, axis=1) for x in (q_BTNH, segments_BT))
        return reference_attention(
            some_BTNH, k_BSKH, v_BSKH, segments_BT=ids_BT, key_segments_BS=segments_BT, offset=offset, window=window
        )

    parts_CBTNH = jax.lax.map(attend, jnp.arange(0, length, size))
    return parts_CBTNH.swapaxes(0, 1).reshape(q_BTNH.shape)
