"""M microbatch, B batch, T position, D width, F feed-forward width, R layers, S stages, V rounds"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import FAST, RULES, make_mesh

from llm_jax.parallel.pipeline import bubble_fraction, pipelined

BATCH, LENGTH, WIDTH, INNER = 4, 4, 8, 16
BETWEEN, WITHIN = RULES.spec("batch", "sequence", None), RULES.spec("batch", None, "feed_forward")


def block(x_BTD, layer, scale_BT):
    """With all that blocks do: a norm that fails on zeros, gathered weights, a contraction that communicates, and a
    shard_map with constants in its derivative. Returns a sum per unit, which differs in each layer."""
    x_BTD /= jnp.sqrt(jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True))
    up_DF = jax.reshard(layer["up"], RULES.spec(None, "feed_forward"))
    h_BTF = jnp.einsum("BTD,DF->BTF", jax.reshard(x_BTD, RULES.spec("batch", None, None)), up_DF)

    def centred(h_BTF):
        return jnp.tanh(h_BTF - jax.lax.pmean(jnp.mean(jnp.square(h_BTF) + 1), RULES.batch + RULES.feed_forward))

    h_BTF = jax.shard_map(centred, in_specs=WITHIN, out_specs=WITHIN)(h_BTF)
    down_FD = jax.reshard(layer["down"], RULES.spec("feed_forward", None))
    y_BTD = jnp.einsum("BTF,FD->BTD", h_BTF, down_FD, out_sharding=BETWEEN)
    return x_BTD + y_BTD * jax.reshard(scale_BT, RULES.spec("batch", "sequence"))[:, :, None], {
        "units": jnp.einsum("BTF->F", h_BTF, out_sharding=jax.P(None)), "none": None,
    }  # fmt: skip


def run(x_BTD, layers, rows):
    return jax.lax.scan(lambda x_BTD, layer: block(x_BTD, layer, rows["scale"]), x_BTD, layers)


def one_by_one(run, layers, x_MBTD, rows):
    """What a pipeline does, on one device."""
    layers, x_MBTD = jax.tree.map(
        lambda a: jax.reshard(a, jax.P(None, *jax.typeof(a).sharding.spec[1:])), (layers, x_MBTD)
    )
    x_MBTD, aux = jax.lax.map(lambda microbatch: run(microbatch[0], layers, microbatch[1]), (x_MBTD, rows))
    return x_MBTD, aux


def loss(layers, x_MBTD, rows, weights, *, apply):
    y_MBTD, aux = apply(run, layers, x_MBTD, rows)
    return jnp.sum(y_MBTD * weights["y"]) + jnp.sum(aux["units"] * weights["units"]), (y_MBTD, aux)


def problem(num_layers: int, num_microbatches: int, batch: int):
    """Arguments of `loss` in numpy, and their logical dimensions."""
    rng = np.random.default_rng(0)
    x = (num_microbatches, batch, LENGTH, WIDTH)
    arguments = (
        {
            "up": rng.normal(size=(num_layers, WIDTH, INNER)) / 3,
            "down": rng.normal(size=(num_layers, INNER, WIDTH)) / 4,
        },
        rng.normal(size=x),
        {"scale": rng.integers(1, 4, size=x[:3])},
        {"y": rng.normal(size=x), "units": rng.normal(size=(num_layers, INNER)) / 10},
    )
    names = (
        {"up": ("layers", "embed", "feed_forward"), "down": ("layers", "feed_forward", "embed")},
        ("microbatches", "batch", "sequence", None),
        {"scale": (None, "batch", None)},
        {"y": ("microbatches", "batch", "sequence", None), "units": (None, None)},
    )
    return jax.tree.map(lambda a: a.astype(np.float32), arguments), names


def compiled(mesh, arguments, names, apply):
    """The arguments on the mesh, and the compiled loss with its gradients for layers and input."""
    on_mesh = jax.tree.map(lambda a, n: jax.device_put(a, jax.NamedSharding(mesh, RULES.spec(*n))), arguments, names)
    with jax.set_mesh(mesh):
        function = jax.value_and_grad(functools.partial(loss, apply=apply), argnums=(0, 1), has_aux=True)
        return jax.jit(function).lower(*on_mesh).compile(FAST), on_mesh


def evaluate(*arguments):
    function, on_mesh = compiled(*arguments)
    return jax.tree.map(np.asarray, function(*on_mesh))


@functools.cache
def expected(num_layers: int, num_microbatches: int, batch: int):
    return evaluate(make_mesh(), *problem(num_layers, num_microbatches, batch), one_by_one)


@pytest.mark.parametrize(
    "axes, rounds, num_layers, num_microbatches",
    [
        ({"stage": 2, "fsdp": 2, "tensor": 2}, 1, 4, 8),
        ({"stage": 2, "replica": 2, "context": 2}, 4, 8, 2),
        ({"stage": 4, "tensor": 2}, 2, 8, 4),
        ({"stage": 8}, 1, 8, 8),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_values_and_gradients_are_those_of_one_device(axes, rounds, num_layers, num_microbatches):
    size = (num_layers, num_microbatches, BATCH)
    apply = functools.partial(pipelined, rounds=rounds, rules=RULES)
    got = evaluate(make_mesh(**axes), *problem(*size), apply)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected(*size)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    "num_stages, rounds, groups", [(2, 1, 4), (2, 4, 1), (3, 2, 2), (4, 6, 1), (8, 1, 1), (8, 2, 2)]
)
def test_every_microbatch_goes_through_all_layers_in_order(num_stages, rounds, groups):
    """Each layer appends its number and the microbatch's, as digits: another order gives another number."""
    num_layers, num_microbatches = num_stages * rounds * 2, num_stages * groups
    mesh = make_mesh(stage=num_stages)

    def append(x_BTD, numbers_R, rows_BT):
        x_BTD, _ = jax.lax.scan(
            lambda x_BTD, n: ((x_BTD * 31 + n + rows_BT[..., None]) % 100_003, None), x_BTD, numbers_R
        )
        return x_BTD, {"numbers": numbers_R.astype(jnp.float32) + 1000 * rows_BT[0, 0]}

    x_MBTD = np.arange(num_microbatches, dtype=np.int32).reshape(-1, 1, 1, 1)
    rows_MBT = 7 * x_MBTD[..., 0]
    want = x_MBTD
    for n in range(num_layers):
        want = (want * 31 + n + rows_MBT[..., None]) % 100_003
    with jax.set_mesh(mesh):
        layers, x = (jax.device_put(a, RULES.spec("layers")) for a in (np.arange(num_layers, dtype=np.int32), x_MBTD))
        apply = jax.jit(functools.partial(pipelined, append, rounds=rounds, rules=RULES), compiler_options=FAST)
        got, aux = apply(layers, x, jax.device_put(rows_MBT, jax.P()))
    np.testing.assert_array_equal(got, want)
    assert jax.typeof(got).sharding.spec[0] == "stage"
    np.testing.assert_array_equal(aux["numbers"], np.arange(num_layers) + 1000 * rows_MBT[:, :, 0])


def collectives(text: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """(kind, shape, whether in a loop) of each collective."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* ([a-z-]+)\(.*op_name=\"([^\"]*)\"", text)
    kinds = {"all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"}
    return [
        (kind, tuple(int(n) for n in shape.split(",") if n), "while" in name)
        for shape, kind, name in found
        if kind in kinds
    ]


@pytest.mark.parametrize("rounds", [1, 2])
def test_only_activations_go_from_stage_to_stage(rounds):
    num_layers, num_microbatches, fsdp = 8, 8, 2
    mesh = make_mesh(stage=2, fsdp=fsdp)
    apply = functools.partial(pipelined, rounds=rounds, rules=RULES)
    function, _ = compiled(mesh, *problem(num_layers, num_microbatches, BATCH), apply)
    text = function.as_text()
    found = collectives(text)

    x_BTD, layer = (BATCH // fsdp, LENGTH, WIDTH), WIDTH * INNER
    in_loop = [shape for kind, shape, looped in found if kind == "collective-permute" and looped]
    assert in_loop == [x_BTD] * 4  # to the next stage, and what waits to the one before; and back again for gradients
    # Two weights; V turns; forward, and backward.
    outside = [shape for kind, shape, looped in found if kind == "collective-permute" and not looped and shape != x_BTD]
    assert [np.prod(shape) for shape in outside] == (2 * rounds * 2) * [num_layers // 2 // rounds * layer // fsdp] * (
        rounds > 1
    )
    # Weights are gathered one layer at a time, activations not at all.
    units = num_microbatches * num_layers * INNER  # what `run` tells of each microbatch and layer
    gathered = {np.prod(shape) for kind, shape, _ in found if kind == "all-gather"} - {units}
    assert gathered and max(gathered) <= layer
    assert {kind for kind, *_ in found} == {"collective-permute", "all-gather", "all-reduce"}
    # What a stage keeps of each time step is the input of a chunk; no copies of weights.
    steps = rounds * num_microbatches + 1
    kept = {shape for shape in re.findall(rf"f32\[{steps},([\d,]+)\]", text)}
    assert ",".join(map(str, x_BTD)) in kept
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in kept) <= np.prod(x_BTD)


@pytest.mark.parametrize(
    "num_stages, rounds, num_microbatches", [(1, 1, 3), (2, 1, 2), (4, 1, 16), (4, 3, 8), (8, 2, 8)]
)
def test_bubble_fraction_is_that_of_a_pipeline_played_through(num_stages, rounds, num_microbatches):
    """Each stage does, in each step, the oldest piece of work that has arrived."""
    arrived = [[] for _ in range(num_stages)]
    arrived[0] = [
        (m // num_stages, 0, m) for m in range(num_microbatches)
    ]  # group, round, microbatch: what comes first
    steps = work = 0
    while any(arrived):
        sent = []
        for s in range(num_stages):
            if arrived[s]:
                group, v, m = arrived[s].pop(arrived[s].index(min(arrived[s])))
                work += 1
                if (s, v) != (num_stages - 1, rounds - 1):
                    sent.append(((s + 1) % num_stages, (group, v + (s == num_stages - 1), m)))
        for s, piece in sent:
            arrived[s].append(piece)
        steps += 1
    assert work == num_stages * rounds * num_microbatches
    assert bubble_fraction(num_stages, rounds, num_microbatches) == pytest.approx(1 - work / (num_stages * steps))
