import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import FAST, RULES, make_mesh

from llm_jax.kernels.cross_entropy import cross_entropy, reference_cross_entropy, token_statistics

MESHES = [(1, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]
# 8 rows of 7 tokens, over 1 to 8 devices: chunks of 3 and 5 need padding on each mesh
SETTINGS = [(None, 0.0, None), (5, 1e-2, None), (3, 1e-2, 2.0)]


def inputs(dtype=jnp.float32, batch_size=8, length=7, width=16, vocab_size=32):
    rng = np.random.default_rng(0)
    hidden_BTD = jnp.asarray(2 * rng.normal(size=(batch_size, length, width)), dtype)
    head_DV = jnp.asarray(rng.normal(size=(width, vocab_size)), dtype)
    targets_BT = rng.integers(vocab_size, size=(batch_size, length)).astype(np.int32)
    weights_BT = rng.choice([0.0, 1.0, 0.5], size=(batch_size, length)).astype(np.float32)
    return hidden_BTD, head_DV, targets_BT, weights_BT


def put(mesh, hidden_BTD, head_DV, *arrays_BT):
    """The inputs in the shardings that cross_entropy asks for."""
    specs = [RULES.spec("batch", "length", None), RULES.spec("table_embed", "vocab")]
    specs += [RULES.spec("batch", "length")] * len(arrays_BT)
    arrays = (hidden_BTD, head_DV, *arrays_BT)
    return [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]


@functools.partial(jax.jit, static_argnums=(4, 5, 6), compiler_options=FAST)
def value_and_gradients(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss, soft_cap, chunk):
    def loss(hidden_BTD, head_DV):
        objective, nll = cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss, soft_cap, chunk, RULES)
        return 0.25 * objective, (objective, nll)  # a cotangent that is not 1

    gradients, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden_BTD, head_DV)
    forward_only = cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss, soft_cap, chunk, RULES)
    return sums, gradients, forward_only


def reference(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss, soft_cap):
    def loss(hidden_BTD, head_DV):
        sums = reference_cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss=z_loss, soft_cap=soft_cap)
        return 0.25 * sums[0], sums

    gradients, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden_BTD, head_DV)
    return sums, gradients


@pytest.mark.parametrize("chunk, z_loss, soft_cap", SETTINGS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_value_and_gradients_equal_those_of_the_definition(mesh, chunk, z_loss, soft_cap):
    arrays = inputs()
    expected_sums, expected_gradients = reference(*arrays, z_loss, soft_cap)
    mesh = make_mesh(*mesh)
    with jax.set_mesh(mesh):
        placed = put(mesh, *arrays)
        sums, gradients, forward_only = value_and_gradients(*placed, z_loss, soft_cap, chunk)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)
    np.testing.assert_allclose(forward_only, expected_sums, rtol=1e-5)
    for gradient, expected, argument in zip(gradients, expected_gradients, placed[:2], strict=True):
        assert gradient.sharding == argument.sharding
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_definition_in_float64():
    hidden, head, targets, weights = (np.asarray(a, np.float64) for a in inputs())
    logits = 3 * np.tanh(hidden @ head / 3)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets.astype(int)[..., None], -1)[..., 0]
    expected = (weights * (nll + 0.1 * log_z**2)).sum(), (weights * nll).sum()
    np.testing.assert_allclose(reference_cross_entropy(*inputs(), z_loss=0.1, soft_cap=3.0), expected, rtol=1e-5)


def test_no_gradient_flows_through_the_reported_loss():
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        hidden, head, targets, weights = put(mesh, *inputs())

        def nll(hidden, head):
            return cross_entropy(hidden, head, targets, weights, 0.0, None, None, RULES)[1]

        assert all(not np.any(gradient) for gradient in jax.grad(nll, argnums=(0, 1))(hidden, head))


def test_tokens_of_weight_zero_count_nothing_even_if_they_are_absurd():
    hidden, head, targets, weights = inputs()
    absurd = jnp.where((weights == 0)[..., None], 1e6, hidden)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        sums, (d_hidden, d_head), _ = value_and_gradients(*put(mesh, absurd, head, targets, weights), 0.0, None, 5)
        expected, (_, expected_d_head), _ = value_and_gradients(
            *put(mesh, hidden, head, targets, weights), 0.0, None, 5
        )
    np.testing.assert_allclose(sums, expected, rtol=1e-6)
    np.testing.assert_allclose(d_head, expected_d_head, rtol=1e-5, atol=1e-6)
    assert not np.any(np.asarray(d_hidden)[weights == 0])


def test_bfloat16_inputs_are_as_exact_as_their_rounding():
    arrays = inputs(jnp.bfloat16)
    exact = [jnp.asarray(a, jnp.float32) for a in arrays[:2]]
    expected_sums, expected_gradients = reference(*exact, *arrays[2:], 1e-2, None)
    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        sums, gradients, _ = value_and_gradients(*put(mesh, *arrays), 1e-2, None, 5)
    assert [s.dtype for s in sums] == [jnp.float32] * 2 and [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)  # sums and logits are float32
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        largest = np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(gradient, np.float32), expected, atol=2**-7 * largest)


def largest_array(compiled) -> int:
    """Elements of the largest array that the compiled program mentions."""
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


def test_the_logits_of_all_tokens_never_exist_at_once():
    arrays = inputs(batch_size=8, length=32, width=8, vocab_size=128)
    num_logits = 8 * 32 * 128
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        placed = put(mesh, *arrays)
        whole, chunked = (value_and_gradients.lower(*placed, 1e-2, 2.0, chunk).compile() for chunk in (None, 16))
        assert largest_array(whole) >= num_logits  # they fit into one chunk
        assert largest_array(chunked) <= num_logits // 16
        statistics = jax.jit(functools.partial(token_statistics, soft_cap=None, chunk=16, rules=RULES))
        assert largest_array(statistics.lower(*placed[:3]).compile()) <= num_logits // 16


@pytest.mark.parametrize("chunk, soft_cap", [(None, None), (5, 8.0)])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_token_statistics_equal_numpy(mesh, chunk, soft_cap):
    hidden, head, targets, _ = inputs()
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logits, axis=-1)
    expected_rank = np.argmax(order == targets[..., None], axis=-1)
    expected_nll = -np.take_along_axis(log_probability, targets[..., None], -1)[..., 0]
    mesh = make_mesh(*mesh)
    with jax.set_mesh(mesh):
        nll, rank = jax.jit(functools.partial(token_statistics, soft_cap=soft_cap, chunk=chunk, rules=RULES))(
            *put(mesh, hidden, head, targets)
        )
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rank, expected_rank)
    assert rank.dtype == jnp.int32
