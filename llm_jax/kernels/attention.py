"""Attention over keys of the same document that are not in the future, by what can serve.

B batch, T query position, S key position, N query heads, K key/value heads, G = N / K, H head width
"""

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import UserError
from llm_jax.kernels.cpu_attention import cpu_attention, supports_blocks
from llm_jax.kernels.cudnn_attention import cudnn_attention, supports_cudnn
from llm_jax.kernels.reference_attention import reference_attention
from llm_jax.kernels.splash_attention import splash_attention, supports_splash
from llm_jax.parallel.sharding import Rules


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
