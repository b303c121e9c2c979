"""Attention by cuDNN, which runs on NVIDIA GPUs only: the arrays it is given, how it is lowered, and when it is chosen.

In most tests something takes its place that does what JAX's documentation says of it; whether cuDNN does that, the
first part of benchmarks/gpu.sh shows.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import cases, document_ids, packed, require_equal, sharded, value_and_gradients
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_model import RULES, make_mesh

from llm_jax.config import UserError
from llm_jax.kernels import cudnn_attention as kernels
from llm_jax.kernels.attention import attention, choose_implementation
from llm_jax.kernels.cudnn_attention import cudnn_attention, documents
from llm_jax.kernels.reference_attention import reference_attention
from llm_jax.model.transformer import REMATS


@pytest.fixture(autouse=True, scope="module")
def mesh():
    with jax.set_mesh(make_mesh()):
        yield


def documented(
    q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, sliding_window_length
):  # fmt: skip
    """What JAX says that cuDNN's entry point computes of packed rows, by masks; NaN where a query has no document."""
    assert mask_type == kernels.cudnn.MaskType.PADDING_CAUSAL
    assert q_offsets.shape == kv_offsets.shape == (q_seqlen.shape[0], q_seqlen.shape[1] + 1)
    assert {x.dtype.name for x in (q_seqlen, kv_seqlen, q_offsets, kv_offsets)} == {"int32"}

    def within(starts_BM, lengths_BM, length):
        at, first, number = jnp.arange(length), starts_BM[:, :-1, None], lengths_BM[:, :, None]
        return (number > 0) & (at >= first) & (at < first + number)  # [B, M, length]

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    of_q, of_k = within(q_offsets, q_seqlen, q.shape[1]), within(kv_offsets, kv_seqlen, k.shape[1])
    t, s = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None]
    seen = jnp.any(of_q[:, :, :, None] & of_k[:, :, None], axis=1) & (s <= t)
    if sliding_window_length is not None:
        seen &= s > t - sliding_window_length
    scores = scale * jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


@pytest.fixture
def stand_in(monkeypatch):
    """Of cuDNN; what it cannot serve is NaN."""
    monkeypatch.setattr(kernels.cudnn, "dot_product_attention", documented)


def by_cudnn(window=None):
    def attend(q, k, v, *, segments_BT, key_segments_BS):
        return cudnn_attention(q, k, v, segments_BT=segments_BT, window=window, rules=RULES)

    return attend


def runs(ids) -> list[tuple[int, int]]:
    """(start, length) of each run, one token after the other."""
    found = []
    for place, value in enumerate(ids):
        if place and value == ids[place - 1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((place, 1))
    return found


@settings(max_examples=50, deadline=None)
@given(st.lists(document_ids(24), min_size=2, max_size=2))
def test_lengths_and_starts_of_documents(rows):
    expected = [runs(row) for row in rows]
    for most in (4, 10):
        lengths_BM, starts_BM, fit = jax.jit(documents, static_argnums=1)(np.stack(rows), most)
        assert bool(fit) == all(len(found) <= most for found in expected)
        if not fit:
            continue
        assert lengths_BM.shape == (len(rows), most) and starts_BM.shape == (len(rows), most + 1)
        for lengths, starts, found in zip(lengths_BM.tolist(), starts_BM.tolist(), expected, strict=True):
            assert list(zip(starts, lengths, strict=False))[: len(found)] == found
            assert set(lengths[len(found) :]) <= {-1} and set(starts[len(found) :]) == {-1}


def test_a_row_with_one_document_too_many_is_told():
    segments = jnp.asarray([[1, 1, 2, 3, 0], [1, 1, 1, 1, 1]])
    fit = {most: bool(jax.jit(documents, static_argnums=1)(segments, most)[2]) for most in (3, 4)}
    assert fit == {3: False, 4: True}


def equals_the_reference(case):
    reference = functools.partial(reference_attention, window=case.window)
    require_equal(case, sharded(by_cudnn(case.window)), reference)


CASES = cases(lengths=st.integers(2, 80), head_widths=st.sampled_from([8, 16]))


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(CASES)
def test_any_documents(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.cudnn, "dot_product_attention", documented)
        patch.setattr(kernels, "_by_queries", lambda segments, window, q, k, v: jnp.full_like(q, jnp.nan))
        equals_the_reference(case)


@pytest.mark.soak
@settings(max_examples=30, deadline=None)
@given(CASES, st.booleans())
def test_many_documents(case, fit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.cudnn, "dot_product_attention", documented)
        if not fit:
            patch.setattr(kernels, "max_documents", lambda length: 2)
        equals_the_reference(case)


@pytest.mark.parametrize("room", [5, 2])
def test_on_a_mesh_with_room_and_without(room, stand_in, monkeypatch):
    """Rows of up to five documents: in room for two, those with more would be NaN."""
    row = packed(batch=4, length=48, num_heads=8, num_kv_heads=2, head_width=8)
    expected = value_and_gradients(functools.partial(reference_attention, window=7), *row)
    monkeypatch.setattr(kernels, "max_documents", lambda length: room)
    if room == 5:
        monkeypatch.setattr(kernels, "_by_queries", lambda segments, window, q, k, v: jnp.full_like(q, jnp.nan))
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):
        for got, want in zip(value_and_gradients(sharded(by_cudnn(7)), *row), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_within_a_stage_of_a_pipeline(stand_in):
    row = packed(batch=2, length=32, num_heads=4, num_kv_heads=2, head_width=8)

    @functools.partial(
        jax.shard_map, axis_names={"stage"}, check_vma=False, in_specs=(jax.P("stage"),) * 4, out_specs=jax.P("stage")
    )
    def of_a_stage(q, k, v, segments):
        return by_cudnn()(q[0], k[0], v[0], segments_BT=segments[0], key_segments_BS=segments[0])[None]

    def by_stages(q, k, v, *, segments_BT, key_segments_BS):
        spec, key_spec = RULES.spec("batch", "length", "heads", None), RULES.spec("batch", None, "heads", None)
        placed = [(jnp.stack([x, 2 * x]), at) for x, at in ((q, spec), (k, key_spec), (v, key_spec))]
        placed.append((jnp.stack([segments_BT] * 2), spec[:2]))
        return jax.reshard(of_a_stage(*(jax.reshard(x, jax.P("stage", *at)) for x, at in placed)), jax.P(*[None] * 5))

    def one_by_one(q, k, v, **segments):
        return jnp.stack([reference_attention(n * q, n * k, n * v, **segments) for n in (1, 2)])

    expected = value_and_gradients(one_by_one, *row)
    with jax.set_mesh(make_mesh(stage=2, fsdp=2, tensor=2)):
        for got, want in zip(value_and_gradients(by_stages, *row), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def with_a_gpu(monkeypatch):
    """What JAX asks for while it traces."""
    monkeypatch.setattr(kernels.cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(kernels.cudnn, "check_compute_capability", lambda capability: True)


@pytest.mark.parametrize("implementation", ["cudnn", "reference"])
def test_lowered_for_nvidia_it_calls_the_kernel_and_never_holds_the_scores(implementation, with_a_gpu):
    length = 1024

    def total(q, k, v, segments):
        out = attention(
            q, k, v, segments_BT=segments, key_segments_BS=jax.reshard(segments, RULES.spec("batch", None)), window=100,
            implementation=implementation, rules=RULES,
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):

        def shape(heads, *names):
            sharding = jax.NamedSharding(jax.sharding.get_mesh(), RULES.spec("batch", *names))
            return jax.ShapeDtypeStruct((4, length, *heads), jnp.bfloat16 if heads else jnp.int32, sharding=sharding)

        keys = shape((4, 64), None, "heads", None)
        arrays = shape((8, 64), "length", "heads", None), keys, keys, shape((), "length")
        text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$(\w+)\(.*?backend_config = \"(.*?)\"", text)
    kernel = implementation == "cudnn"
    assert [name for name, _ in calls] == ["fmhaSoftmax", "fmhaSoftmax", "fmhaSoftmaxBackward"] * kernel
    for _, backend in calls:
        told = dict(re.findall(r"\\22(\w+)\\22: (?:\\22)?([\w.]+)", backend))
        assert told["mask_type"] == "PADDING_CAUSAL" and float(told["fmha_scale"]) == 64**-0.5
        assert told["sliding_window_length"] == "100" and told["max_seg_per_batch"] == "16"
    # Of a device: 2 rows, half of the heads.
    assert ("tensor<2x1024x4x64xbf16>" in text) == kernel
    assert (f"{length}x{length}xf32" in text) == (not kernel)


@pytest.mark.parametrize("remat, forward", [("none", 2), ("dots", 2), ("full", 3)])
def test_how_often_the_kernel_runs(remat, forward, with_a_gpu):
    """Its forward pass again in the backward pass, and if nothing is kept, once more for the product behind it."""

    def total(q, k, v, segments, wo):
        out = attention(
            q, k, v, segments_BT=segments, key_segments_BS=segments, implementation="cudnn", rules=RULES
        )  # fmt: skip
        return jnp.sum(jnp.einsum("BTNH,NHD->BTD", out, wo) ** 2)

    if remat != "none":
        total = jax.checkpoint(total, policy=REMATS[remat])
    q, wo = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 128, 4, 64), (4, 64, 32)))
    shapes = q, q, q, jax.ShapeDtypeStruct((2, 128), jnp.int32), wo

    def step(q, k, v, segments, wo):
        spec, key_spec = RULES.spec("batch", "length", "heads", None), RULES.spec("batch", None, "heads", None)
        placed = jax.reshard(q, spec), jax.reshard(k, key_spec), jax.reshard(v, key_spec)
        return jax.value_and_grad(total, argnums=(0, 1, 2, 4))(*placed, jax.reshard(segments, jax.P(*spec[:2])), wo)

    text = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$(\w+)\(", text)
    assert (calls.count("fmhaSoftmax"), calls.count("fmhaSoftmaxBackward")) == (forward, 1)


SERVED = dict(length=1024, length_shards=1, head_width=64, dtype=jnp.bfloat16, soft_cap=None, capability="9.0")


@pytest.mark.parametrize(
    "platform, changes, implementation, why",
    [
        ("gpu", {}, "cudnn", None),
        ("gpu", {"capability": None}, "cudnn", None),
        ("gpu", {"capability": "10.0", "head_width": 256}, "cudnn", None),
        ("gpu", {"capability": "8.0"}, "reference", "cudnn cannot serve this run: the GPU has compute capability 8.0"),
        ("gpu", {"capability": "gfx942"}, "reference", "the GPU has compute capability gfx942"),
        ("gpu", {"dtype": jnp.float32}, "reference", "it computes in bfloat16, and model.dtype is float32"),
        ("gpu", {"head_width": 60}, "reference", "the head width 60 must be a multiple of 8 and at most 256"),
        ("gpu", {"head_width": 264}, "reference", "the head width 264 must be"),
        ("gpu", {"length_shards": 2}, "reference", "parallel.context=2 shards the sequence"),
        ("gpu", {"soft_cap": 50.0}, "reference", "model.attention_soft_cap is 50.0"),
        ("tpu", {"length": 2048, "length_shards": 2, "soft_cap": 50.0}, "splash", None),
        ("tpu", {"length": 100}, "reference", "splash cannot serve this run: length=100 must be a multiple of 128"),
        ("cpu", {}, "blocks", None),
        ("cpu", {"num_devices": 8}, "reference", "8 devices share the work"),
    ],
)
def test_what_is_chosen_and_why(platform, changes, implementation, why):
    chosen, reason = choose_implementation("auto", platform, **SERVED | changes)
    assert chosen == implementation
    assert reason is None if why is None else why in (reason or "")


def test_old_versions_of_cudnn_are_refused(monkeypatch):
    for version, implementation in ((91001, "reference"), (91002, "cudnn")):
        library = type("Versions", (), {"cudnn_get_version": lambda version=version: version})
        monkeypatch.setattr(kernels, "cuda_versions", library)
        assert choose_implementation("auto", "gpu", **SERVED)[0] == implementation


def test_a_choice_of_the_user_serves_or_says_why_not():
    assert choose_implementation("reference", "gpu", **SERVED) == ("reference", None)
    assert choose_implementation("cudnn", "gpu", **SERVED) == ("cudnn", None)
    for wanted, platform, changes, why in (
        ("cudnn", "cpu", {}, "it runs on GPU, not on CPU"),
        ("splash", "gpu", {}, "it runs on TPU, not on GPU"),
        ("splash", "tpu", {"length": 100}, "length=100 must be a multiple of 128"),
        ("cudnn", "gpu", {"head_width": 60}, "the head width 60 must be a multiple of 8"),
    ):
        with pytest.raises(UserError, match=rf"model.attention={wanted} cannot serve this run: {why}.*=auto"):
            choose_implementation(wanted, platform, **SERVED | changes)


def test_too_many_queries_for_int32_are_refused():
    q = jax.ShapeDtypeStruct((2**14, 1024, 16, 8), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2**14, 1024), jnp.int32)
    with pytest.raises(ValueError, match=r"cuDNN counts \(16384, 1024, 16, 8\) queries"):
        jax.eval_shape(lambda q, s: sharded(by_cudnn())(q, q, q, segments_BT=s, key_segments_BS=s), q, segments)
