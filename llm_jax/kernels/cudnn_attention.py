"""Attention by cuDNN's kernel for NVIDIA GPUs, over rows of several documents.

B batch, T query position, S key position, N query heads, K key/value heads, H head width, M documents of a row
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # documents within a row have no public name yet
from jax._src.lib import cuda_versions
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.reference_attention import reference_attention
from llm_jax.kernels.splash_attention import LANES, RESULTS
from llm_jax.parallel.sharding import Rules


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
