"""Optimizers against numpy, and schedules against values computed by hand."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import FAST, GPT2, LLAMA, make_mesh, model_maker

from llm_jax import config
from llm_jax.safety.structure import named_leaves
from llm_jax.training.optimizer import is_matrix, make_optimizer
from llm_jax.training.schedule import make_schedule

PEAK = 0.5
RATE = 0.1


def schedule(total_steps, **settings):
    optimizer = config.Optimizer(peak_learning_rate=PEAK, **settings)
    return lambda step: float(make_schedule(optimizer, total_steps)(jnp.asarray(step)))


@pytest.mark.parametrize("name", config.SCHEDULES)
def test_warm_up_is_a_line_that_reaches_the_peak_at_its_last_update(name):
    rate = schedule(20, schedule=name, warmup_steps=4, decay_steps=3 if name == "wsd" else None)
    assert [rate(step) for step in range(4)] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])


# Update u of 1 .. 20 is made at step u - 1; 4 of warm-up, so 16 that decay.
@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("cosine", {}, {12: PEAK * (0.1 + 0.9 / 2), 8: PEAK * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), 20: PEAK * 0.1}),
        ("linear", {}, {5: PEAK * (1 - 0.9 / 16), 12: PEAK * 0.55, 20: PEAK * 0.1}),
        ("wsd", {"decay_steps": 5}, {5: PEAK, 15: PEAK, 16: PEAK * (1 - 0.9 / 5), 19: PEAK * 0.28, 20: PEAK * 0.1}),
        ("wsd", {}, {18: PEAK, 19: PEAK * 0.55, 20: PEAK * 0.1}),  # a tenth of 20 updates
        ("rsqrt", {}, {5: PEAK * math.sqrt(4 / 5), 16: PEAK / 2, 20: PEAK * math.sqrt(4 / 20)}),
        ("constant", {}, {5: PEAK, 20: PEAK}),
    ],
)
def test_after_the_warm_up(name, settings, expected):
    rate = schedule(20, schedule=name, warmup_steps=4, **settings)
    assert {update: rate(update - 1) for update in expected} == pytest.approx(expected, rel=1e-5)


def test_schedules_without_warm_up_or_down_to_zero():
    assert schedule(10, schedule="linear", warmup_steps=0, final_fraction=0.0)(4) == pytest.approx(PEAK / 2)
    assert schedule(10, schedule="linear", warmup_steps=0, final_fraction=0.0)(9) == 0
    assert schedule(10, schedule="wsd", warmup_steps=0, decay_steps=10)(9) == pytest.approx(PEAK / 10)
    assert schedule(10, schedule="cosine", warmup_steps=1)(0) == PEAK


def abstract(model):
    with jax.set_mesh(make_mesh()):
        return jax.eval_shape(model_maker(model))


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_matrices_are_told_from_scales_and_biases(model):
    decayed = named_leaves(is_matrix(abstract(model)))
    kinds = {path.split("/")[-1]: is_decayed for path, is_decayed in decayed.items()}
    matrices = {"embed", "position_embed", "head", "wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}
    vectors = {"scale", "bias", "bq", "bk", "bv", "bo", "b_up", "b_down"}
    assert kinds == {name: name in matrices for name in kinds} and set(kinds) <= matrices | vectors
    assert len(kinds) == (10 if model is LLAMA else 16)


def adamw(gradients, o):
    mean = square = 0.0
    for t, g in enumerate(gradients, start=1):
        mean, square = o.beta1 * mean + (1 - o.beta1) * g, o.beta2 * square + (1 - o.beta2) * g**2
        yield mean / (1 - o.beta1**t) / (np.sqrt(square / (1 - o.beta2**t)) + o.epsilon)


def lion(gradients, o):
    momentum = 0.0
    for g in gradients:
        yield np.sign(o.beta1 * momentum + (1 - o.beta1) * g)
        momentum = o.beta2 * momentum + (1 - o.beta2) * g


def sgd(gradients, o):
    momentum = 0.0
    for g in gradients:
        momentum = g + o.beta1 * momentum
        yield momentum


@pytest.mark.parametrize("directions", [adamw, lion, sgd], ids=lambda f: f.__name__)
def test_updates_equal_numpy(directions):
    """Over several steps of the whole model: direction, rate, and decay of matrices only, scaled by the rate."""
    settings = config.Optimizer(
        name=directions.__name__, peak_learning_rate=RATE, schedule="constant", warmup_steps=2, clip_norm=None,
        beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.3,
    )  # fmt: skip
    optimizer = make_optimizer(settings, total_steps=4)

    @jax.jit
    def update(gradient, state, parameters, step):
        updates, state = optimizer.update(gradient, state, parameters, step=step)
        return optax.apply_updates(parameters, updates), state

    parameters = random_like(abstract(GPT2), seed=0)
    gradients = [random_like(parameters, seed=seed) for seed in (1, 2, 3, 4)]
    expected = {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(parameters).items()}
    assert len(expected) == 20
    for path, value in expected.items():
        decay = 0.0 if path.split("/")[-1][0] == "b" or path.endswith("scale") else 0.3
        history = [np.asarray(named_leaves(gradient)[path], np.float64) for gradient in gradients]
        for rate, direction in zip((RATE / 2, RATE, RATE, RATE), directions(history, settings), strict=True):
            value = value - rate * (direction + decay * value)
        expected[path] = value
    state = optimizer.init(parameters)
    for step, gradient in enumerate(gradients):
        parameters, state = update(gradient, state, parameters, step)
    for path, leaf in named_leaves(parameters).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_clipping_by_the_norm_of_the_whole_gradient():
    settings = dict(name="sgd", peak_learning_rate=RATE, schedule="constant", warmup_steps=0, weight_decay=0.0)
    parameters = random_like(abstract(LLAMA), seed=0)
    gradient = random_like(parameters, seed=1)
    norm = math.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradient)))
    for clip_norm, factor in ((1.0, 1 / norm), (norm + 1, 1.0), (None, 1.0)):
        optimizer = make_optimizer(config.Optimizer(**settings, clip_norm=clip_norm), 10)
        update, _ = jax.jit(optimizer.update)(gradient, optimizer.init(parameters), parameters, step=0)
        for leaf, g in zip(jax.tree.leaves(update), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(leaf, -RATE * factor * g, rtol=1e-4)


def test_the_rate_is_that_of_the_step_however_many_updates_were_made():
    settings = config.Optimizer(name="sgd", schedule="linear", warmup_steps=4, clip_norm=None, weight_decay=0.0)
    optimizer, schedule = make_optimizer(settings, 20), make_schedule(settings, 20)
    parameters = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract(LLAMA))
    for step in (0, 3, 19):
        updates, _ = optimizer.update(parameters, optimizer.init(parameters), parameters, step=jnp.int32(step))
        np.testing.assert_array_equal(updates.final_norm.scale, np.full(32, -schedule(jnp.int32(step))))


def test_adafactor_keeps_rows_and_columns_and_descends():
    target = random_like(abstract(LLAMA), seed=0)
    optimizer = make_optimizer(
        config.Optimizer(name="adafactor", peak_learning_rate=0.05, warmup_steps=1, weight_decay=0.0), 40
    )

    def step(parameters, state, number):
        gradient = jax.tree.map(jnp.subtract, parameters, target)
        updates, state = optimizer.update(gradient, state, parameters, step=number)
        return optax.apply_updates(parameters, updates), state, optax.tree.norm(gradient)

    step = jax.jit(step, compiler_options=FAST)
    parameters = jax.tree.map(jnp.zeros_like, target)
    state, distances = optimizer.init(parameters), []
    for number in range(40):
        parameters, state, distance = step(parameters, state, number)
        distances.append(float(distance))
    assert np.isfinite(distances).all() and (np.diff(distances) < 0).all() and distances[-1] < 0.5 * distances[0]
    # w_up [L=2, D=32, F=96]: second moments of rows and of columns, one each per layer, and nothing of the full size
    factored = state[1][0]
    rows, columns, full = (
        named_leaves(moments)["blocks/feed_forward/w_up"].shape
        for moments in (factored.v_row, factored.v_col, factored.v)
    )
    assert (rows, columns, full) == ((2, 32), (2, 96), (1,))


COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix):
    """Newton-Schulz as in https://kellerjordan.github.io/posts/muon, of one matrix."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / np.linalg.norm(x)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def muon(gradients):
    """Updates of one matrix: of momentum with a look ahead, both without the bias of their start."""
    momentum = 0.0
    for t, g in enumerate(gradients, start=1):
        momentum = 0.95 * momentum + 0.05 * g
        ahead = 0.95 * momentum / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        yield 0.2 * math.sqrt(max(g.shape)) * orthogonal(ahead)


ROWS = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_gate": 1, "w_up": 1, "w_down": 1}  # dimensions that make the rows
MIXTURE = config.Model(
    num_layers=2, width=32, num_heads=4, pattern=("dense", "moe"), num_experts=3, use_bias=True, dtype="float32"
)  # fmt: skip


@pytest.mark.parametrize("model", [LLAMA, MIXTURE], ids=["llama", "mixture"])
def test_muon_equals_numpy_matrix_by_matrix(model):
    """Of each layer, and each expert; embeddings, head, routers, norms and biases are AdamW's."""
    settings = config.Optimizer(
        name="muon", peak_learning_rate=RATE, schedule="constant", warmup_steps=0, clip_norm=None, weight_decay=0.3
    )
    optimizer = make_optimizer(settings, total_steps=2)
    parameters = random_like(abstract(model), seed=0)
    gradients = [random_like(parameters, seed=seed) for seed in (1, 2)]
    state, updates = optimizer.init(parameters), []
    update = jax.jit(optimizer.update, compiler_options=FAST)
    for step, gradient in enumerate(gradients):
        made, state = update(gradient, state, parameters, step=step)
        updates.append(named_leaves(made))
    orthogonalized = 0
    for path, value in named_leaves(parameters).items():
        name = path.split("/")[-1]
        history = [np.asarray(named_leaves(gradient)[path], np.float64) for gradient in gradients]
        if name not in ROWS:
            expected = list(adamw(history, settings))
        else:
            stack = 2 if name.startswith("w_") and value.ndim == 4 else 1  # layers, and experts
            rows = math.prod(value.shape[stack : stack + ROWS[name]])
            stacked = [g.reshape(math.prod(value.shape[:stack]), rows, -1) for g in history]
            by_matrix = [list(muon(matrices)) for matrices in zip(*stacked, strict=True)]
            expected = [np.stack(matrices).reshape(value.shape) for matrices in zip(*by_matrix, strict=True)]
            orthogonalized += len(by_matrix)
        decay = 0.3 if named_leaves(is_matrix(parameters))[path] else 0.0
        for got, direction in zip(updates, expected, strict=True):
            wanted = -RATE * (direction + decay * np.asarray(value))
            np.testing.assert_allclose(got[path], wanted, rtol=1e-3, atol=1e-4, err_msg=path)
    # LLAMA: 7 matrices in each of 2 layers; MIXTURE: 4 of attention in each, 3 of one layer, and of 3 experts
    assert orthogonalized == {2: 14, 1: 8 + 3 + 9}[2 if model is LLAMA else 1]


def test_muon_makes_all_directions_of_a_matrix_about_equal():
    parameters = random_like(abstract(LLAMA), seed=0)
    optimizer = make_optimizer(config.Optimizer(name="muon", peak_learning_rate=1.0, warmup_steps=0, weight_decay=0), 9)
    update = jax.jit(optimizer.update, compiler_options=FAST)
    update, _ = update(parameters, optimizer.init(parameters), parameters, step=0)
    for layer in range(2):
        before = np.linalg.svd(np.asarray(parameters.blocks.feed_forward.w_up[...])[layer], compute_uv=False)
        values = np.linalg.svd(np.asarray(update.blocks.feed_forward.w_up[...])[layer], compute_uv=False)
        values /= 0.2 * math.sqrt(96)  # [32, 96]
        assert before.max() / before.min() > 3 and 0.6 < values.min() < values.max() < 1.3


@pytest.mark.soak
@pytest.mark.parametrize(
    "model, sizes",
    [(LLAMA, dict(fsdp=2, tensor=2)), (MIXTURE, dict(fsdp=2, expert=3))],
    ids=["llama", "mixture"],
)
def test_muon_on_a_mesh(model, sizes):
    """Updates and momentum are sharded as the parameters, whose sharding changes no number."""
    model = dataclasses.replace(model, width=48, head_width=8)  # divides
    optimizer = make_optimizer(config.Optimizer(name="muon", peak_learning_rate=RATE, warmup_steps=0), 5)

    def first_update():
        parameters = model_maker(model)()
        gradient = jax.tree.map(lambda leaf: jnp.sin(100 * leaf), parameters)
        update, state = optimizer.update(gradient, optimizer.init(parameters), parameters, step=0)
        return update, state[1].inner_states["muon"].inner_state.mu, parameters

    made = []
    for mesh in (make_mesh(), make_mesh(**sizes)):
        with jax.set_mesh(mesh):
            update, momentum, parameters = map(named_leaves, jax.jit(first_update, compiler_options=FAST)())
        for path, leaf in [*update.items(), *momentum.items()]:
            assert leaf.sharding.spec == parameters[path].sharding.spec, path
        made.append({path: np.asarray(leaf) for path, leaf in update.items()})
    for path, value in made[0].items():
        np.testing.assert_allclose(made[1][path], value, rtol=2e-3, atol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    "name", ["adamw", "muon", *(pytest.param(name, marks=pytest.mark.soak) for name in ("lion", "sgd"))]
)
def test_moments_in_bfloat16(name):
    """Half the bytes, and updates that differ by the rounding of what was kept: the first not at all."""
    parameters = random_like(abstract(LLAMA), seed=0)
    gradients = [random_like(parameters, seed=seed) for seed in (1, 2, 3)]
    made, sizes = [], []
    for dtype in ("float32", "bfloat16"):
        settings = config.Optimizer(name=name, moment_dtype=dtype, warmup_steps=0, clip_norm=None, peak_learning_rate=1)
        optimizer = make_optimizer(settings, 5)
        state = optimizer.init(parameters)
        updates = []
        for step, gradient in enumerate(gradients):
            update, state = jax.jit(optimizer.update, compiler_options=FAST)(gradient, state, parameters, step=step)
            updates.append(named_leaves(update))
        made.append(updates)
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.size >= 8]  # not counts and coefficients
        assert {str(leaf.dtype) for leaf in moments} == {dtype}
        sizes.append(sum(leaf.nbytes for leaf in moments))
    assert sizes[0] == 2 * sizes[1]
    for step, (exact, rounded) in enumerate(zip(*made, strict=True)):
        for path, value in exact.items():
            error = np.linalg.norm(rounded[path] - value) / np.linalg.norm(value)
            assert error <= (0.2 if name == "lion" else 0.02) if step else error == 0, (path, step, error)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta2": 0.999}, "optimizer.beta2=0.999 of at most 0.99: a moment that changes by less than 1/256"),
        ({"name": "adafactor"}, "has no effect with optimizer.name=adafactor"),
        ({"moment_dtype": "float16"}, "optimizer.moment_dtype='float16' must be one of float32, bfloat16"),
    ],
)
def test_moments_that_bfloat16_cannot_hold_are_refused(settings, message):
    optimizer = config.Optimizer(**{"moment_dtype": "bfloat16"} | settings)
    with pytest.raises(config.UserError, match=re.escape(message)):
        config.validate(config.Config(optimizer=optimizer))


def test_moments_in_bfloat16_fade_at_the_largest_beta_allowed():
    """At 0.999 they would stay for ever: what is taken off is less than half of their last place."""
    settings = config.Optimizer(moment_dtype="bfloat16", beta1=0.99, beta2=0.99, warmup_steps=0, clip_norm=None)
    optimizer, parameters = make_optimizer(settings, 5), random_like(abstract(LLAMA), seed=0)
    update, kept = jax.jit(optimizer.update, compiler_options=FAST), []
    state = optimizer.init(parameters)
    for step, gradient in enumerate((parameters, jax.tree.map(jnp.zeros_like, parameters))):
        _, state = update(gradient, state, parameters, step=step)
        kept.append([np.abs(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves((state[1].mu, state[1].nu))])
    assert all((after < before).all() for before, after in zip(*kept, strict=True))
