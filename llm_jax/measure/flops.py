"""Model FLOPs and the peak of the hardware, whose ratio is the model FLOPs utilization (MFU).

Counted as in PaLM (arXiv 2204.02311, appendix B): only matrix products, a multiply-add as 2, and the backward pass as
twice the forward pass; nothing for recomputation, norms, activations or the embedding lookup. PaLM counts attention in
full, 12 L N H T per token; with causal=True half of that is counted, which is what a causal kernel computes. A figure
of MFU says which of the two it is.
"""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from llm_jax.parallel import chips


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """FLOP/s of one JAX device, and where the number comes from."""

    value: float
    source: str


SLOWER_BOARDS = ("PCIe", "NVL")  # of the same name with other clocks: measured instead
MEASURING_SECONDS = 0.3


def flops_per_token(
    *, num_layers: int, width: int, num_heads: int, num_kv_heads: int, head_width: int, feed_forward_width: int,
    gated: bool, vocab_size: int, sequence_length: int, causal: bool, num_moe_layers: int = 0, num_experts: int = 0,
    experts_per_token: int = 0, num_shared_experts: int = 0, expert_width: int = 0,
    windows: tuple[int | None, ...] = (None,),
) -> float:  # fmt: skip
    """FLOPs of training (forward and backward) per token of a decoder-only Transformer.

    Of the num_layers, num_moe_layers are mixtures of experts: a token meets the router and the experts it goes to.
    With causal, half of all keys, or those that a query sees in the mean through the layers' windows.
    """
    matrices = 3 if gated else 2
    attention_weights = width * head_width * (2 * num_heads + 2 * num_kv_heads)
    dense_weights = matrices * width * feed_forward_width
    experts_met = experts_per_token + num_shared_experts
    moe_weights = width * num_experts + experts_met * matrices * width * expert_width
    weights = num_layers * attention_weights + width * vocab_size
    weights += (num_layers - num_moe_layers) * dense_weights + num_moe_layers * moe_weights
    keys = mean_keys(sequence_length, windows) if causal else sequence_length
    attention = num_layers * 2 * num_heads * head_width * keys  # scores and weighted values
    return 3 * 2 * (weights + attention)


def mean_keys(sequence_length: int, windows: tuple[int | None, ...]) -> float:
    """That a query of a causal row attends to: half of them, or of a sliding window its own, but for the first; the
    mean over layers, whose windows are these, repeated."""
    seen = [min(window or sequence_length, sequence_length) for window in windows]
    return sum(n - n**2 / (2 * sequence_length) for n in seen) / len(seen) if sequence_length else 0.0


def parameter_count(tree) -> int:
    """Elements of all arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def peak_flops(device: jax.Device, dtype) -> Peak:
    """The published peak for 16-bit floats on a known accelerator, else what a square matrix product reaches (half a
    second). Simulated devices of one CPU share its cores, so each is given its part of what one of them reaches."""
    known = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and not any(b in device.device_kind for b in SLOWER_BOARDS)
    chip = chips.of_device_kind(device.device_kind) if known else None
    if chip is not None:
        source = f"published: dense bfloat16 of one {chip.name} ({chip.sources[0]})"
        return Peak(value=chip.flops / chip.devices, source=source)
    size = 1024 if device.platform == "cpu" else 8192
    value = _measure(device, dtype, size)
    name = f"measured: {size} x {size} {jnp.dtype(dtype).name} matrix product on {device.device_kind}"
    if device.platform != "cpu":
        return Peak(value=value, source=name)
    parts = sum(other.process_index == device.process_index for other in device.client.devices())
    return Peak(value=value / parts, source=name if parts == 1 else f"{name}, shared by {parts} simulated devices")


def _measure(device: jax.Device, dtype, size: int) -> float:
    with jax.set_mesh(jax.make_mesh((1,), ("device",), devices=[device])):  # not that of the run
        matrix = jnp.full((size, size), 1 / size, dtype)
        product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
        product(matrix, matrix).block_until_ready()
        best, end = math.inf, time.perf_counter() + MEASURING_SECONDS
        while (begin := time.perf_counter()) < end:
            product(matrix, matrix).block_until_ready()
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
