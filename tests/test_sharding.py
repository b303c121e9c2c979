import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from tiny_model import FAST, LENGTH, LLAMA, VOCAB_SIZE, make_mesh, packed_rows, put

from llm_jax import config
from llm_jax.config import Parallel, UserError
from llm_jax.parallel.sharding import (
    Rules,
    blocks_gather,
    global_rows,
    num_shards,
    replicated,
    require_divisible,
)  # fmt: skip
from llm_jax.parallel.sharding import (
    make_mesh as make_mesh_of,
)
from llm_jax.plan import topology
from llm_jax.safety.structure import named_leaves
from llm_jax.training import state as training_state
from llm_jax.training.losses import Weights
from llm_jax.training.optimizer import make_optimizer
from llm_jax.training.schedule import make_schedule
from llm_jax.training.step import train_step

RULES = Rules()


def test_one_mesh_axis_shards_one_dimension_only():
    assert RULES.spec("batch", None, "vocab") == jax.P(("replica", "fsdp", "expert"), None, "tensor")
    with pytest.raises(ValueError, match=r"\('batch', None, 'embed'\).*only one dimension"):
        RULES.spec("batch", None, "embed")
    with pytest.raises(ValueError, match="only one dimension"):
        dataclasses.replace(RULES, heads=("fsdp",)).spec("embed", "heads")


@pytest.mark.parametrize(
    "parallel, sizes",
    [
        (Parallel(), {"fsdp": 8}),
        (Parallel(tensor=4), {"fsdp": 2, "tensor": 4}),
        (Parallel(replica=2, tensor=2), {"replica": 2, "fsdp": 2, "tensor": 2}),
        (Parallel(replica=2, stage=2, context=2), {"replica": 2, "stage": 2, "context": 2}),
        (Parallel(expert=4, tensor=2), {"expert": 4, "tensor": 2}),
    ],
    ids=str,
)
def test_fsdp_takes_the_devices_that_are_left(parallel, sizes):
    mesh = make_mesh_of(parallel)
    assert mesh.axis_names == ("replica", "stage", "fsdp", "expert", "context", "tensor")
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == sizes
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    batch = sizes.get("replica", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1)
    assert num_shards(mesh, RULES.batch) == batch
    assert blocks_gather(mesh, RULES) == bool({"fsdp", "expert", "context", "tensor"} & set(sizes))


@pytest.mark.parametrize(
    "parallel, nearest",
    [
        (Parallel(tensor=3), "tensor=4 and parallel.fsdp=2"),
        (Parallel(fsdp=4), "try parallel.fsdp=8, or leave it out"),
        (Parallel(replica=16), "replica=8 and parallel.fsdp=1"),
        (Parallel(fsdp=8, tensor=2), "try parallel.fsdp=4, or leave it out"),
        (Parallel(context=2, expert=5), "expert=4 and parallel.fsdp=1"),
        (Parallel(replica=3, tensor=3), "try parallel.fsdp=8 and 1 for all others"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_names_the_nearest_that_does(parallel, nearest):
    with pytest.raises(UserError) as error:
        make_mesh_of(parallel)
    message = str(error.value)
    assert message.startswith("parallel: ") and "must be the number of devices, 8; " in message
    assert message.endswith(nearest) and "\n" not in message


@pytest.mark.parametrize("across, others", [("replica", {"fsdp": 4}), ("stage", {"fsdp": 2, "tensor": 2})], ids=str)
def test_only_replica_and_stage_lie_across_slices(across, others):
    pytest.importorskip("libtpu", reason="libtpu, which knows how TPU slices look, is not installed: llm-jax[tpu]")
    devices = topology.parse("v5e:2x2", slices=2).devices()
    mesh = make_mesh_of(Parallel(**{across: 2}, **others), devices)
    by_slice = np.moveaxis(mesh.devices, mesh.axis_names.index(across), 0).reshape(2, -1)
    for part in by_slice:
        assert len({device.slice_index for device in part}) == 1
    with pytest.raises(UserError, match="must divide by the 2 slices.*try parallel.replica=2"):
        make_mesh_of(Parallel(tensor=8), devices)


def test_every_size_that_does_not_divide_is_named():
    mesh = make_mesh(fsdp=4, tensor=2)
    sizes = {
        "model.width": (30, "embed"), "model.num_heads": (4, "heads"), "model.num_kv_heads": (1, "heads"),
        "train.batch_size": (9, "batch"),
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        require_divisible(mesh, RULES, sizes)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("model.width=30 must divide by the 4 shards") and "try 32" in lines[0]
    assert lines[1].startswith("model.num_kv_heads=1 must divide by the 2 shards") and "try 2" in lines[1]
    assert lines[2].startswith("train.batch_size=9 must divide by the 4 shards") and "try 8" in lines[2]
    require_divisible(mesh, RULES, {"model.width": (32, "embed")})


def test_a_model_that_does_not_divide_is_refused_before_it_is_made():
    with pytest.raises(UserError, match="model.num_kv_heads=4 must divide by the 8 shards"):
        build(make_mesh(tensor=8))


def test_global_rows_reads_what_the_devices_hold():
    mesh, asked = make_mesh(fsdp=4, tensor=2), []
    rows = {"a": np.arange(16 * 3).reshape(16, 3), "b": np.arange(16 * 2).reshape(16, 2)}

    def read(first, last):
        asked.append((first, last))
        return {name: values[first:last] for name, values in rows.items()}

    arrays = global_rows(read, 16, jax.NamedSharding(mesh, RULES.spec("batch", None)))
    assert asked == [(0, 16)]
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, rows[name])
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {4}


def build(mesh, optimizer="adamw", **changes):
    model = dataclasses.replace(LLAMA, **{"layers": "scan", **changes})
    settings = config.Optimizer(name=optimizer, warmup_steps=2)
    made, schedule = make_optimizer(settings, 20), make_schedule(settings, 20)
    shape = training_state.model_shape(model, vocab_size=VOCAB_SIZE, sequence_length=LENGTH)
    init = training_state.make_init(model, shape, made, mesh=mesh, rules=RULES, seed=0, window=8, ema=True)
    step = functools.partial(
        train_step, optimizer=made, schedule=schedule, num_microbatches=1, pipelined=False,
        weights=Weights(), router_bias_rate=None, chunk=None,
        skip=True, threshold=10.0, ema_decay=0.9,
    )  # fmt: skip
    return init, jax.jit(step, donate_argnames="state", compiler_options=FAST)


@pytest.mark.parametrize("optimizer", config.OPTIMIZERS)
def test_nothing_big_is_replicated_and_the_step_keeps_it_so(optimizer):
    """By types: parameters, moments, and what a step makes of them."""
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        init, step = build(mesh, optimizer)
        before = training_state.abstract_state(init, mesh)
        after, metrics = jax.eval_shape(step, before, put(packed_rows(8), mesh))
    before, after = named_leaves(before), named_leaves(after)

    def axes(leaf):  # of each dimension
        return (*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))

    assert {name: axes(leaf) for name, leaf in before.items()} == {name: axes(leaf) for name, leaf in after.items()}
    for name, leaf in before.items():
        num_shards = leaf.size / np.prod(leaf.sharding.shard_shape(leaf.shape))
        if leaf.size > 200:  # all but norm scales, their moments, and adafactor's rows and columns of small matrices
            assert num_shards >= 4, (name, leaf.shape, leaf.sharding.spec)
        if name.startswith("parameters/") and "norm" not in name:
            assert num_shards == 8, (name, leaf.shape, leaf.sharding.spec)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(metrics))


def test_the_arrays_lie_where_their_types_say():
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        init, step = build(mesh)
        target = named_leaves(training_state.abstract_state(init, mesh))
        state, _ = step(jax.jit(init, compiler_options=FAST)(), put(packed_rows(8), mesh))
    for name, leaf in named_leaves(state).items():
        assert leaf.sharding == target[name].sharding, name
        assert {shard.data.shape for shard in leaf.addressable_shards} == {leaf.sharding.shard_shape(leaf.shape)}
    assert state.parameters.embed.addressable_shards[0].data.shape == (VOCAB_SIZE // 2, 32 // 4)
    assert {name.split("/")[0] for name in target} == {"step", "parameters", "optimizer", "ema", "history"}


def compile_step(mesh, **changes):
    with jax.set_mesh(mesh):
        init, step = build(mesh, **changes)
        target = training_state.abstract_state(init, mesh)
        return step.lower(target, put(packed_rows(8), mesh)).compile(), target.parameters


def test_a_step_on_eight_shards_never_holds_the_whole_model(monkeypatch):
    """Weights are gathered for one block at a time, and again in the backward pass; none of it is kept."""
    mesh, sizes = make_mesh(fsdp=8), {"width": 128, "num_layers": 8}
    compiled, parameters = compile_step(mesh, **sizes)
    block_size = sum(leaf.size for leaf in jax.tree.leaves(parameters.blocks)) / 8
    stacked = parameters.blocks.feed_forward.w_up.size

    assert largest_array(compiled) < stacked  # no stack of weights is whole on a device
    assert len(re.findall(r" all-gather\(", compiled.as_text())) >= 2 * 7  # the 7 matrices of a block, twice

    monkeypatch.setattr(training_state, "blocks_gather", lambda mesh, rules: False)  # so that all is kept
    kept, _ = compile_step(mesh, **sizes)
    assert largest_array(kept) >= stacked
    saved = kept.memory_analysis().temp_size_in_bytes - compiled.memory_analysis().temp_size_in_bytes
    assert saved > 0.75 * 8 * block_size * 4, (saved, block_size * 4)


def largest_array(compiled) -> int:
    """Elements of the largest float32 array that a device holds."""
    shapes = re.findall(r"\bf32\[([\d,]+)\]", compiled.as_text())
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


def test_replicated():
    mesh = make_mesh(fsdp=8)
    assert replicated(mesh).is_fully_replicated and replicated(mesh).mesh == mesh
