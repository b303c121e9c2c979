"""Any mesh gives the losses of one device, and only the traffic that it is meant to have."""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from tiny_model import FAST, LLAMA, make_mesh, put
from tiny_training import BATCHES, build, losses

from llm_jax.plan.hlo import collectives
from llm_jax.training.losses import token_losses

DEEP = dataclasses.replace(LLAMA, num_layers=8)
EXPERTS = dataclasses.replace(
    LLAMA, num_layers=4, pattern=("dense", "moe"), num_experts=8, num_shared_experts=1, expert_width=16
)
BALANCED = {"load_balance": 0.01, "router_z": 0.001}

_on_one = {}


def on_one_device(model, **settings) -> list[float]:
    key = repr((model, settings))
    if key not in _on_one:
        _on_one[key] = losses(make_mesh(), model, **settings)
    return _on_one[key]


def named(mesh: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.items())


def soak(*values):
    """Runs with the long tests only."""
    return pytest.param(*values, marks=pytest.mark.soak)


@pytest.mark.parametrize(
    "mesh",
    [
        {"fsdp": 8},
        {"context": 8},
        {"fsdp": 2, "context": 2, "tensor": 2},
        soak({"replica": 8}),
        soak({"tensor": 4}),
        soak({"replica": 2, "fsdp": 2, "tensor": 2}),
        soak({"replica": 2, "fsdp": 4}),
        soak({"fsdp": 2, "tensor": 4}),
        soak({"context": 2}),
        soak({"fsdp": 2, "context": 4}),
        soak({"replica": 2, "context": 2, "tensor": 2}),
    ],
    ids=named,
)
def test_dense(mesh):
    np.testing.assert_allclose(losses(make_mesh(**mesh), LLAMA), on_one_device(LLAMA), rtol=1e-4)


@pytest.mark.parametrize(
    "mesh, rounds, num_microbatches, layers",
    [
        ({"stage": 4}, 2, 8, "scan"),
        soak({"stage": 2}, 1, 2, "unroll"),
        soak({"stage": 2, "context": 2, "tensor": 2}, 2, 4, "scan"),
        soak({"stage": 8}, 1, 8, "scan"),
        soak({"stage": 2}, 4, 4, "scan"),
        soak({"stage": 2, "fsdp": 4}, 1, 4, "scan"),
        soak({"stage": 2, "replica": 2, "tensor": 2}, 2, 2, "scan"),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else str(value),
)
def test_pipeline(mesh, rounds, num_microbatches, layers):
    model = dataclasses.replace(DEEP, layers=layers)
    found = losses(make_mesh(**mesh), model, rounds=rounds, num_microbatches=num_microbatches)
    np.testing.assert_allclose(found, on_one_device(DEEP), rtol=1e-4)


@pytest.mark.parametrize(
    "mesh, num_microbatches",
    [
        ({"expert": 2, "context": 2, "tensor": 2}, 1),
        soak({"expert": 8}, 1),
        soak({"fsdp": 8}, 1),
        soak({"expert": 2, "fsdp": 2, "replica": 2}, 2),
        soak({"stage": 2, "expert": 2, "tensor": 2}, 2),
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else str(value),
)
def test_mixture_of_experts(mesh, num_microbatches):
    settings = {**BALANCED, "num_microbatches": num_microbatches}
    found = losses(make_mesh(**mesh), EXPERTS, **settings)
    np.testing.assert_allclose(found, on_one_device(EXPERTS, **settings), rtol=1e-4)


def test_each_microbatch_of_a_pipeline_is_balanced_by_itself():
    """As it is without one. So heavy a loss soon sends tokens elsewhere for a difference of rounding."""
    settings = {"load_balance": 1.0, "router_z": 0.1, "num_microbatches": 2}
    found = losses(make_mesh(stage=2, expert=2, fsdp=2), EXPERTS, **settings)
    np.testing.assert_allclose(found[:4], on_one_device(EXPERTS, **settings)[:4], rtol=2e-5)


@pytest.mark.soak
def test_a_router_steered_by_its_bias():
    settings = {"router_bias_rate": 0.01}
    expected = on_one_device(EXPERTS, **settings)
    np.testing.assert_allclose(losses(make_mesh(expert=4, fsdp=2), EXPERTS, **settings), expected, rtol=1e-4)
    assert np.abs(np.subtract(expected, on_one_device(EXPERTS))).max() > 1e-4  # it has an effect


@pytest.mark.parametrize("mesh", [{"stage": 2, "fsdp": 2}, {"context": 2, "expert": 2, "tensor": 2}], ids=named)
def test_evaluation(mesh):
    """Tokens in their order, whatever the order in which the mesh has them."""
    found = []
    for sizes in ({}, mesh):
        mesh_of = make_mesh(**sizes)
        with jax.set_mesh(mesh_of):
            init, _ = build(mesh_of, EXPERTS)
            stages = mesh_of.shape["stage"]
            statistics = functools.partial(token_losses, chunk=None, num_microbatches=stages)
            batch = put(BATCHES[0], mesh_of)
            found.append([np.asarray(a) for a in jax.jit(statistics, compiler_options=FAST)(init().parameters, batch)])
    (nll, rank), (other_nll, other_rank) = found
    np.testing.assert_allclose(other_nll, nll, rtol=1e-4, atol=1e-5)
    assert (other_rank != rank).mean() < 0.001  # but for ties of rounding


# Of the whole program of a step: what is gathered, summed and passed on, over which axes.
EXCHANGES = [
    (LLAMA, {"fsdp": 8}, {}, {"gathered": {"fsdp"}, "summed": {"fsdp"}}),
    (LLAMA, {"replica": 2, "fsdp": 4}, {}, {"gathered": {"fsdp"}, "summed": {"replica", "fsdp", "replica fsdp"}}),
    (LLAMA, {"replica": 2, "tensor": 4}, {}, {"gathered": {"tensor"}, "summed": {"tensor", "replica"}}),
    (LLAMA, {"context": 8}, {}, {"gathered": {"context"}, "summed": {"context"}}),
    (
        LLAMA, {"fsdp": 2, "context": 2, "tensor": 2}, {},
        {"gathered": {"fsdp context", "context", "tensor"}, "summed": {"fsdp context", "fsdp", "context", "tensor"}},
    ),
    (EXPERTS, {"expert": 8}, BALANCED, {"gathered": {"expert"}, "summed": {"expert"}}),
    (
        DEEP, {"stage": 2, "fsdp": 4}, {"num_microbatches": 4},
        {"gathered": {"fsdp", "stage fsdp"}, "summed": {"fsdp", "stage", "stage fsdp"}, "passed on": {"stage"}},
    ),
]  # fmt: skip
VERBS = {
    "all-gather": "gathered", "all-reduce": "summed", "reduce-scatter": "summed", "collective-permute": "passed on",
    "all-to-all": "exchanged",
}  # fmt: skip


@pytest.mark.parametrize("model, mesh, settings, expected", EXCHANGES, ids=[named(mesh) for _, mesh, *_ in EXCHANGES])
def test_the_compiled_step_exchanges_what_it_should_and_holds_no_more_than_its_share(model, mesh, settings, expected):
    mesh = make_mesh(**mesh)
    wide = dataclasses.replace(model, width=128, num_layers=8)
    with jax.set_mesh(mesh):
        init, step = build(mesh, wide, **settings)
        state = jax.eval_shape(init)
        text = step.lower(state, put(BATCHES[0], mesh)).compile().as_text()
    found = collections.defaultdict(set)
    for collective in collectives(text, mesh):
        if collective.axes and collective.bytes > 5000:  # else a norm, a count, the sums of a router
            found[VERBS[collective.kind]].add(" ".join(collective.axes))
    assert found == expected
    stacked = max(leaf.size for leaf in jax.tree.leaves(state.parameters.blocks))
    shapes = re.findall(r"\bf32\[([\d,]+)\]", text)
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) < stacked
