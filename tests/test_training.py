"""The training step: the same losses however it is spread, cut or scheduled."""

import dataclasses
import functools
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import FAMILIES, FAST, GPT2, LENGTH, LLAMA, VOCAB_SIZE, family, make_mesh, packed_rows, put
from tiny_training import BATCH_SIZE, BATCHES, OPTIMIZER, build, losses

from llm_jax import config
from llm_jax.safety.structure import named_leaves
from llm_jax.training.losses import target_weights, token_losses
from llm_jax.training.step import batch_digest

GOLDEN = pathlib.Path(__file__).parent / "golden" / "losses.json"


@pytest.fixture(scope="module")
def llama_losses():
    return losses(make_mesh(), LLAMA)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2)], ids=str)
def test_microbatches_give_the_same_losses(mesh, llama_losses):
    counts = [int(target_weights(BATCHES[0]["segments"])[i::4].sum()) for i in range(4)]
    assert len(set(counts)) == 4  # so that a mean of means would differ
    np.testing.assert_allclose(losses(make_mesh(*mesh), LLAMA, num_microbatches=4), llama_losses, rtol=1e-4)


@pytest.mark.parametrize(
    "layers, remat, chunk", [("unroll", "none", 50), ("unroll", "dots", None), ("scan", "full", None)]
)
def test_unroll_remat_and_chunks_give_the_same_losses(layers, remat, chunk, llama_losses):
    model = dataclasses.replace(LLAMA, layers=layers, remat=remat)
    np.testing.assert_allclose(losses(make_mesh(), model, chunk=chunk), llama_losses, rtol=1e-4)


def test_golden_losses(llama_losses):
    found = {"llama": llama_losses, "gpt2": losses(make_mesh(), GPT2)}
    if os.environ.get("LLM_JAX_WRITE_GOLDEN"):
        rounded = {name: [round(loss, 4) for loss in values] for name, values in found.items()}
        GOLDEN.write_text(json.dumps(rounded, indent=2) + "\n", "utf-8")
    for name, expected in json.loads(GOLDEN.read_text("utf-8")).items():
        np.testing.assert_allclose(
            found[name], expected, rtol=1e-4, atol=1e-4,
            err_msg=f"the losses of {name} are not those of {GOLDEN.name}: the numerics changed. If that is meant, run "
            "`LLM_JAX_WRITE_GOLDEN=1 python -m pytest tests/test_training.py -k golden` and say so in the commit",
        )  # fmt: skip


def test_it_learns(llama_losses):
    """The entropy of the steps between the tokens is 1.17 nats; a guess is ln 64 = 4.16."""
    assert abs(llama_losses[0] - math.log(VOCAB_SIZE)) < 0.5
    assert llama_losses[-1] < llama_losses[0] - 0.5


def log_probabilities(model, batch) -> np.ndarray:
    """[B, T, V], in float64, from the logits."""
    logits = jax.jit(lambda model, *inputs: model.logits(model(*inputs)[0]), compiler_options=FAST)
    inputs = put([batch[name][:, :-1] for name in ("tokens", "segments", "positions")], make_mesh())
    logits_BTV = np.asarray(logits(model, *inputs), np.float64)
    return logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))


def test_the_metrics_of_a_step():
    mesh, batch = make_mesh(), BATCHES[0]
    with jax.set_mesh(mesh):
        init, step = build(mesh, GPT2)
        state = init()
        log_probability_BTV = log_probabilities(state.parameters, batch)
        after, metrics = step(state, put(batch, mesh))
        after, second = step(after, put(BATCHES[1], mesh))
    tokens = loss = 0
    for b, t in np.ndindex(BATCH_SIZE, LENGTH):
        if batch["segments"][b, t + 1] and batch["segments"][b, t] == batch["segments"][b, t + 1]:
            tokens += 1
            loss -= log_probability_BTV[b, t, batch["tokens"][b, t + 1]]
    assert metrics["tokens"] == tokens < BATCH_SIZE * LENGTH - 50
    assert metrics["loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert [float(m["learning_rate"]) for m in (metrics, second)] == pytest.approx([2e-3, 4e-3])
    assert int(after.step) == 2
    norms = named_leaves(metrics["gradient_norms"])
    assert norms["blocks/attention/wq"].shape == (2,) and norms["embed"].shape == ()
    assert list(norms) == list(named_leaves(after.parameters))
    squares = sum(float(np.square(norm).sum()) for norm in norms.values())
    assert metrics["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    norms = named_leaves(metrics["parameter_norms"])
    for name, leaf in named_leaves(state.parameters).items():
        leaves = np.asarray(leaf, np.float64).reshape(leaf.shape[0] if name.startswith("blocks/") else 1, -1)
        np.testing.assert_allclose(np.atleast_1d(norms[name]), np.linalg.norm(leaves, axis=1), rtol=1e-5)
    assert (metrics["spike"].dtype, metrics["skipped"].dtype) == (bool, bool)


def test_the_gradient_is_the_slope_of_the_mean_loss():
    """Central differences of the loss along the gradient, by plain SGD steps forth and back."""
    optimizer = config.Optimizer(
        name="sgd",
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        beta1=0.0,
        clip_norm=None,
        peak_learning_rate=1e-2,
    )
    mesh, batch = make_mesh(), BATCHES[0]
    weights = np.asarray(target_weights(batch["segments"]))

    def objective(parameters):
        log_p = log_probabilities(parameters, batch)
        nll = -np.take_along_axis(log_p, batch["tokens"][:, 1:, None].astype(int), -1)[..., 0]
        return (weights * nll).sum() / weights.sum()

    with jax.set_mesh(mesh):
        init, step = build(mesh, LLAMA, optimizer=optimizer, z_loss=0.0)
        state = init()
        after, metrics = step(state, put(batch, mesh))
        back = jax.tree.map(lambda old, new: 2 * old - new, state.parameters, after.parameters)
        slope = (objective(back) - objective(after.parameters)) / (2 * 1e-2)
    assert slope == pytest.approx(float(metrics["grad_norm"]) ** 2, rel=1e-3)


def test_a_step_is_deterministic_and_padding_counts_nothing():
    mesh, batch = make_mesh(), BATCHES[0]
    other = {**batch, "tokens": np.where(batch["segments"] == 0, 11, batch["tokens"])}
    assert (other["tokens"] != batch["tokens"]).any()
    with jax.set_mesh(mesh):
        init, step = build(mesh, LLAMA)
        first, again, padded = (step(init(), put(rows, mesh)) for rows in (batch, batch, other))
    for leaf, same in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(leaf, same)
    assert first[1].pop("batch") != padded[1].pop("batch")  # of all tokens
    for leaf, same in zip(jax.tree.leaves(first), jax.tree.leaves(padded), strict=True):
        np.testing.assert_array_equal(leaf, same)


def test_the_digest_of_a_batch_sees_every_token_on_any_mesh():
    tokens, digests = BATCHES[0]["tokens"], set()
    for mesh in (make_mesh(), make_mesh(fsdp=8), make_mesh(fsdp=4, tensor=2)):
        with jax.set_mesh(mesh):
            digests.add(int(jax.jit(batch_digest)(put({"tokens": tokens}, mesh)["tokens"])))
    changed = [tokens[::-1]] + [tokens.copy() for _ in range(40)]
    for other, place in zip(changed[1:], np.linspace(0, tokens.size - 1, 40).astype(int), strict=True):
        other.flat[place] ^= 1
    assert len(digests) == 1
    assert len(digests | {int(batch_digest(jnp.asarray(other))) for other in changed}) == 42


def test_a_batch_of_nothing_but_padding_is_finite_and_only_decays():
    mesh, batch = make_mesh(), {name: np.zeros_like(rows) for name, rows in BATCHES[0].items()}
    with jax.set_mesh(mesh):
        init, step = build(mesh, LLAMA)
        before = init()
        after, metrics = step(before, put(batch, mesh))
    assert (metrics["loss"], metrics["tokens"], metrics["grad_norm"]) == (0, 0, 0)
    after = named_leaves(after.parameters)
    for name, leaf in named_leaves(before.parameters).items():
        decay = 0.0 if name.endswith("scale") else float(metrics["learning_rate"]) * OPTIMIZER.weight_decay
        np.testing.assert_allclose(after[name], (1 - decay) * leaf, rtol=1e-6)


def test_state_is_float32_when_the_computation_is_bfloat16():
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        init, step = build(mesh, dataclasses.replace(LLAMA, dtype="bfloat16"), num_microbatches=2)
        state, metrics = jax.eval_shape(step, jax.eval_shape(init), put(BATCHES[0], mesh))
    assert [metrics.pop(name).dtype for name in ("batch", "spike", "skipped")] == [jnp.uint32, bool, bool]
    assert {leaf.dtype for leaf in jax.tree.leaves((state.parameters, metrics))} == {jnp.dtype("float32")}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.optimizer)} == {"float32", "int32"}


CONSTANT = config.Optimizer(peak_learning_rate=1e-3, schedule="constant", warmup_steps=0)
SPIKE = packed_rows(BATCH_SIZE, seed=99)
SPIKE["tokens"] = np.full_like(SPIKE["tokens"], 7)  # every gradient points the same way


def all_but_step(state) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items() if name != "step"}


def assert_same_bits(states, others):
    assert list(states) == list(others)
    for name, leaf in states.items():
        assert leaf.tobytes() == others[name].tobytes(), name


def with_nan(state, *, step: int):
    """A state whose next loss is NaN."""
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan) if leaf.ndim == 1 else leaf, state.parameters)
    return dataclasses.replace(state, step=jax.device_put(np.int32(step), state.step.sharding), parameters=broken)


@pytest.mark.parametrize("mesh, num_microbatches", [((1, 1, 1), 1), ((1, 2, 4), 1), ((1, 2, 4), 2)], ids=str)
def test_a_spike_leaves_no_bit_behind(mesh, num_microbatches):
    """A batch of one token among batches to learn from: skipped, the run is the one that never saw it."""
    mesh = make_mesh(*mesh)
    with jax.set_mesh(mesh):
        init, step = build(
            mesh, LLAMA, optimizer=CONSTANT, skip=True, threshold=4.0, ema_decay=0.9, num_microbatches=num_microbatches
        )
        state, clean, skipped = init(), init(), []
        for number, batch in enumerate(BATCHES[:12]):
            if number == 10:
                before = all_but_step(state)
                state, metrics = step(state, put(SPIKE, mesh))
                assert metrics["spike"] and metrics["skipped"] and int(state.step) == 11
                assert_same_bits(all_but_step(state), before)
            state, metrics = step(state, put(batch, mesh))
            clean, same = step(clean, put(batch, mesh))
            assert float(metrics["loss"]) == float(same["loss"])
            skipped.append(bool(metrics["skipped"] | metrics["spike"]))
        assert step._cache_size() == 1
    assert not any(skipped)
    assert (int(state.step), int(clean.step), int(state.history.count)) == (13, 12, 12)
    assert_same_bits(all_but_step(state), all_but_step(clean))


@pytest.mark.parametrize("skip", [True, False])
def test_what_is_not_finite(skip):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        init, step = build(mesh, LLAMA, optimizer=CONSTANT, skip=skip, threshold=4.0, ema_decay=0.9)
        broken = with_nan(init(), step=7)
        before = all_but_step(broken)
        state, metrics = step(broken, put(BATCHES[0], mesh))
    assert np.isnan(metrics["loss"]) and not metrics["spike"] and bool(metrics["skipped"]) == skip
    assert int(state.step) == 8 and int(state.history.count) == 0
    after = all_but_step(state)
    if skip:
        assert_same_bits(after, before)
    else:
        assert all(np.isnan(after[name]).any() for name in ("parameters/head", "optimizer/1/mu/head", "ema/head"))


def test_without_skip_a_spike_is_an_update_like_any_other():
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        init, step = build(mesh, LLAMA, optimizer=CONSTANT, threshold=4.0)
        state = init()
        for batch in BATCHES[:10]:
            state, metrics = step(state, put(batch, mesh))
            assert not metrics["spike"]
        after, metrics = step(state, put(SPIKE, mesh))
    assert metrics["spike"] and not metrics["skipped"] and after.ema is None
    assert (np.asarray(after.parameters.head) != np.asarray(state.parameters.head)).any()
    assert after.history.count == 11  # it follows where the loss goes for good
    assert metrics["loss"] in np.asarray(after.history.loss_W)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2)], ids=str)
def test_the_average_equals_numpy_and_lies_as_the_parameters(mesh):
    mesh = make_mesh(*mesh)
    with jax.set_mesh(mesh):
        init, step = build(mesh, LLAMA, ema_decay=0.7)
        state = init()
        expected = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(state.parameters).items()}
        for batch in BATCHES[:5]:
            state, _ = step(state, put(batch, mesh))
            for name, leaf in named_leaves(state.parameters).items():
                expected[name] = 0.7 * expected[name] + 0.3 * np.asarray(leaf, np.float64)
    assert list(named_leaves(state.ema)) == list(expected)
    parameters = named_leaves(state.parameters)
    for name, leaf in named_leaves(state.ema).items():
        assert leaf.dtype == jnp.float32 and leaf.sharding == parameters[name].sharding
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6)


def test_the_average_begins_as_the_parameters_in_memory_of_its_own():
    """Or donating the state would donate one array twice."""
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        init, _ = build(mesh, LLAMA, ema_decay=0.7)
        state = init()
        assert_same_bits(all_but_step(state.ema), all_but_step(state.parameters))
        jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", FAMILIES)
def test_token_losses_of_each_position(name):
    mesh, batch = make_mesh(), BATCHES[0]
    with jax.set_mesh(mesh):
        log_p = log_probabilities(family(name), batch)
        losses_of = jax.jit(functools.partial(token_losses, chunk=100), compiler_options=FAST)
        nll_BT, rank_BT = losses_of(family(name), put(batch, mesh))
    expected = np.take_along_axis(log_p, batch["tokens"][:, 1:, None].astype(int), -1)
    np.testing.assert_allclose(nll_BT, -expected[..., 0], rtol=1e-4, atol=1e-5)
    assert np.mean(np.asarray(rank_BT) == (log_p > expected).sum(-1)) > 0.999  # near-equals may change places


def test_target_weights():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [3, 4, 4, 4, 4, 4, 4], [0, 0, 0, 0, 0, 0, 0]], np.int32)
    expected = [[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(target_weights(segments), expected)
