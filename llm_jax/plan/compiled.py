"""What the compiler of a TPU makes of a program, without a TPU: whether it fits, what it sends, how long it may take.

Everything is of one JAX device; a v7x chip is two.
"""

import dataclasses
import importlib.metadata
import math
import re
import time

import jax

from llm_jax.parallel.chips import GIB
from llm_jax.plan.hlo import Collective, Estimate, collectives, estimate, windowed_einsums
from llm_jax.plan.topology import Topology

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
AMOUNT = r"([\d.]+)([KMGT]?)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of HBM, as jax.stages.Compiled.memory_analysis gives them.

    peak is what has to fit, and what a formula is to be compared with: the buffers as the compiler laid them out,
    arguments among them. Of one program in growing batches, v5e with its 15.75 GiB took that with a peak of 15.68 and
    refused the next, of a little over 15.75. arguments + temporaries is no such sum: 18.24 for the batch that it took.
    (libtpu 0.0.42.1)
    """

    arguments: int  # state and batch
    outputs: int
    aliased: int  # outputs that take the place of arguments
    temporaries: int
    peak: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Bytes of HBM. A program that does not fit has no memory, collectives and estimate; one that does no message."""

    topology: str
    fits: bool
    needed: float
    available: float
    arguments: int  # state and batch; part of needed
    memory: Memory | None
    collectives: tuple[Collective, ...]  # the most bytes sent first
    estimate: Estimate | None
    mfu: float | None  # of the estimated step
    windowed_einsums: tuple[str, ...]  # see plan.hlo
    seconds_to_compile: float
    versions: dict[str, str]
    message: str | None  # what to change

    def to_dict(self) -> dict:
        """For JSON."""
        values = dataclasses.asdict(self)
        for value, collective in zip(values["collectives"], self.collectives, strict=True):
            value["sent"] = collective.sent
        return values


def examine(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh, topology: Topology, flops: float) -> Compiled:
    """Compiles a program that was lowered for devices of the topology. Needing too much memory is a result, too.

    flops: of the model, a device and run of the program (see measure.flops).
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        amounts = _exceeded(str(error))
        if amounts is None:
            raise
        compiled, (needed, available) = None, amounts
    seconds = time.perf_counter() - start
    # Arguments have their sharding in their type.
    avals = jax.tree.leaves(lowered.in_avals)
    arguments = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in avals)
    known = {
        "topology": topology.name, "arguments": arguments, "seconds_to_compile": seconds,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }  # fmt: skip
    if compiled is None:
        return Compiled(
            **known, fits=False, needed=needed, available=available, memory=None, collectives=(), estimate=None,
            mfu=None, windowed_einsums=(), message=_advice(needed, available, arguments),
        )  # fmt: skip
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None  # of the compilers of other platforms, it may be
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )
    chip = topology.chip
    replayed = estimate(text, mesh, chip)
    return Compiled(
        **known, fits=True, needed=memory.peak, available=chip.hbm / chip.devices, memory=memory,
        collectives=tuple(collectives(text, mesh)), estimate=replayed,
        mfu=flops * chip.devices / chip.flops / replayed.seconds,
        windowed_einsums=tuple(windowed_einsums(text)), message=None,
    )  # fmt: skip


def table(compiled: Compiled) -> str:
    """For a person."""
    versions = ", ".join(f"{name} {version}" for name, version in compiled.versions.items())
    share = compiled.needed / compiled.available
    lines = [
        f"Compiled for {compiled.topology} in {compiled.seconds_to_compile:.0f} s ({versions}). Of each device:",
        f"  HBM           {_gib(compiled.needed)} of {_gib(compiled.available)} ({share:.0%}); "
        f"{_gib(compiled.arguments)} of it are the state and the batch",
    ]
    if compiled.message:
        lines.append(f"  {compiled.message}")
    if compiled.estimate:
        step, waited = compiled.estimate, sum(compiled.estimate.waits.values())
        lines += [
            f"  step          {step.seconds:.3g} s, compiler-estimated; MFU {compiled.mfu:.1%} with causal attention",
            f"                {step.compute:.3g} s computing ({step.kernels:.3g} s in Pallas kernels), "
            f"{waited:.3g} s waiting for others",
        ]
        for what, seconds in sorted(step.waits.items(), key=lambda wait: -wait[1]):
            lines.append(f"                {seconds:.3g} s for {what}")
        if step.unpriced:
            lines.append(f"                without what has no known cost: {', '.join(step.unpriced)}")
    if compiled.windowed_einsums:
        lines.append(f"  unwanted      windowed einsums: {', '.join(compiled.windowed_einsums)}")
    if compiled.collectives:
        lines.append("  collectives          axes                 devices   times     sent")
    for each in compiled.collectives:
        notes = [note for note, holds in (("overlapped", each.asynchronous), ("DCN", each.across_slices)) if holds]
        lines.append(
            f"    {each.kind:<18} {'+'.join(each.axes):<20} {each.devices:>7} {each.count:>7} {_size(each.sent):>8}"
            f"  {', '.join(notes)}".rstrip()
        )
    return "\n".join(lines)


def _exceeded(message: str) -> tuple[float, float] | None:
    """(needed, available) bytes of a compiler's error; None: it is about something else."""
    if match := re.search(rf"total memory required .*\({AMOUNT}\) exceeds available HBM \({AMOUNT}\)", message):
        needed, available = (_bytes(*match.groups()[i : i + 2]) for i in (0, 2))
        return needed, available
    if match := re.search(rf"Used \S+ of {AMOUNT} hbm\. Exceeded hbm capacity by {AMOUNT}\.", message):
        available, excess = (_bytes(*match.groups()[i : i + 2]) for i in (0, 2))
        return available + excess, available
    return None


def _advice(needed: float, available: float, arguments: int) -> str:
    start = f"out of memory: a device needs {_gib(needed)} of HBM and has {_gib(available)}; "
    if arguments > available:
        return start + (
            f"the state and the batch alone are {_gib(arguments)}: take more devices, or more of them for "
            "parallel.fsdp, tensor or stage, which shard the state"
        )
    return start + (
        "in this order, try model.remat='full', more train.microbatches, more shards (parallel.fsdp, context, tensor), "
        "a smaller train.loss_chunk"
    )


def _bytes(number: str, unit: str) -> float:
    return float(number) * UNITS[unit]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.3g} MiB"


def _size(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e6 else f"{size / 1e3:.3g} kB"
