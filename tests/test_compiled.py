import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import pytest

from llm_jax.config import Config, Model, Tokenizer, Train
from llm_jax.jobs.setup import Program
from llm_jax.parallel.chips import GIB
from llm_jax.plan.compiled import examine, table
from llm_jax.plan.costs import estimate
from llm_jax.plan.hlo import collectives, windowed_einsums
from llm_jax.plan.memory import Sizes, make_job
from llm_jax.plan.topology import parse
from llm_jax.training.state import abstract_state

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def examined(function, *arrays):
    """On v5e:2x2; the first dimension of each float32 array is sharded over all 4 chips."""
    topology = parse("v5e:2x2")
    mesh = jax.make_mesh((4,), ("fsdp",), devices=topology.devices())
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    types = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in arrays]
    with jax.set_mesh(mesh):
        return examine(jax.jit(function, donate_argnums=0).lower(*types), mesh, topology, flops=1e9)


def test_a_program_that_fits():
    def update(w, x):
        full = jax.reshard(w, jax.P()).astype(jnp.bfloat16)
        return w - 0.1 * jnp.einsum("bd,df->df", x.astype(jnp.bfloat16), full, out_sharding=jax.P("fsdp"))

    found = examined(update, (4096, 8192), (4096, 4096))
    weight, rows = 4096 * 8192 * 4 // 4, 4096 * 4096 * 4 // 4
    assert found.fits and found.message is None and found.available == 15.75 * GIB
    assert found.arguments == found.memory.arguments == weight + rows
    assert found.memory.outputs == found.memory.aliased == weight  # the given weights are overwritten
    assert found.needed == found.memory.peak >= found.arguments + 2 * weight  # gathered, in bfloat16
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert sum(c.bytes * c.count for c in gathers) == 2 * weight and {c.axes for c in gathers} == {("fsdp",)}
    assert found.mfu == pytest.approx(1e9 / 197e12 / found.estimate.seconds)
    assert set(found.versions) == {"jax", "libtpu"}

    text = table(found)
    assert "v5e:2x2" in text and "of 15.75 GiB" in text and "all-gather" in text
    assert f"compiler-estimated; MFU {found.mfu:.1%}" in text
    waits = found.estimate.waits
    assert waits and all(f"{seconds:.3g} s for {what}" in text for what, seconds in waits.items())
    assert json.loads(json.dumps(found.to_dict()))["memory"]["peak"] == found.needed


def test_a_program_that_needs_too_much_is_told_what_to_change():
    found = examined(lambda x: jnp.sort(jnp.stack([x * i for i in range(1, 25)]), axis=0).sum(0), (2**20, 1024))
    assert not found.fits and found.memory is None and found.estimate is None and found.collectives == ()
    assert found.arguments == GIB and found.available == 15.75 * GIB and 24 * GIB < found.needed < 80 * GIB
    for change in ("model.remat='full'", "train.microbatches", "parallel.fsdp", "train.loss_chunk"):
        assert change in found.message
    assert "\n" not in found.message and found.message in table(found)


def test_a_state_that_is_too_large_needs_more_devices():
    found = examined(lambda x: x + 1, (2**24 + 2**22, 1024))
    assert not found.fits and found.arguments == 20 * GIB
    assert "20.00 GiB: take more devices" in found.message and "remat" not in found.message


class Failing:
    """A lowered program whose compilation fails with a message."""

    in_avals = ()

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    "message, needed",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (35.92G) exceeds available HBM (15.75G).",
            35.92,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 16.25G of 15.75G hbm. Exceeded hbm capacity by 512.00M.\n\nTotal hbm usage",
            16.25,
        ),
    ],
)
def test_both_ways_to_say_that_memory_is_short(message, needed):
    found = examine(Failing(message), None, parse("v5e:2x2"), flops=1e9)
    assert not found.fits and (found.needed / GIB, found.available / GIB) == pytest.approx((needed, 15.75))


def test_another_error_is_not_taken_for_too_little_memory():
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        examine(Failing("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"), None, parse("v5e:2x2"), 1e9)


@pytest.mark.soak
def test_the_step_of_a_model_keeps_what_made_it_fast():
    """Whatever a change of the model, the loss or a remat policy may do: read from the program, not timed."""
    rows, length, width, vocab_size, layers, chips = 12, 384, 256, 3072, 3, 4
    config = Config(
        model=Model(num_layers=layers, width=width, num_heads=4, num_kv_heads=2, head_width=128, remat="dots"),
        tokenizer=Tokenizer(vocab_size=vocab_size),
        train=Train(batch_size=rows, sequence_length=length),
    )
    topology = parse("v5e:2x2")
    program = Program(config, vocab_size, topology.devices())
    with jax.set_mesh(program.mesh):
        text = program.lower(abstract_state(program.init, program.mesh)).compile().as_text()

    assert windowed_einsums(text) == []
    # Weights are gathered forward and backward, their gradients scattered, and so are both tables: nothing else but
    # norms. All is sent in bfloat16, but for the gradient of the head.
    found = [c for c in collectives(text, program.mesh) if c.bytes > 10_000]
    assert {(c.kind, c.axes) for c in found} == {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))}
    expected = estimate(make_job(config), topology, Sizes(fsdp=chips)).times.exchanges
    received = sum(exchange.bytes for exchange in expected) + 2 * width * vocab_size
    assert sum(c.sent for c in found) == pytest.approx(received * (chips - 1) / chips, rel=0.01)
    # Attention is not computed again: each kernel stands in one loop over the layers.
    kernels = re.findall(r"^ *%?splash_mha_(fwd|dq|dkv)\S* = ", text, re.MULTILINE)
    assert sorted(kernels) == ["dkv", "dq", "fwd"]
    # No device has the activations of all.
    assert not re.search(rf"\b(?:bf16|f32)\[(?:\d+,)*(?:{rows},{length}|{rows * length})\b", text)
    # The whole gradient of the head is gone when the backward pass of the layers begins.
    lines = text[text.index("\nENTRY ") :].splitlines()
    (backward,) = (i for i, line in enumerate(lines) if re.search(r" while\(.*transpose\(jvp", line))
    whole = [i for i, line in enumerate(lines) if f"f32[{width},{vocab_size}]" in line]
    assert whole and max(whole) < backward
