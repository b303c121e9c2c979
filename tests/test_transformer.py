"""The model and its layers: norm, position, feed_forward, transformer."""

import dataclasses
import functools
import math
import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import (
    FAMILIES,
    FAST,
    GPT2,
    LENGTH,
    LLAMA,
    VOCAB_SIZE,
    family,
    make_mesh,
    make_model,
    model_maker,
    packed_rows,
    put,
    variant,
)  # fmt: skip

from llm_jax import config
from llm_jax.model.norm import Norm
from llm_jax.model.position import rotate, sinusoidal
from llm_jax.safety.structure import named_leaves
from llm_jax.training.losses import Weights, loss_sums
from llm_jax.training.state import model_shape

GOLDEN = pathlib.Path(__file__).parent / "golden"


def logits(model, *rows) -> np.ndarray:
    """float32 [B, T, V] from tokens_BT, segments_BT, positions_BT, on one device."""
    return np.asarray(_logits(model, *put(rows, make_mesh())))


@functools.partial(jax.jit, compiler_options=FAST)
def _logits(model, tokens_BT, segments_BT, positions_BT):
    return model.logits(model(tokens_BT, segments_BT, positions_BT)[0])


@functools.partial(jax.jit, compiler_options=FAST)
def loss_and_gradient(model, batch):
    def mean(model):
        objective, counts = loss_sums(model, batch, weights=Weights(z_loss=1e-3), chunk=None)
        return objective / counts["tokens"]

    return jax.value_and_grad(mean)(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_leak_from_the_future_or_another_document(name):
    lengths = {1: 9, 2: 14, 3: 1, 4: 3, 0: 5}  # of the documents, and of the padding
    segments = np.repeat(np.array(list(lengths), np.int32), list(lengths.values()))
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths.values()])
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=LENGTH).astype(np.int32)
    rows = {"tokens": tokens[None], "segments": segments[None], "positions": positions[None]}
    with jax.set_mesh(make_mesh()):
        model = family(name)
        before = logits(model, rows["tokens"], rows["segments"], rows["positions"])[0]
        for j in range(LENGTH):
            changed = rows["tokens"].copy()
            changed[0, j] = (tokens[j] + 1) % VOCAB_SIZE
            after = logits(model, changed, rows["segments"], rows["positions"])[0]
            unaffected = (np.arange(LENGTH) < j) | (segments != segments[j])
            np.testing.assert_array_equal(after[unaffected], before[unaffected])
            assert (after != before)[~unaffected].any(axis=1).all(), f"token {j} changes nothing in its document"
        # A document does not know where in the row it stands.
        second = np.flatnonzero(segments == 2)
        alone = {name: np.zeros_like(values) for name, values in rows.items()}
        for kind in rows:
            alone[kind][0, : len(second)] = rows[kind][0, second]
        moved = logits(model, alone["tokens"], alone["segments"], alone["positions"])[0, : len(second)]
        np.testing.assert_allclose(moved, before[second], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_matter(name):
    """Without them, attention over equal tokens would say the same everywhere."""
    tokens = np.array([[3, 5] * (LENGTH // 2)], np.int32)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    with jax.set_mesh(make_mesh()):
        model = family(name)
        result = logits(model, tokens, np.ones_like(tokens), positions)[0]
    assert np.abs(result[3::2] - result[1:-2:2]).max(axis=1).min() > 1e-3


vectors = st.lists(st.floats(-2, 2, width=32), min_size=8, max_size=8)


@hypothesis.given(vectors, vectors, st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
@hypothesis.settings(max_examples=30, deadline=None)
def test_rope_sees_only_distances(q, k, query, key, shift):
    def score(query, key):
        turned = _rotate(np.array([[[q], [k]]], np.float32), np.array([[query, key]], np.int32))
        return float(turned[0, 0, 0] @ turned[0, 1, 0])

    # Angles are float32: at position 1000 they are exact to 6e-5.
    assert score(query, key) == pytest.approx(score(query + shift, key + shift), abs=3e-3)
    assert score(key, key) == pytest.approx(float(np.dot(np.float32(q), np.float32(k))), abs=1e-4)


_rotate = jax.jit(lambda x_BTNH, positions_BT: rotate(x_BTNH, positions_BT, 100.0))


def test_rope_turns_pairs_as_complex_numbers():
    x_BTNH = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions_BT = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]], np.int32)
    turn = np.exp(1j * positions_BT[:, :, None, None] * 100.0 ** (-2 * np.arange(4) / 8))
    turned = (x_BTNH[..., :4] + 1j * x_BTNH[..., 4:]) * turn
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(_rotate(x_BTNH, positions_BT), expected, rtol=1e-5, atol=1e-5)


def test_sinusoidal_positions():
    positions_BT = np.array([[0, 1, 2, 50], [3, 0, 1, 0]], np.int32)
    table = np.array(
        [[f(p / 10_000 ** (i / 4)) for f in (math.sin, math.cos) for i in range(4)] for p in range(51)], np.float32
    )
    np.testing.assert_allclose(sinusoidal(positions_BT, 8), table[positions_BT], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centred, use_bias", [(False, False), (True, True), (True, False)])
def test_norms_equal_numpy(centred, use_bias):
    rng = np.random.default_rng(0)
    x = (3 * rng.normal(size=(2, 5, 16)) + 1).astype(np.float32)
    with jax.set_mesh(make_mesh()):
        norm = Norm(16, centred=centred, use_bias=use_bias, epsilon=0.1)
        scale, bias = rng.normal(size=(2, 16)).astype(np.float32)
        norm.scale = nnx.Param(jnp.asarray(scale))
        if use_bias:
            norm.bias = nnx.Param(jnp.asarray(bias))
        y, y16 = norm(x), norm(jnp.asarray(x, jnp.bfloat16))
    centre = x - x.mean(-1, keepdims=True) if centred else x
    expected = centre / np.sqrt((centre**2).mean(-1, keepdims=True) + 0.1) * scale + (bias if use_bias else 0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert y16.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y16, np.float32), expected, atol=2**-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_feed_forward_equals_numpy(name):
    with jax.set_mesh(make_mesh()):
        model = family(name)
        layer = jax.tree.map(lambda leaf: leaf[1], model.blocks).feed_forward
        x = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
        y = layer(x, jax.P(None, None, None))
    weights = {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(layer).items()}
    up = x @ weights["w_up"]
    if name == "llama":
        assert model.shape.feed_forward_width == 96  # 8/3 of 32 is 85.3
        gate = x @ weights["w_gate"]
        expected = (gate / (1 + np.exp(-gate)) * up) @ weights["w_down"]
    else:
        assert model.shape.feed_forward_width == 128
        erf = np.vectorize(math.erf)(up / math.sqrt(2))
        expected = (0.5 * up * (1 + erf)) @ weights["w_down"]
    # The tanh form of GELU differs from the exact one by up to 5e-4 (Hendrycks & Gimpel 2016, arXiv:1606.08415).
    np.testing.assert_allclose(y, expected, atol=1e-3 if name == "gpt2" else 1e-6)


def describe_parameters(model: config.Model) -> str:
    with jax.set_mesh(make_mesh()):
        parameters = jax.eval_shape(model_maker(model))
    return "".join(f"{name} {list(leaf.shape)} {leaf.dtype}\n" for name, leaf in named_leaves(parameters).items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_parameter_names_are_those_of_existing_checkpoints(name):
    path, found = GOLDEN / f"parameter_names_{name}.txt", describe_parameters(FAMILIES[name])
    if os.environ.get("LLM_JAX_WRITE_GOLDEN"):
        path.write_text(found, "utf-8")
    assert path.read_text("utf-8") == found, (
        f"the names or shapes of the parameters are the checkpoint format, and they changed against {path.name}. If "
        "that is meant, run `LLM_JAX_WRITE_GOLDEN=1 python -m pytest tests/test_transformer.py -k names` and say in "
        "the commit that earlier checkpoints cannot be read"
    )


def test_number_of_parameters():
    def count(model):
        with jax.set_mesh(make_mesh()):
            return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model_maker(model))))

    V, D, L, T = VOCAB_SIZE, 32, 2, LENGTH
    N, K, H, F = 8, 4, 8, 96
    attention = D * N * H + 2 * D * K * H + N * H * D
    assert count(LLAMA) == 2 * V * D + L * (attention + 2 * H + 3 * D * F + 2 * D) + D

    # GPT-2: the sum that is known as 124M for its V, D, L, T = 50257, 768, 12, 1024
    def gpt2(V, D, L, T):
        return V * D + T * D + L * (12 * D * D + 13 * D) + 2 * D

    assert gpt2(50257, 768, 12, 1024) == 124_439_808
    assert count(GPT2) == gpt2(V, D, L, T)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_leaf_is_a_parameter_in_float32(name):
    with jax.set_mesh(make_mesh()):
        model = jax.eval_shape(model_maker(FAMILIES[name]))
    variables = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    assert {type(variable) for variable in variables} == {nnx.Param}
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}


def test_scan_unroll_and_remat_change_no_result():
    """On one device, and where the weights of a block are gathered."""
    variants = {
        1: [(False, "none"), (True, "full")],
        8: [(False, "gathers"), (True, "gathers")],
    }
    results = []
    for fsdp, kinds in variants.items():
        mesh = make_mesh(fsdp=fsdp)
        with jax.set_mesh(mesh):
            model, batch = make_model(LLAMA), put(packed_rows(8), mesh)
            for unroll, remat in kinds:
                result = loss_and_gradient(variant(model, unroll=unroll, remat=remat), batch)
                results.append([np.asarray(leaf) for leaf in jax.tree.leaves(result)])
    for result in results[1:]:
        for leaf, expected in zip(result, results[0], strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 512])
def test_first_loss_is_that_of_a_guess(width, tied):
    model = config.Model(num_layers=4, width=width, num_heads=4, tie_embeddings=tied, dtype="float32")
    assert abs(first_loss(model, vocab_size=512) - math.log(512)) < 0.5


@pytest.mark.parametrize("name", ["gpt2", "sinusoidal"])
def test_first_loss_of_other_families(name):
    assert abs(first_loss(FAMILIES[name], vocab_size=512) - math.log(512)) < 0.5


def first_loss(model: config.Model, vocab_size: int) -> float:
    rng = np.random.default_rng(0)
    tokens_BU = rng.integers(vocab_size, size=(8, LENGTH + 1)).astype(np.int32)
    positions_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (8, 1))
    with jax.set_mesh(make_mesh()):
        made = make_model(model, vocab_size=vocab_size)
        logits_BTV = logits(made, tokens_BU[:, :-1], np.ones_like(positions_BT), positions_BT).astype(np.float64)
    log_z = np.log(np.exp(logits_BTV).sum(-1))
    return float(np.mean(log_z - np.take_along_axis(logits_BTV, tokens_BU[:, 1:, None].astype(int), -1)[..., 0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_every_layer_gets_a_gradient(name):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        model = family(name)
        _, gradient = loss_and_gradient(model, put(packed_rows(8), mesh))
    for path, leaf in named_leaves(gradient).items():
        layers = np.asarray(leaf).reshape(leaf.shape[0] if path.startswith("blocks/") else 1, -1)
        assert np.isfinite(layers).all() and np.abs(layers).max(axis=1).min() > 0, path


def test_bfloat16_computes_nearly_the_same_with_float32_parameters():
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        model, batch = family("llama"), put(packed_rows(8), mesh)
        loss, gradient = loss_and_gradient(model, batch)
        model16 = make_model(dataclasses.replace(LLAMA, dtype="bfloat16"))
        loss16, gradient16 = loss_and_gradient(model16, batch)
    assert float(loss16) == pytest.approx(float(loss), rel=1e-3)
    for (name, leaf), leaf16 in zip(named_leaves(gradient).items(), jax.tree.leaves(gradient16), strict=True):
        assert leaf16.dtype == jnp.float32
        error = np.linalg.norm(np.asarray(leaf16 - leaf)) / np.linalg.norm(np.asarray(leaf))
        assert error < 0.05, (name, error)


def test_shape_resolves_every_none():
    shape = model_shape(config.Model(width=768, num_heads=12), vocab_size=100, sequence_length=7)
    assert (shape.num_kv_heads, shape.head_width, shape.feed_forward_width) == (12, 64, 2048)
    shape = model_shape(config.Model(width=768, num_heads=12, activation="gelu"), vocab_size=100, sequence_length=7)
    assert (shape.feed_forward_width, shape.max_length) == (3072, 7)
