import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_mesh

from llm_jax.kernels.attention import reference_attention


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh()):
        yield


def attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, offset):
    """One query, one head at a time, over a list of the keys it may see; NaN where there are none."""
    out_BTNH = np.full(q_BTNH.shape, np.nan)
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    for b, t, n in np.ndindex(*q_BTNH.shape[:3]):
        seen = [s for s in range(k_BSKH.shape[1]) if s <= offset + t and key_segments_BS[b, s] == segments_BT[b, t]]
        if not seen:
            continue
        scores = np.array([q_BTNH[b, t, n] @ k_BSKH[b, s, n // group] for s in seen]) / np.sqrt(q_BTNH.shape[3])
        weights = np.exp(scores - scores.max())
        out_BTNH[b, t, n] = sum(
            w * v_BSKH[b, s, n // group] for w, s in zip(weights / weights.sum(), seen, strict=True)
        )
    return out_BTNH


def inputs(*, num_queries, num_keys, num_heads, num_kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    q_BTNH = rng.normal(size=(3, num_queries, num_heads, 4)).astype(np.float32)
    k_BSKH, v_BSKH = (rng.normal(size=(3, num_keys, num_kv_heads, 4)).astype(np.float32) for _ in range(2))
    segments_BS = np.sort(rng.integers(1, 4, size=(3, num_keys)), axis=1).astype(np.int32)
    return q_BTNH, k_BSKH, v_BSKH, segments_BS


@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (6, 2), (4, 1)])
def test_equals_a_loop_over_the_visible_keys(num_heads, num_kv_heads):
    q, k, v, segments = inputs(num_queries=9, num_keys=9, num_heads=num_heads, num_kv_heads=num_kv_heads)
    out = reference_attention(q, k, v, segments_BT=segments, key_segments_BS=segments)
    np.testing.assert_allclose(out, attend(q, k, v, segments, segments, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_queries, offset", [(1, 8), (3, 5), (2, 0)])
def test_queries_that_stand_at_an_offset(num_queries, offset):
    q, k, v, key_segments = inputs(num_queries=num_queries, num_keys=10, num_heads=4, num_kv_heads=2)
    segments = key_segments[:, offset : offset + num_queries]
    out = jax.jit(reference_attention)(q, k, v, segments_BT=segments, key_segments_BS=key_segments, offset=offset)
    np.testing.assert_allclose(out, attend(q, k, v, segments, key_segments, offset), rtol=1e-5, atol=1e-6)


def test_a_query_without_any_key_is_finite_and_so_is_its_gradient():
    q, k, v, segments = inputs(num_queries=6, num_keys=6, num_heads=4, num_kv_heads=2)
    alone = segments.copy()
    alone[:, 2] = 99  # no key has it

    def total(q, k, v):
        out_BTNH = reference_attention(q, k, v, segments_BT=alone, key_segments_BS=segments)
        return jnp.sum(out_BTNH * (alone != 99)[:, :, None, None]), out_BTNH

    gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    expected = attend(q, k, v, alone, segments, 0)
    assert np.isnan(expected[:, 2]).all() and np.isfinite(out).all()
    np.testing.assert_allclose(np.delete(out, 2, axis=1), np.delete(expected, 2, axis=1), rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_inputs_are_as_exact_as_their_rounding():
    q, k, v, segments = inputs(num_queries=9, num_keys=9, num_heads=4, num_kv_heads=2)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out = reference_attention(q, k, v, segments_BT=segments, key_segments_BS=segments)
    assert out.dtype == jnp.bfloat16
    expected = attend(*(np.asarray(x, np.float64) for x in (q, k, v)), segments, segments, 0)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=3 * 2**-8)  # bfloat16 keeps 8 bits


def test_large_scores_do_not_overflow():
    q, k, v, segments = inputs(num_queries=9, num_keys=9, num_heads=4, num_kv_heads=2)
    out = reference_attention(1e3 * q, 1e3 * k, v, segments_BT=segments, key_segments_BS=segments)
    np.testing.assert_allclose(out, attend(1e3 * q, 1e3 * k, v, segments, segments, 0), rtol=1e-4, atol=1e-4)
