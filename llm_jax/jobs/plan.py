"""`llm-jax plan`: whether a run fits on hardware that need not be there, how fast it will be and what it costs.

At once by formulas (plan.memory, plan.costs; docs/planning.md); with --compile also by the TPU's own compiler. Touches
no device, reads no data and writes nothing.
"""

import dataclasses
import json
import math

import jax

from llm_jax.config import Config, UserError
from llm_jax.parallel.chips import GIB
from llm_jax.plan.compiled import Compiled, examine, table
from llm_jax.plan.costs import ATTENTION, Estimate, active_count, estimate, model_flops, parameter_count
from llm_jax.plan.memory import Sizes, attention_in_effect, local_work, make_job
from llm_jax.plan.search import choose, mesh_name, resolve, ways_to_fit
from llm_jax.plan.search import search as find_meshes
from llm_jax.plan.topology import Topology, parse

DAY = 24 * 3600


def run(
    config: Config,
    workdir: str | None = None,
    as_json: bool = False,
    topology: str | None = None,
    slices: int = 1,
    search: bool = False,
    compile: bool = False,
    price: float | None = None,
    tokens: float | None = None,
) -> None:
    """Prints the plan. slices: how many of the topology; price: of a chip-hour; tokens: to train on, instead of
    train.steps updates. A run that does not fit is an answer too."""
    if topology is None:
        raise UserError("plan needs --topology=CHIP:SHAPE, such as v5e:4x4, v5p:4x4x8 or h100:64")
    if config.tokenizer.model_file is not None:
        raise UserError(
            "plan does not read tokenizer.model_file; give the size of its vocabulary: "
            "--config.tokenizer.model_file=none --config.tokenizer.vocab_size=N"
        )
    if config.model.dtype == "float32":
        raise UserError("plan counts what accelerators compute in, not model.dtype=float32; try model.dtype=bfloat16")
    machine, why = parse(topology, slices), None
    if config.parallel.auto:
        config.parallel, why = choose(config, machine.num_devices, machine.chip, machine.slices)
    job = make_job(config)
    meshes = find_meshes(job, machine) if search else []
    try:
        found = estimate(job, machine, resolve(job, config.parallel, machine))
    except UserError:
        if not meshes or compile:
            raise
        found, why = meshes[0], f"{mesh_name(meshes[0].sizes)}: the fastest found; that of the config cannot be"
    result = plan(found, tokens or job.steps * job.tokens, price)
    if why is not None:
        result["auto"] = why
    if search:
        result["search"] = [row(other) for other in meshes]
    by_compiler = _compile(config, machine, result["flops_per_token"] * job.tokens) if compile else None
    if by_compiler is not None:
        result["compiled"] = by_compiler.to_dict()
        result["formulas_over_compiler"] = found.memory.peak / by_compiler.needed
    print(json.dumps(result, indent=2) if as_json else text(found, result, by_compiler))


def plan(found: Estimate, tokens: float, price: float | None) -> dict:
    """Everything as plain values: bytes and seconds of one JAX device and one update."""
    job, machine, memory, times = found.job, found.topology, found.memory, found.times
    rate = found.tokens_per_second
    chip_hours = tokens / rate / 3600 * machine.num_chips
    return {
        "topology": machine.name,
        "chips": machine.num_chips,
        "devices": machine.num_devices,
        "mesh": found.sizes._asdict(),
        "microbatches": job.microbatches,
        "remat": job.remat,
        "attention": attention_in_effect(job, found.sizes, machine),
        "parameters": parameter_count(job.shape),
        "active_parameters": active_count(job.shape),
        "flops_per_token": model_flops(job.shape, job.sequence_length, causal=True),
        "memory": dataclasses.asdict(memory)
        | {"state": memory.state, "peak": memory.peak, "available": found.available},
        "fits": found.fits,
        "ways_to_fit": {} if found.fits else {flags: row(other) for flags, other in ways_to_fit(found).items()},
        "seconds": {
            "step": times.step,
            "step_if_nothing_overlaps": times.unhidden,
            "products": times.products,
            "attention": times.attention,
            "elementwise": times.elementwise,
            "optimizer": times.optimizer,
            "bubble": times.bubble,
            "exposed_exchanges": times.exposed,
            "roofline_compute": times.ideal,
            "roofline_hbm": times.hbm,
        },
        "exchanges": [dataclasses.asdict(exchange) | {"bound": times.bound(exchange)} for exchange in times.exchanges],
        "tokens_per_second": rate,
        "tokens_per_second_per_chip": rate / machine.num_chips,
        "mfu": found.mfu(causal=True),
        "mfu_full_attention": found.mfu(causal=False),
        "tokens": tokens,
        "days": tokens / rate / DAY,
        "chip_hours": chip_hours,
        "cost": None if price is None else chip_hours * price,
        "assumptions": {
            "product_share_of_peak": machine.chip.product,
            "attention_share_of_peak": ATTENTION,
            "sources": list(machine.chip.sources),
        },
    }


def row(found: Estimate) -> dict:
    """One mesh among others."""
    return {
        "topology": found.topology.name,
        "mesh": found.sizes._asdict(),
        "remat": found.job.remat,
        "microbatches": found.job.microbatches,
        "step": found.times.step,
        "step_if_nothing_overlaps": found.times.unhidden,
        "mfu": found.mfu(causal=True),
        "peak": found.memory.peak,
        "limit": found.limit,
    }


def _compile(config: Config, machine: Topology, flops: float) -> Compiled:
    """What the compiler makes of the run's own update; flops: of the model, an update."""
    # The libraries for data and checkpoints that a run needs take seconds to import.
    from llm_jax.jobs.setup import Program
    from llm_jax.training.state import abstract_state

    program = Program(config, config.tokenizer.vocab_size, machine.devices())
    with jax.set_mesh(program.mesh):
        lowered = program.lower(abstract_state(program.init, program.mesh))
        return examine(lowered, program.mesh, machine, flops / machine.num_devices)


def text(found: Estimate, result: dict, by_compiler: Compiled | None = None) -> str:
    """The plan for people."""
    job, machine, memory, times, chip = found.job, found.topology, found.memory, found.times, found.topology.chip
    unit = "chip" if chip.devices == 1 else "device"
    rows, passes = local_work(job, found.sizes).rows, job.microbatches
    experts = f", {_short(result['active_parameters'])} of them active" if job.shape.num_experts else ""
    each = f"{found.available / GIB:.5g} GiB a {unit}" + (f", {chip.devices} a chip" if chip.devices > 1 else "")
    lines = [
        f"{machine.name}   {machine.num_chips} chips, {machine.num_hosts} hosts; {each}; {chip.flops / 1e12:.5g} "
        "TFLOP/s bfloat16 a chip",
        f"model    {_short(result['parameters'])} parameters{experts}; "
        f"{_short(result['flops_per_token'])}FLOP a token",
        f"update   {job.batch_size} x {job.sequence_length} = {_short(job.tokens)} tokens; {passes} x {rows} rows a "
        f"{unit}; remat {result['remat']}; {result['attention']} attention",
        f"mesh     {result.get('auto', mesh_name(found.sizes))}",
        "",
        f"Memory a {unit}, GiB",
        *_table([
            ("parameters, float32", _gib(memory.parameters), ""),
            (f"moments of {job.optimizer}", _gib(memory.moments), ""),
            *([("average of parameters", _gib(memory.average), "")] if job.ema else []),
            ("activations kept", _gib(memory.activations), ""),
            ("gradients, float32", _gib(memory.gradients), "with the backward pass"),
            ("layer in work", _gib(memory.layer), "with the backward pass"),
            ("head's gradient, whole", _gib(memory.head), "before it"),
            ("head and logits", _gib(memory.loss), "before it"),
            ("peak", _gib(memory.peak), f"of {found.available / GIB:.4g}: {'fits' if found.fits else 'DOES NOT FIT'}"),
        ]),
        *_advice(found, result),
        "",
        "Seconds an update",
        *_table([
            ("matrix products", _figure(times.products), f"at {chip.product:.0%} of the peak"),
            ("attention", _figure(times.attention), f"at {ATTENTION:.0%} of the peak"
                if result["attention"] != "reference" else "scores are written to memory: see elementwise"),
            ("elementwise", _figure(times.elementwise), "memory bound"),
            ("optimizer", _figure(times.optimizer), "memory bound"),
            *([("pipeline bubble", _figure(times.bubble), "")] if times.bubble else []),
            ("waiting for exchanges", _figure(times.exposed), ""),
            ("step", _figure(times.step), f"{_figure(times.unhidden)} if nothing overlaps; roofs: compute "
                f"{_figure(times.ideal)}, memory {_figure(times.hbm)}"),
        ]),
    ]  # fmt: skip
    if times.exchanges:
        lines += [
            "",
            f"Exchanges an update                GB a {unit}  seconds  of computing",
            *(
                f"  {'+'.join(e.axes) + ': ' + e.what:32} {_figure(e.bytes / 1e9):>9} {_figure(e.seconds):>9} "
                f"{e.seconds / times.compute:8.1%}  {e.over}, {'hidden' if e.hidden else 'waited for'}"
                f"{', COMMUNICATION BOUND' if times.bound(e) else ''}"
                for e in times.exchanges
            ),
        ]
    lines += [
        "",
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['tokens_per_second_per_chip']:,.0f} a chip; MFU "
        f"{result['mfu']:.1%} with causal attention, {result['mfu_full_attention']:.1%} as PaLM counts it",
        f"{_short(result['tokens'])} tokens: {result['days']:.3g} days, {result['chip_hours']:,.0f} chip-hours"
        + ("" if result["cost"] is None else f", {result['cost']:,.0f} at the given price"),
        "Predicted, not measured. Assumed: the shares of the peak, and that layers compute while their weights and "
        "gradients move.",
    ]
    if "search" in result:
        lines += [
            "",
            "Fastest meshes, each with its best remat and microbatches",
            f"  {'seconds':>8} {'at worst':>8} {'MFU':>6} {'GiB':>6}  {'remat':6} {'microbatches':>12}  mesh",
            *(
                f"  {_figure(other['step']):>8} {_figure(other['step_if_nothing_overlaps']):>8} "
                f"{other['mfu']:6.1%} {other['peak'] / GIB:6.1f}  {other['remat']:6} "
                f"{other['microbatches']:12}  {mesh_name(Sizes(**other['mesh']))}; {other['limit']}"
                for other in result["search"]
            ),
        ]
        if not result["search"]:
            lines.append("  none fits: take more chips")
    if by_compiler is not None:
        lines += [
            "",
            table(by_compiler),
            f"  formulas      {memory.peak / GIB:.2f} GiB, {result['formulas_over_compiler'] - 1:+.1%}",
        ]
    return "\n".join(lines)


def _advice(found: Estimate, result: dict) -> list[str]:
    if found.fits:
        return []
    memory = found.memory
    classes = {
        "parameters and moments": memory.state, "activations kept": memory.activations,
        "the layer in work": memory.layer, "head and logits": memory.head + memory.loss,
    }  # fmt: skip
    largest = max(classes, key=lambda name: classes[name])
    ways = [
        f"  {flags}  ({way['peak'] / GIB:.1f} GiB, {way['step']:.3g} s)" for flags, way in result["ways_to_fit"].items()
    ]
    advice = (
        ["  Any of these fits:", *ways] if ways else ["  No change of remat, microbatches or size does; try --search."]
    )
    return [f"  Too much by {(memory.peak - found.available) / GIB:.1f} GiB; most is {largest}.", *advice]


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    return [f"  {name:24}{value:>10}  {remark}".rstrip() for name, value, remark in rows]


def _gib(size: float) -> str:
    return _figure(size / GIB)


def _figure(number: float) -> str:
    """With three digits behind the point, or two that count."""
    return f"{number:.3f}" if number >= 0.01 or number == 0 else f"{number:.2g}"


def _short(number: float) -> str:
    """8.03G and the like."""
    power = max(0, min(5, int(math.log10(max(1, number)) // 3)))
    return f"{number / 1000**power:.4g} {['', 'k', 'M', 'G', 'T', 'P'][power]}".strip()
