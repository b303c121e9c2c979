"""The shapes that other libraries' models have: scaled RoPE, windows, norms behind layers or over all heads, biases of
queries, keys and values, gates as they are. Against numpy, another mesh and the full forward pass."""

import functools
import math

import jax
import numpy as np
import pytest
from tiny_model import FAST, LENGTH, VOCAB_SIZE, make_mesh, make_model, model_maker, packed_rows, put

from llm_jax.config import Config, Model, UserError, validate
from llm_jax.kernels.reference_attention import reference_attention
from llm_jax.kernels.splash_attention import splash_attention, zigzag
from llm_jax.model import decoding
from llm_jax.model.decoding import Sampling
from llm_jax.model.position import RopeScaling
from llm_jax.parallel.sharding import Rules
from llm_jax.plan import costs
from llm_jax.safety.structure import named_leaves

SMALL = dict(num_layers=2, width=32, num_heads=8, num_kv_heads=4, head_width=8, dtype="float32")
MODELS = {
    "window": Model(**SMALL, window=5),
    "olmo2": Model(**SMALL, norm_placement="post", qk_norm=True, qk_norm_over_heads=True),
    "gemma2": Model(
        **SMALL,
        pattern=("local", "dense"),
        window=5,
        activation="geglu",
        norm_placement="both",
        scale_embeddings=True,
        tie_embeddings=True,
        score_width=5,
        attention_soft_cap=0.5,
    ),
    "gemma3": Model(
        **SMALL, pattern=("local", "dense"), window=5, rope_scaling="linear", local_rope_theta=20.0, qk_norm=True
    ),
    "qwen2": Model(**SMALL, use_qkv_bias=True),
    "olmoe": Model(**SMALL, pattern=("moe",), num_experts=4, expert_width=16, normalize_gates=False),
}


def test_rope_scaling_by_wavelengths():
    frequency = (10_000.0 ** -(np.arange(32) / 32)).astype(np.float32)
    expected = []
    for f in frequency.tolist():
        wavelength = 2 * math.pi / f
        if wavelength < 256 / 4:  # four turns or more in 256 tokens
            expected.append(f)
        elif wavelength > 256:
            expected.append(f / 8)
        else:
            smooth = (256 / wavelength - 1) / 3
            expected.append((1 - smooth) * f / 8 + smooth * f)
    scaled = RopeScaling(factor=8.0, low=1.0, high=4.0, original_length=256)(frequency)
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)
    assert len({round(a / b, 3) for a, b in zip(scaled.tolist(), frequency.tolist(), strict=True)}) > 3
    np.testing.assert_allclose(RopeScaling(factor=4.0)(frequency), frequency / 4)


def test_a_soft_cap_bends_the_scores():
    q, k, v, segments = rows(12)
    with jax.set_mesh(make_mesh()):
        found = reference_attention(q, k, v, segments_BT=segments, key_segments_BS=segments, soft_cap=0.3)
    for b, t, n in np.ndindex(2, 12, 2):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = 0.3 * np.tanh(np.array([q[b, t, n] @ k[b, s, n] for s in seen]) / math.sqrt(8) / 0.3)
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(found[b, t, n], weights @ np.stack([v[b, s, n] for s in seen]), rtol=1e-4, atol=1e-5)


def rows(length: int, heads: int = 2, width: int = 8):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, heads, width)).astype(np.float32) for _ in range(3))
    segments = np.sort(rng.integers(1, 4, size=(2, length)), axis=1).astype(np.int32)
    return q, k, v, segments


@pytest.mark.parametrize("window", [1, 3, 20])
def test_a_window_equals_a_loop_over_its_keys(window):
    q, k, v, segments = rows(12)
    with jax.set_mesh(make_mesh()):
        found = reference_attention(q, k, v, segments_BT=segments, key_segments_BS=segments, window=window)
    for b, t, n in np.ndindex(2, 12, 2):
        seen = [s for s in range(max(0, t - window + 1), t + 1) if segments[b, s] == segments[b, t]]
        scores = np.array([q[b, t, n] @ k[b, s, n] for s in seen]) / math.sqrt(8)
        weights = np.exp(scores - scores.max())
        expected = (weights / weights.sum()) @ np.stack([v[b, s, n] for s in seen])
        np.testing.assert_allclose(found[b, t, n], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context, soft_cap", [(1, 2.0), (2, None)])
def test_splash_has_the_same_window_and_soft_cap(context, soft_cap):
    q, k, v, segments = rows(512, width=128)
    mesh, names = make_mesh(context=context), Rules()
    order = zigzag(512, 2) if context > 1 else None

    def place(array, *dims):
        return jax.device_put(array, jax.NamedSharding(mesh, names.spec(*dims)))

    at = slice(None) if order is None else order
    with jax.set_mesh(mesh):
        arguments = dict(
            segments_BT=place(segments[:, at], "batch", "length"), key_segments_BS=place(segments[:, at], "batch", None)
        )
        q_BTNH = place(q[:, at], "batch", "length", "heads", None)
        k_BSKH, v_BSKH = (place(x[:, at], "batch", None, "heads", None) for x in (k, v))
        arguments |= dict(order=order, soft_cap=soft_cap)
        expected = reference_attention(q_BTNH, k_BSKH, v_BSKH, **arguments, window=100)
        found = splash_attention(q_BTNH, k_BSKH, v_BSKH, **arguments, window=100, rules=names, interpret=True)
        full = reference_attention(q_BTNH, k_BSKH, v_BSKH, **arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(full) - np.asarray(expected)).max() > 0.1


@functools.partial(jax.jit, compiler_options=FAST)
def logits(model, tokens_BT, segments_BT, positions_BT):
    return model.logits(model(tokens_BT, segments_BT, positions_BT)[0])


def shaken(model):
    """With biases and scales that differ, as after training: at first, some would make no difference."""
    leaves = named_leaves(model)
    rng = np.random.default_rng(0)
    noise = {name: rng.normal(size=leaf.shape).astype(np.float32) * 0.1 for name, leaf in leaves.items()}
    new = [leaf + jax.device_put(noise[name], leaf.sharding) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(model), new)


@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_changes_nothing(name):
    batch = packed_rows(4)
    arrays = [batch[key][:, :-1] for key in ("tokens", "segments", "positions")]
    found = []
    for mesh in (make_mesh(), make_mesh(fsdp=2, tensor=2, context=2)):
        with jax.set_mesh(mesh):
            model = shaken(make_model(MODELS[name]))
            found.append(np.asarray(logits(model, *put(arrays, mesh))))
    counted = arrays[1] > 0
    np.testing.assert_allclose(found[1][counted], found[0][counted], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_the_full_forward_pass(name):
    mesh, rng, steps = make_mesh(), np.random.default_rng(1), 4
    tokens, lengths = rng.integers(VOCAB_SIZE, size=(2, 9)).astype(np.int32), np.array([9, 4], np.int32)
    with jax.set_mesh(mesh):
        model = shaken(make_model(MODELS[name]))
        start = jax.jit(functools.partial(decoding.start, max_tokens=steps), compiler_options=FAST)
        state = start(model, *put((tokens, lengths), mesh))
        extend = jax.jit(
            functools.partial(decoding.extend, sampling=Sampling(temperature=0.0, eos=-1), num_tokens=steps),
            compiler_options=FAST,
        )
        new = np.asarray(extend(model, state, jax.random.key(0)).tokens_BM)
        for row, length in enumerate(lengths):
            whole = np.concatenate([tokens[row, 9 - length :], new[row]])[None]
            positions = np.arange(whole.shape[1], dtype=np.int32)[None]
            found = logits(model, *put((whole, np.ones_like(whole), positions), mesh))
            assert np.argmax(found, axis=-1)[0, length - 1 : -1].tolist() == new[row].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_the_planner_counts_the_same_parameters(name):
    with jax.set_mesh(make_mesh()):
        model = jax.eval_shape(model_maker(MODELS[name]))
    assert costs.parameter_count(model.shape) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))


def test_a_token_sees_as_far_as_windows_reach():
    """Over two layers, twice window - 1 tokens back, and no further."""
    mesh = make_mesh()
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=(1, LENGTH)).astype(np.int32)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    changed = tokens.copy()
    changed[0, 3] = (tokens[0, 3] + 1) % VOCAB_SIZE
    with jax.set_mesh(mesh):
        model = make_model(MODELS["window"])
        before, after = (
            np.asarray(logits(model, *put((t, np.ones_like(t), positions), mesh))) for t in (tokens, changed)
        )
    differs = (before != after).any(axis=-1)[0]
    assert differs[3 : 3 + 9].all() and not differs[:3].any() and not differs[3 + 9 :].any()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"position": "learned", "rope_scaling": "linear"}, "model.rope_scaling='linear' has an effect only with"),
        ({"rope_scaling": "yarn"}, "model.rope_scaling='yarn' must be one of linear, llama3"),
        ({"rope_low_turns": 4.0}, "model.rope_low_turns=4.0 must be less than model.rope_high_turns=4.0"),
        ({"window": 0}, "model.window=0 must be at least 1"),
        ({"norm_placement": "around"}, "model.norm_placement='around' must be one of pre, post, both"),
        ({"pattern": ("local", "dense")}, "has local layers, which need a window: set model.window"),
        ({"local_rope_theta": 9.0, "window": 4}, "model.local_rope_theta=9.0 has an effect only with local layers"),
        ({"attention_soft_cap": 0.0}, "model.attention_soft_cap=0.0 must be a positive number"),
        ({"scale_embeddings": True, "position": "sinusoidal"}, "model.scale_embeddings=true has no effect with"),
        ({"pattern": ("moe",), "num_experts": 4, "activation": "geglu"}, "'geglu' is not there for layers of the kind"),
        ({"use_bias": True, "use_qkv_bias": True}, "model.use_qkv_bias=true has no effect with model.use_bias=true"),
        ({"qk_norm_over_heads": True}, "model.qk_norm_over_heads=true has an effect only with model.qk_norm=true"),
        ({"normalize_gates": False}, "model.normalize_gates=false has an effect only on layers of the kind moe"),
    ],
)
def test_a_knob_without_effect_is_refused(fields, message):
    with pytest.raises(UserError) as error:
        validate(Config(model=Model(**fields)))
    assert message in str(error.value)
