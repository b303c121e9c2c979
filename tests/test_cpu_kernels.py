"""What the CPU computes in another way, against the plain way: kernels/matmul.py and kernels/cpu_attention.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_model import FAST, RULES, make_mesh

from llm_jax.kernels import matmul as matmul_module
from llm_jax.kernels.cpu_attention import cpu_attention
from llm_jax.kernels.matmul import has_fast_bfloat16_on_cpu, matmul
from llm_jax.kernels.reference_attention import reference_attention

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest value of an array, and at least a tenth of all


def normal(seed, shape, dtype):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def assert_close(found, expected, dtype):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    largest = max(float(jnp.abs(b.astype(jnp.float32)).max()) for b in expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # Not of the array alone: with a window of 1 the gradient of the queries is a sum of terms that cancel.
        assert np.abs(a - b).max() <= TOLERANCE[dtype] * max(0.1 * largest, np.abs(b).max())


@pytest.mark.parametrize("sizes, contracted", [((2, 5, 12, 3, 4), 1), ((2, 5, 3, 4, 12), 2), ((7, 12, 8), 1)])
def test_product_with_gradients(sizes, contracted):
    """bfloat16 on one CPU device goes the other way; the same product of the rounded operands in float32 says what
    it is."""
    rows = len(sizes) - contracted - (2 if sizes[-2:] == (3, 4) else 1)
    x = normal(0, sizes[: rows + contracted], jnp.bfloat16)
    w = normal(1, sizes[rows:], jnp.bfloat16)

    def plain(x, w):
        return jnp.tensordot(x.astype(jnp.float32), w.astype(jnp.float32), axes=contracted).astype(jnp.bfloat16)

    with jax.set_mesh(make_mesh()):
        assert matmul_module._transposes(x)
        found, pull = jax.vjp(jax.jit(lambda x, w: matmul(x, w, contracted=contracted)), x, w)
        gradients = pull(normal(2, found.shape, jnp.bfloat16))
    expected, pull = jax.vjp(plain, x, w)
    assert_close((found, gradients), (expected, pull(normal(2, expected.shape, jnp.bfloat16))), "bfloat16")


def test_result_is_sharded_as_asked():
    with jax.set_mesh(make_mesh()):
        x = jax.reshard(normal(0, (4, 6, 8), jnp.bfloat16), RULES.spec("batch", "length", None))
        w = jax.reshard(normal(1, (8, 16), jnp.bfloat16), RULES.spec(None, "feed_forward"))
        plain = jax.eval_shape(lambda x, w: jnp.einsum("BTD,DF->BTF", x, w), x, w)
        assert jax.typeof(matmul(x, w)).sharding.spec == plain.sharding.spec
        spec = RULES.spec("batch", "sequence", None)
        assert jax.typeof(matmul(x, w, out_sharding=spec)).sharding.spec == spec


def test_bfloat16_only_where_it_is_known_to_be_faster(monkeypatch):
    monkeypatch.setattr(matmul_module, "_has_amx", lambda: True)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert has_fast_bfloat16_on_cpu(make_mesh())
    assert not has_fast_bfloat16_on_cpu(make_mesh(fsdp=2))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 9))
    assert not has_fast_bfloat16_on_cpu(make_mesh())
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(matmul_module, "_has_amx", lambda: False)
    assert not has_fast_bfloat16_on_cpu(make_mesh())


@settings(max_examples=5, deadline=None)
@example(length=128, heads=(4, 2), window=1, dtype="float32", seed=1)
@given(
    length=st.sampled_from([1, 5, 128, 130, 300]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 7, 140, 1000]),
    dtype=st.sampled_from(sorted(TOLERANCE)),
    seed=st.integers(0, 2**16),
)
def test_attention_with_gradients(length, heads, window, dtype, seed):
    num_heads, num_kv_heads = heads
    random = np.random.default_rng(seed)
    segments_BT = jnp.asarray(np.sort(random.integers(0, 4, (2, length)), axis=1)[:, ::-1].copy(), jnp.int32)
    q_BTNH, g_BTNH = (normal(seed + i, (2, length, num_heads, 8), dtype) for i in range(2))
    k_BSKH, v_BSKH = (normal(seed + i, (2, length, num_kv_heads, 8), dtype) for i in range(2, 4))

    def run(attend, *arrays, **options):
        *qkv, g_BTNH = arrays
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments_BT=segments_BT, window=window, **options), *qkv)
        return out, *pull(g_BTNH)

    with jax.set_mesh(make_mesh()):
        found, expected = (
            jax.jit(functools.partial(run, attend, **options), compiler_options=FAST)(q_BTNH, k_BSKH, v_BSKH, g_BTNH)
            for attend, options in ((cpu_attention, {}), (reference_attention, {"key_segments_BS": segments_BT}))
        )
        assert_close(found, expected, dtype)
