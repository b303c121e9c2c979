"""How training scales from 4 to 4096 TPU chips: by the planner's formulas, and in what the TPU compiler makes of it.

Command:  python benchmarks/scaling.py [--out=docs/scaling.svg] [--json=FILE] [--no-compile]
Needs:    pip install 'llm-jax[tpu,benchmarks]'; no TPU
Time:     seconds without compiling; with it 10 minutes or more of CPU time, 1.6 GB of memory

No step is run, so nothing here is a measured speed. Predicted: seconds of a step of configs/llama_8b.py on v5p, in weak
scaling (rows a chip stay) and strong scaling (rows of the batch stay), on the meshes that parallel.auto takes.
Compiled: the whole step of a model of the same build, a quarter as wide and long, on the same meshes. What its chips
send is set beside the formulas for that very model; and how long compiling takes is timed for growing depths.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import jax

from llm_jax.config import Config
from llm_jax.flags import load_config_file
from llm_jax.jobs.setup import Program
from llm_jax.parallel import chips
from llm_jax.plan.costs import Estimate, estimate
from llm_jax.plan.hlo import collectives
from llm_jax.plan.memory import make_job
from llm_jax.plan.search import choose, compact, mesh_name, resolve
from llm_jax.plan.topology import Topology
from llm_jax.training.state import abstract_state

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "llama_8b.py"
CHIP = chips.find("v5p")
CHIPS = tuple(2**i for i in range(2, 13))
COMPILED_CHIPS = (4, 64, 256, 1024)
ROWS_A_CHIP = 2  # weak scaling
DEPTHS, DEPTH_CHIPS = (8, 32, 80), 64
COLORS = {"weak": "tab:blue", "strong": "tab:orange"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A config with its mesh on a machine, and what the formulas say of it."""

    scaling: str  # weak | strong
    config: Config
    estimate: Estimate

    @property
    def chips(self) -> int:
        return self.estimate.topology.num_chips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(CONFIG.parents[1] / "docs" / "scaling.svg"), help="file of the picture")
    parser.add_argument("--json", help="file to which the figures are written")
    parser.add_argument("--no-compile", action="store_true", help="only the formulas")
    arguments = parser.parse_args()
    config = load_config_file(str(CONFIG))
    config.model = dataclasses.replace(config.model, remat="full")  # fits on any number of chips
    config.train = dataclasses.replace(config.train, loss_chunk=None)
    points = [predict(config, scaling, count) for scaling in COLORS for count in CHIPS]
    results: dict[str, list[dict]] = {"predicted": list(predictions(points)), "exchanged": [], "depths": []}
    show("Predicted by formulas, not measured", results["predicted"])
    if not arguments.no_compile:
        done = {}
        results["depths"] = list(depths(next(p for p in points if p.chips == DEPTH_CHIPS), done))
        show(f"Seconds of compiling (load of the machine: {os.getloadavg()[0]:.1f})", results["depths"])
        results["exchanged"] = list(exchanges([p for p in points if p.chips in COMPILED_CHIPS], done))
        show("GB that a chip sends in a step: by formulas, and compiled (not run)", results["exchanged"])
    draw(results, pathlib.Path(arguments.out))
    if arguments.json:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu", "llm-jax")}
        content = {"versions": versions, "cores": os.cpu_count(), **results}
        pathlib.Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n")


def predict(config: Config, scaling: str, count: int) -> Point:
    """On the mesh that parallel.auto takes, with the fewest microbatches that fit."""
    topology = Topology(chip=CHIP, shape=compact(CHIP, count))
    rows = ROWS_A_CHIP * count if scaling == "weak" else config.train.batch_size
    for microbatches in (1, 2, 4, 8):
        train = dataclasses.replace(config.train, batch_size=rows, microbatches=microbatches)
        variant = dataclasses.replace(config, train=train)
        variant.parallel, _ = choose(variant, topology.num_devices, CHIP)
        point = evaluate(scaling, variant, topology)
        if point.estimate.fits:
            return point
    raise RuntimeError(f"{topology.name}: no number of microbatches fits")


def evaluate(scaling: str, config: Config, topology: Topology) -> Point:
    job = make_job(config)
    found = estimate(job, topology, resolve(job, config.parallel, topology))
    return Point(scaling=scaling, config=config, estimate=found)


def predictions(points: list[Point]) -> Iterator[dict]:
    first = {}
    for point in points:
        found, times = point.estimate, point.estimate.times
        rate = found.tokens_per_second / point.chips
        yield {
            "scaling": point.scaling,
            "chips": point.chips,
            "shape": found.topology.name.partition(":")[2],
            "rows": found.job.batch_size,
            "microbatches": found.job.microbatches,
            "mesh": mesh_name(found.sizes),
            "step": times.step,
            "compute": times.compute,
            "optimizer": times.optimizer,
            "waiting": times.exposed,
            "step_at_worst": times.unhidden,  # if nothing overlaps
            "efficiency": rate / first.setdefault(point.scaling, rate),
            "mfu": found.mfu(causal=True),
        }


def exchanges(points: list[Point], done: dict) -> Iterator[dict]:
    """By the mesh axes along which is sent; below a megabyte they are left out: norms and counts.

    Where the compiler makes a sum on all chips of what the formulas take for a scatter or a gather, it sends twice as
    much.
    """
    for point in points:
        small = evaluate(point.scaling, quarter(point.config), point.estimate.topology)
        sizes = small.estimate.sizes
        found = compiled(small, done)
        formulas, kinds = collections.Counter(), collections.defaultdict(collections.Counter)
        for exchange in small.estimate.times.exchanges:
            devices = math.prod(getattr(sizes, axis) for axis in exchange.axes)
            formulas["+".join(exchange.axes)] += exchange.bytes * (devices - 1) / devices
        for each in found["collectives"]:
            kinds["+".join(each["axes"])][each["kind"]] += each["sent"]
        for axes in sorted({*formulas, *kinds}):
            sent = kinds[axes].total()
            if max(formulas[axes], sent) > 1e6:
                parts = ", ".join(f"{kind} {size / 1e9:.2g}" for kind, size in kinds[axes].most_common() if size > 1e6)
                yield {
                    "scaling": point.scaling,
                    "chips": point.chips,
                    "mesh": mesh_name(sizes),
                    "along": axes,
                    "GB_by_formulas": formulas[axes] / 1e9,
                    "GB_compiled": sent / 1e9,
                    "GB_if_sums_are_counted_once": (sent - kinds[axes]["all-reduce"] / 2) / 1e9,
                    "compiled_by_kind": parts,
                }


def depths(point: Point, done: dict) -> Iterator[dict]:
    first = None
    for depth in DEPTHS:
        config = quarter(point.config)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=depth))
        found = compiled(evaluate(point.scaling, config, point.estimate.topology), done)
        first = first or found["cpu"]
        yield {
            "layers": depth,
            "CPU_seconds": found["cpu"],
            "wall_seconds": found["wall"],
            "to_the_first": found["cpu"] / first,
        }


def quarter(config: Config) -> Config:
    """A quarter as wide and long. Key/value heads stay, so that the same meshes divide them."""
    train, shape = config.train, make_job(config).shape
    model = dataclasses.replace(
        config.model,
        width=shape.width // 4,
        num_heads=shape.num_heads // 4,
        feed_forward_width=shape.feed_forward_width // 4,
    )
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=shape.vocab_size // 4)
    train = dataclasses.replace(train, sequence_length=train.sequence_length // 4)
    return dataclasses.replace(config, model=model, tokenizer=tokenizer, train=train)


def compiled(point: Point, done: dict) -> dict:
    """compile_step in a process that has compiled nothing before; each step once."""
    train, sizes, topology = point.config.train, point.estimate.sizes, point.estimate.topology
    key = (topology.name, sizes, train.batch_size, train.microbatches, point.config.model.num_layers)
    if key not in done:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
            done[key] = executor.submit(compile_step, point.config, topology).result()
        print(json.dumps([*key, done[key]]), file=sys.stderr, flush=True)
    return done[key]


def compile_step(config: Config, topology: Topology) -> dict:
    """Seconds of the compiler alone, without tracing, and what the program exchanges."""
    program = Program(config, config.tokenizer.vocab_size, topology.devices())
    with jax.set_mesh(program.mesh):
        lowered = program.lower(abstract_state(program.init, program.mesh))
        wall, cpu = time.perf_counter(), time.process_time()
        compiled = lowered.compile()
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        every = collectives(compiled.as_text(), program.mesh)
    return found | {"collectives": [dataclasses.asdict(each) | {"sent": each.sent} for each in every]}


def show(title: str, rows: list[dict]) -> None:
    """As a table of Markdown."""
    print(f"\n{title}\n\n| {' | '.join(name.replace('_', ' ') for name in rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        print(f"| {' | '.join(cells)} |", flush=True)


def draw(results: dict[str, list[dict]], path: pathlib.Path) -> None:
    # Not needed before: processes that compile start without it.
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    matplotlib.rcParams["svg.hashsalt"] = "llm-jax"  # the same figures make the same file
    import matplotlib.pyplot as plt

    rows = 2 if results["exchanged"] else 1
    figure, panels = plt.subplots(rows, 2, figsize=(11, 4 * rows), layout="constrained", squeeze=False)
    draw_predicted(results["predicted"], *panels[0])
    if results["exchanged"]:
        draw_exchanged(results["exchanged"], panels[1, 0])
        draw_depths(results["depths"], panels[1, 1])
    for axes in list(panels.flat)[:3]:
        axes.set(xlabel="chips", xscale="log", xlim=(CHIPS[0] / 1.3, CHIPS[-1] * 1.3))
        axes.set_xticks(CHIPS[::2], map(str, CHIPS[::2]))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_predicted(results: list[dict], seconds, efficiency) -> None:
    for scaling, color in COLORS.items():
        rows = [row for row in results if row["scaling"] == scaling]
        count = [row["chips"] for row in rows]
        style = {"color": color, "markersize": 4}
        seconds.plot(count, [row["step"] for row in rows], "o-", **style, label=f"{scaling}: step")
        seconds.plot(
            count, [row["step_at_worst"] for row in rows], ":", **style, label=f"{scaling}: if nothing overlaps"
        )
        seconds.plot(count, [row["waiting"] for row in rows], "--", **style, label=f"{scaling}: waiting for exchanges")
        share = [100 * row["efficiency"] for row in rows]
        efficiency.plot(count, share, "o-", **style, label=f"{scaling} scaling")
        for row, place in zip(rows, zip(count, share, strict=True), strict=True):
            if " x " in row["mesh"]:
                efficiency.annotate(
                    row["mesh"], place, xytext=(-6, -10), textcoords="offset points", ha="right", size=7, color=color
                )
    seconds.set(
        title="Llama 3 8B on v5p, predicted by formulas", ylabel="seconds a step", yscale="log", ylim=(1e-4, 1e2)
    )
    efficiency.set(title="Parallel efficiency, predicted by formulas", ylabel="tokens/s a chip, % of that of 4 chips")
    efficiency.set_ylim(0, 110)


def draw_exchanged(results: list[dict], sent) -> None:
    for scaling, color in COLORS.items():
        formulas, compiled = collections.Counter(), collections.Counter()
        for row in results:
            if row["scaling"] == scaling:
                formulas[row["chips"]] += row["GB_by_formulas"]
                compiled[row["chips"]] += row["GB_compiled"]
        size = 11 if scaling == "weak" else 6  # both are seen where they agree
        style = {"color": color, "markerfacecolor": "none", "markersize": size}
        sent.plot(formulas.keys(), formulas.values(), "-", color=color, label=f"{scaling}: formulas")
        sent.plot(compiled.keys(), compiled.values(), "D", **style, label=f"{scaling}: compiled, not run")
    sent.set(title="A quarter as wide and long: compiled, not run", ylabel="GB that a chip sends a step")
    sent.set_ylim(0, 1.15 * sent.get_ylim()[1])


def draw_depths(results: list[dict], depth) -> None:
    seconds = [row["CPU_seconds"] for row in results]
    bars = depth.bar([str(row["layers"]) for row in results], seconds, color="tab:gray", width=0.5)
    depth.bar_label(bars, fmt="%.0f")
    depth.margins(y=0.15)
    depth.set(
        title=f"Compiling that step for {DEPTH_CHIPS} chips", xlabel="layers", ylabel="CPU seconds of the compiler"
    )


if __name__ == "__main__":
    main()
