"""The formula against the matrix products in the gradient of a small Transformer, and against published figures."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.measure.flops import flops_per_token, mean_keys, parameter_count, peak_flops


def products_in(jaxpr) -> int:
    """FLOPs of all dot_generals of a jaxpr, inner ones included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod([left[d] for d in contracted]))
        for parameter in equation.params.values():
            if hasattr(parameter, "jaxpr"):
                total += products_in(parameter.jaxpr)
    return total


@pytest.mark.parametrize("kv_heads, gated", [(4, True), (2, False), (1, True)])
def test_equals_the_products_in_the_gradient(kv_heads, gated):
    B, T, D, N, K, H, F, V, L = 2, 6, 12, 4, kv_heads, 5, 7, 11, 3
    shapes = {"wq": (D, N, H), "wk": (D, K, H), "wv": (D, K, H), "wo": (N, H, D), "up": (D, F), "down": (F, D)}
    if gated:
        shapes["gate"] = (D, F)
    weights = {
        "embed": jnp.ones((V, D)), "head": jnp.ones((D, V)),
        "layers": [{name: jnp.ones(shape) for name, shape in shapes.items()} for _ in range(L)],
    }  # fmt: skip

    def loss(weights, tokens):
        x = weights["embed"][tokens]
        for w in weights["layers"]:
            q = jnp.einsum("BTD,DNH->BTNH", x, w["wq"])
            k, v = (jnp.repeat(jnp.einsum("BTD,DKH->BTKH", x, w[name]), N // K, axis=2) for name in ("wk", "wv"))
            p = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k))
            x = x + jnp.einsum("BTNH,NHD->BTD", jnp.einsum("BNTS,BSNH->BTNH", p, v), w["wo"])
            h = jnp.tanh(x @ w["up"]) * (x @ w["gate"] if gated else 1)
            x = x + h @ w["down"]
        return jax.nn.logsumexp(x @ weights["head"], axis=-1).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(weights, jnp.zeros((B, T), jnp.int32))
    shape = dict(
        num_layers=L, width=D, num_heads=N, num_kv_heads=K, head_width=H, feed_forward_width=F, gated=gated,
        vocab_size=V, sequence_length=T,
    )  # fmt: skip
    full = flops_per_token(**shape, causal=False)
    assert products_in(jaxpr.jaxpr) == B * T * full
    assert full - flops_per_token(**shape, causal=True) == 6 * L * N * H * T
    per_layer = sum(int(np.prod(s)) for s in shapes.values())
    assert parameter_count(weights) == 2 * V * D + L * per_layer


LLAMA2_7B = dict(num_layers=32, width=4096, num_heads=32, num_kv_heads=32, head_width=128, feed_forward_width=11008,
                 gated=True, vocab_size=32000, sequence_length=4096)  # fmt: skip
LLAMA3_70B = dict(num_layers=80, width=8192, num_heads=64, num_kv_heads=8, head_width=128, feed_forward_width=28672,
                  gated=True, vocab_size=128256, sequence_length=8192)  # fmt: skip


@pytest.mark.parametrize(
    "shape, causal, gigaflops",
    [(LLAMA2_7B, True, 42.9), (LLAMA2_7B, False, 46.1), (LLAMA3_70B, True, 449.22)],
)
def test_published_models(shape, causal, gigaflops):
    """449.22 is what Google's TPU7x recipe of Llama 3.1 70B comes to: 1,207.06 TFLOP/s at 2,686.98 tokens/s a chip."""
    digits = len(str(gigaflops).split(".")[1])
    assert round(flops_per_token(**shape, causal=causal) / 1e9, digits) == gigaflops


@pytest.mark.parametrize("window", [1, 5, 48, 64, 1000])
def test_keys_of_a_window(window):
    """The mean over all queries, where a key at the edge of what is seen counts half, as the diagonal does."""
    t, s = np.arange(64)[:, None], np.arange(64)[None]
    seen = np.where((s < t) & (s > t - window), 1.0, 0) + np.where((s == t) | (s == t - window), 0.5, 0)
    assert mean_keys(64, (window,)) == seen.sum() / 64
    assert mean_keys(64, (window, None, None)) == pytest.approx((seen.sum() / 64 + 64) / 3)


def test_experts_count_as_often_as_a_token_meets_them():
    """A mixture of 1 of 1 experts and no router is a dense layer; the router is one more product of width x experts."""
    dense = flops_per_token(**LLAMA2_7B, causal=True)
    mixture = dict(num_moe_layers=32, experts_per_token=1, expert_width=11008)
    assert flops_per_token(**LLAMA2_7B, causal=True, **mixture) == dense
    routed = flops_per_token(**LLAMA2_7B, causal=True, **mixture, num_experts=8, num_shared_experts=1)
    assert routed - dense == 6 * 32 * (4096 * 8 + 3 * 4096 * 11008)


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918),
        ("TPU v6e", 918), ("TPU7x", 1153.5), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989), ("NVIDIA B200", 2250),
    ],
)  # fmt: skip
def test_published_peaks(kind, teraflops):
    peak = peak_flops(types.SimpleNamespace(device_kind=kind, platform="any"), jnp.bfloat16)
    assert peak.value == teraflops * 1e12 and peak.source.startswith("published: ")


def test_an_unknown_device_is_measured():
    device = jax.devices()[0]
    peak = peak_flops(device, jnp.float32)
    assert 1e7 < peak.value < 1e14
    assert peak.source.startswith("measured: 1024 x 1024 float32") and "8 simulated devices" in peak.source
