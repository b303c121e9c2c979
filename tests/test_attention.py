import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import cases, packed, require_equal, sharded, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from tiny_model import RULES, make_mesh

from llm_jax import config
from llm_jax.kernels import splash_attention as kernels
from llm_jax.kernels.attention import attention
from llm_jax.kernels.reference_attention import reference_attention
from llm_jax.kernels.splash_attention import splash_attention, supports_splash, zigzag
from llm_jax.parallel import sharding


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh()):
        yield


def attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, key_segments_BS, offset, order=None):
    """One query, one head at a time, over a list of the keys it may see; NaN where there are none."""
    out_BTNH = np.full(q_BTNH.shape, np.nan)
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    position = order if order is not None else range(k_BSKH.shape[1])
    for b, t, n in np.ndindex(*q_BTNH.shape[:3]):
        past = [s for s in range(k_BSKH.shape[1]) if position[s] <= position[offset + t]]
        seen = [s for s in past if key_segments_BS[b, s] == segments_BT[b, t]]
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
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    expected = attend(q, k, v, segments, segments, 0)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=3 * 2**-8)  # bfloat16 keeps 8 bits


def test_large_scores_do_not_overflow():
    q, k, v, segments = inputs(num_queries=9, num_keys=9, num_heads=4, num_kv_heads=2)
    out = reference_attention(1e3 * q, 1e3 * k, v, segments_BT=segments, key_segments_BS=segments)
    np.testing.assert_allclose(out, attend(1e3 * q, 1e3 * k, v, segments, segments, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [zigzag(8, 2), np.random.default_rng(1).permutation(8)])
def test_positions_in_another_order(order):
    q, k, v, segments = inputs(num_queries=8, num_keys=8, num_heads=4, num_kv_heads=2)
    out = reference_attention(q, k, v, segments_BT=segments, key_segments_BS=segments, order=order)
    np.testing.assert_allclose(out, attend(q, k, v, segments, segments, 0, order), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_zigzag_shares_the_work_evenly(shards):
    length = 48
    order = zigzag(length, shards)
    assert sorted(order) == list(range(length))
    pairs = [sum(position + 1 for position in shard) for shard in np.split(order, shards)]  # position t sees t + 1 keys
    assert set(pairs) == {length * (length + 1) // 2 // shards}
    assert all((np.diff(chunk) == 1).all() for chunk in np.split(order, 2 * shards))


def test_zigzag_of_two_shards():
    np.testing.assert_array_equal(zigzag(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    with pytest.raises(ValueError, match=r"length=10 must divide by 4"):
        zigzag(10, 2)


def test_splash_runs_where_the_length_allows_it():
    assert supports_splash(length=128, length_shards=1) is None
    assert supports_splash(length=512, length_shards=2) is None
    assert "length=512 must be a multiple of 1024" in (supports_splash(length=512, length_shards=4) or "")
    q, k, v, segments = inputs(num_queries=100, num_keys=100, num_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match="splash attention: length=100 must be a multiple of 128"):
        attention(q, k, v, segments_BT=segments, key_segments_BS=segments, implementation="splash", rules=RULES)


MESHES = {
    "one": dict(batch=1, length=384),
    "fsdp=2,context=2,tensor=2": dict(batch=2, length=512, fsdp=2, context=2, tensor=2),
    "context=8": dict(batch=1, length=2048, context=8),
}


@pytest.mark.parametrize("name", MESHES)
def test_splash_equals_the_reference(name, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 128)  # several blocks, some of which are skipped
    sizes = dict(MESHES[name])
    batch, length, context = sizes.pop("batch"), sizes.pop("length"), sizes.get("context", 1)
    order = zigzag(length, context) if context > 1 else None
    heads = dict(num_heads=8, num_kv_heads=2) if context < 8 else dict(num_heads=2, num_kv_heads=1)
    row = packed(batch=batch, length=length, head_width=16, order=order, **heads)
    expected = value_and_gradients(functools.partial(reference_attention, order=order), *row)
    with jax.set_mesh(make_mesh(**sizes)):
        splash = sharded(functools.partial(splash_attention, order=order, rules=RULES, interpret=True))
        reference = sharded(functools.partial(reference_attention, order=order))
        for implementation in (splash, reference):
            for got, want in zip(value_and_gradients(implementation, *row), expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def equals_the_reference(case):
    splash = functools.partial(splash_attention, window=case.window, rules=RULES, interpret=True)
    require_equal(case, sharded(splash), functools.partial(reference_attention, window=case.window))


SPLASH = cases(lengths=st.sampled_from([128, 256]), head_widths=st.sampled_from([16, 64, 128]))


@settings(max_examples=2, deadline=None, derandomize=True)
@given(SPLASH)
def test_splash_of_any_documents(case):
    equals_the_reference(case)


@pytest.mark.soak
@settings(max_examples=20, deadline=None)
@given(SPLASH)
def test_splash_of_many_documents(case):
    equals_the_reference(case)


def test_splash_where_a_query_sees_no_key():
    arrays, segments, weights = packed(batch=1, length=256, num_heads=2, num_kv_heads=1, head_width=16)
    alone = segments.copy()
    alone[:, 100:110] = 99  # no key has it
    weights[:, 100:110] = 0

    def run(attend):
        def attend_from(q, k, v, *, segments_BT, key_segments_BS):
            return attend(q, k, v, segments_BT=alone, key_segments_BS=key_segments_BS)

        return value_and_gradients(attend_from, arrays, segments, weights)

    splash = sharded(functools.partial(splash_attention, rules=RULES, interpret=True))
    got, expected = run(splash), run(reference_attention)
    assert np.isfinite(got[0]).all()
    got[0], expected[0] = (np.delete(out_BTNH, range(100, 110), axis=1) for out_BTNH in (got[0], expected[0]))
    for values, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(values, want, rtol=1e-4, atol=1e-5)


def test_splash_within_a_stage_of_a_pipeline():
    """Each of two stages attends with queries of its own; their sequence and heads are sharded as well."""
    order = zigzag(512, 2)
    row = packed(batch=1, length=512, num_heads=4, num_kv_heads=2, head_width=16, order=order)
    splash = functools.partial(splash_attention, order=order, rules=RULES, interpret=True)
    reference = functools.partial(reference_attention, order=order)

    @functools.partial(
        jax.shard_map, axis_names={"stage"}, check_vma=False, in_specs=(jax.P("stage"),) * 5, out_specs=jax.P("stage")
    )
    def of_a_stage(q, k, v, segments, key_segments):
        return splash(q[0], k[0], v[0], segments_BT=segments[0], key_segments_BS=key_segments[0])[None]

    def by_stages(q, k, v, *, segments_BT, key_segments_BS):
        spec, key_spec = RULES.spec("batch", "length", "heads", None), RULES.spec("batch", None, "heads", None)
        placed = [(q, spec), (k, key_spec), (v, key_spec), (segments_BT, spec[:2]), (key_segments_BS, key_spec[:2])]
        pairs = [jnp.stack([x, 2 * x]) for x, _ in placed]
        out = of_a_stage(*(jax.reshard(x, jax.P("stage", *spec)) for x, (_, spec) in zip(pairs, placed, strict=True)))
        return jax.reshard(out, jax.P(*[None] * out.ndim))

    def one_by_one(q, k, v, **segments):
        return jnp.stack([reference(q, k, v, **segments), reference(2 * q, 2 * k, 2 * v, **segments)])

    expected = value_and_gradients(one_by_one, *row)
    with jax.set_mesh(make_mesh(stage=2, context=2, tensor=2)):
        for got, want in zip(value_and_gradients(by_stages, *row), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu, which compiles for TPU")
@pytest.mark.parametrize("implementation, head_width", [("splash", 64), ("splash", 128), ("reference", 64)])
def test_compiled_for_tpu_splash_never_holds_the_scores(implementation, head_width, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other tests, in other processes, load it too
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = sharding.make_mesh(config.Parallel(context=2, tensor=2), devices)
    order = zigzag(2048, 2)

    def total(q_BTNH, k_BSKH, v_BSKH, segments_BT):
        out_BTNH = attention(
            q_BTNH, k_BSKH, v_BSKH,
            segments_BT=segments_BT, key_segments_BS=jax.reshard(segments_BT, RULES.spec("batch", None)),
            order=order, implementation=implementation, rules=RULES,
        )  # fmt: skip
        return jnp.sum(out_BTNH.astype(jnp.float32) ** 2)

    def shape(heads, *names):
        named = jax.NamedSharding(mesh, RULES.spec(*names))
        return jax.ShapeDtypeStruct((2, 2048, *heads), jnp.bfloat16 if heads else jnp.int32, sharding=named)

    q = shape((8, head_width), "batch", "length", "heads", None)
    k = shape((2, head_width), "batch", None, "heads", None)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k, shape((), "batch", "length"))
    text = lowered.compile().as_text()
    assert text is not None
    holds_scores = re.search(r"f32\[(\d+,)*1024,2048\]", text) is not None  # a shard's 1024 queries by all keys
    assert holds_scores == (implementation == "reference")
    kernels_called = text.count('custom_call_target="tpu_custom_call"')
    assert kernels_called == (
        3 if implementation == "splash" else 0
    )  # values, gradients of queries, of keys and values
