"""What safety costs: in the step loop, at a save, at a restore, and until the processes of a broken run are gone.

Command:  python benchmarks/safety.py [--folder=DIR] [--json=FILE] [--skip=faults]
Time:     3 minutes on 2 busy cores, and 6 more for the faults

It measures the llm_jax that is installed, on the devices that JAX finds, and the disk of --folder. Times on a shared
machine scatter by several percent, so what is compared runs in turns in one process, and the median of the ratios of
neighbours is given with the spread. The faults are those of four processes on the CPU of this machine.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import json
import os
import pathlib
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from llm_jax.config import Config, Model, Spikes, to_dict
from llm_jax.flags import load_config_file
from llm_jax.jobs.prepare import Prepared, prepare
from llm_jax.jobs.record import Record
from llm_jax.jobs.sections import Sections
from llm_jax.jobs.setup import Setup
from llm_jax.jobs.workdir import Workdir, start
from llm_jax.measure.goodput import Ledger
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import Rules, make_mesh, num_shards
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.safety.digest import examine
from llm_jax.safety.watchdog import Watchdog
from llm_jax.training.losses import Weights
from llm_jax.training.schedule import make_schedule
from llm_jax.training.state import TrainState, abstract_state
from llm_jax.training.step import train_step

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
STEP_SECONDS = 0.5  # of the step that the promise speaks of
SHORT_PAIRS, WARM_UP = 90, 10  # of steps
LONG_PAIRS, LONG_BLOCK = 16, 2  # pairs of blocks, steps of a block
NUM_ARRAYS, ARRAY_WIDTH = 24, 2048  # 403 MB of float32
REPETITIONS = 3
NUM_PROCESSES = 4
FAULTS = {  # victim, signal; process 0 holds JAX's coordination service
    "SIGKILL of a worker": (2, signal.SIGKILL),
    "SIGKILL of process 0": (0, signal.SIGKILL),
    "SIGSTOP of a worker": (2, signal.SIGSTOP),
    "SIGTERM to a worker": (2, signal.SIGTERM),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="on the disk to be measured, 1.5 GB free; default: that of temporary files")
    parser.add_argument("--json", help="file to which the figures are written")
    parser.add_argument("--skip", choices=["faults"], help="they take most of the time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="safety-") as name:
        folder = pathlib.Path(name)
        # Before this process takes the cores, or a thread of it the time.
        broken = {} if arguments.skip == "faults" else {"faults": faults(folder / "faults")}
        config = load_config_file(str(QUICKSTART))
        start(config)
        config = sized(config)
        with contextlib.redirect_stdout(sys.stderr):
            prepared = prepare(config)
        where = machine()
        with jax.set_mesh(make_mesh(config.parallel)):
            cost, step = overhead(folder / "overhead", config, prepared)
            results = {"overhead": cost, "saves": saves(folder / "saves"), "beside": beside(folder / "beside", step)}
    results |= broken
    print(json.dumps(where) + "\n\n" + table(results))
    if arguments.json:
        content = {"machine": where, "config": to_dict(config), **results}
        pathlib.Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n")


def sized(config: Config) -> Config:
    """The config of a short step, a few times longer than what an accelerator needs to start one. No update shall be
    a spike: the incident that it makes is no part of a step."""
    on_cpu = jax.default_backend() == "cpu"
    shards = num_shards(make_mesh(config.parallel), Rules().batch)
    model = config.model if on_cpu else Model(num_layers=12, width=768, num_heads=12, tie_embeddings=True)
    length, rows = (256, 1) if on_cpu else (1024, 8)
    return dataclasses.replace(
        config,
        model=model,
        optimizer=dataclasses.replace(config.optimizer, peak_learning_rate=1e-5),
        train=dataclasses.replace(config.train, steps=100_000, sequence_length=length, batch_size=rows * shards),
        spikes=Spikes(action="skip", threshold=1e6),
    )


def overhead(folder: pathlib.Path, config: Config, prepared: Prepared) -> tuple[dict, Callable[[], None]]:
    """What the guards add to a step, in three ways; and a function that makes one short step, and waits for it.

    The parts in the compiled update (detection of spikes, skipping, norms, the digest of the batch) cost the same
    whatever the size of the batch, so a short step shows in milliseconds what a long one hides in its noise. The calls
    around the update are timed while the devices have nothing to do. And steps of 0.5 s with all of that, against those
    of a loop that does nothing but wait for the loss one step late.
    """
    short = Setup(config, prepared)
    calls, close = loop(folder, config, short)
    states = {name: jax.tree.leaves(jax.jit(short.init)()) for name in ("bare", "guarded")}
    short_updates, short_batch = compiled(short), short.batch(0)
    seconds = short_steps(short_updates, states, short_batch, calls)
    in_step = [guarded - bare for bare, guarded in zip(seconds["bare"], seconds["guarded"], strict=True)]
    both = statistics.median(seconds["calls"]) + statistics.median(in_step)

    # On CPU a larger batch; elsewhere it would not fit, and as many microbatches take its place.
    times = max(1, round(STEP_SECONDS / statistics.median(seconds["bare"])))
    train = dataclasses.replace(config.train, batch_size=times * config.train.batch_size)
    train.microbatches = 1 if jax.default_backend() == "cpu" else times
    setup = Setup(dataclasses.replace(config, train=train), prepared)
    updates = compiled(setup)
    blocks = long_steps(updates, states, setup.batch(0), calls)
    close()

    def step() -> None:
        states["bare"], _ = short_updates["bare"](states["bare"], short_batch)
        jax.block_until_ready(states["bare"])

    figures = {
        "calls around the update": figure(seconds["calls"], "ms", 1e3),
        "parts in the update": figure(in_step, "ms", 1e3),
        f"both, of a step of {STEP_SECONDS} s (promise: 1 %)": figure([both / STEP_SECONDS], "%", 100),
        "short step, bare": figure(seconds["bare"], "ms", 1e3),
        f"step of {times} times the batch, bare": figure(blocks["bare"], "ms", 1e3),
        "the same, guarded / bare": figure([b / a for a, b in zip(blocks["bare"], blocks["guarded"], strict=True)], ""),
    }
    costs = {name: update.cost_analysis() or {} for name, update in updates.items()}
    for what in ("flops", "bytes accessed"):  # of a loop, XLA counts one turn
        bare, guarded = (float(costs[name].get(what, 0)) for name in ("bare", "guarded"))
        figures[f"its {what} by XLA, bare"] = figure([bare], "G", 1e-9)
        figures[f"its {what} by XLA, more when guarded"] = figure([guarded - bare], "G", 1e-9)
    return figures, step


def short_steps(updates: dict, states: dict, batch: dict, calls: Callable) -> dict[str, list[float]]:
    """Seconds of single steps, and of the calls after each, in turns."""
    seconds: dict[str, list[float]] = {"bare": [], "guarded": [], "calls": []}
    for pair in range(SHORT_PAIRS):
        metrics = {}
        for name in turn(pair):
            begin = time.perf_counter()
            states[name], metrics[name] = updates[name](states[name], batch)
            jax.block_until_ready((states[name], metrics[name]))
            seconds[name].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        calls(metrics["guarded"])
        seconds["calls"].append(time.perf_counter() - begin)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def long_steps(updates: dict, states: dict, batch: dict, calls: Callable) -> dict[str, list[float]]:
    """Seconds of a step of either loop, in blocks that take turns."""
    seconds: dict[str, list[float]] = {"bare": [], "guarded": []}
    for pair in range(1 + LONG_PAIRS):
        for name in turn(pair):
            before = None
            begin = time.perf_counter()
            for _ in range(LONG_BLOCK):
                states[name], metrics = updates[name](states[name], batch)
                if name == "guarded":
                    calls(metrics)
                elif before is not None:
                    float(before["loss"])
                before = metrics
            jax.block_until_ready(states[name])
            seconds[name].append((time.perf_counter() - begin) / LONG_BLOCK)
    return {name: values[1:] for name, values in seconds.items()}


def turn(pair: int) -> tuple[str, str]:
    return ("guarded", "bare") if pair % 2 else ("bare", "guarded")


def loop(folder: pathlib.Path, config: Config, setup: Setup) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """(what jobs/train.py calls after each update, what ends it)."""
    work = Workdir(folder)
    work.claim(config)
    watchdog = Watchdog(dataclasses.asdict(config.watchdog), work.stacks, jax.process_index())
    ledger = Ledger(work.ledger, began=time.time())
    sections = Sections(ledger, watchdog, print)
    with contextlib.redirect_stderr(io.StringIO()):  # takes the lines of progress
        record = Record(work, config, setup, 0, sections, lambda step: "")
    checkpoints, preemption, steps = Checkpoints(work.checkpoints, keep=1), hosts.Preemption(), itertools.count(1)
    sections.enter("step")

    def calls(metrics: dict) -> None:
        with sections("data"):
            pass
        record.training(next(steps), metrics)
        checkpoints.check()
        preemption.reached()

    def close() -> None:
        checkpoints.close()
        record.close()
        watchdog.close()
        ledger.close()

    return calls, close


def compiled(setup: Setup) -> dict:
    state = abstract_state(setup.init, setup.mesh)
    return {"bare": compile_bare(setup, state), "guarded": setup.compile(state)}


def compile_bare(setup: Setup, state: TrainState):
    """The update without its guards: what is computed for them alone is not returned, so XLA leaves it out."""
    config, structure = setup.config, jax.tree.structure(state)

    def update(leaves, batch):
        state = jax.tree.unflatten(structure, leaves)
        after, metrics = train_step(
            state,
            batch,
            optimizer=setup.optimizer,
            schedule=make_schedule(config.optimizer, config.train.steps),
            num_microbatches=config.train.microbatches,
            pipelined=False,
            weights=Weights(),
            router_bias_rate=None,
            chunk=config.train.loss_chunk,
            skip=False,
            threshold=config.spikes.threshold,
            ema_decay=None,
        )
        plain = {name: metrics[name] for name in ("loss", "tokens", "grad_norm", "learning_rate")}
        return jax.tree.leaves(dataclasses.replace(after, history=state.history)), plain

    return jax.jit(update, donate_argnums=0).lower(jax.tree.leaves(state), setup.batch(0)).compile()


def saves(folder: pathlib.Path) -> dict:
    """Saving and restoring the arrays of a model, beside a synchronous save by Orbax alone, and dd on the same disk.
    What is read has been dropped from the page cache of this machine."""
    arrays = make_arrays()
    targets = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in arrays.items()}
    size = sum(array.nbytes for array in arrays.values())
    synchronous = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable, *arguments) -> None:
        begin = time.perf_counter()
        call(*arguments)
        seconds.setdefault(name, []).append(time.perf_counter() - begin)

    folder.mkdir()
    count = -(-size // 2**24)
    for number in range(1 + REPETITIONS):  # the first one compiles the digests
        path = folder / str(number)
        file = path.with_suffix(".dd")
        timed("dd write", dd, "if=/dev/zero", f"of={file}", f"count={count}", "conv=fdatasync")
        drop_from_cache(file)
        timed("dd read", dd, f"if={file}", "of=/dev/null")
        file.unlink()
        arguments = ocp.args.PyTreeSave(arrays)
        timed("synchronous", lambda path, arguments: synchronous.save(path, args=arguments), path / "orbax", arguments)
        checkpoints = Checkpoints(path / "ours", keep=1)
        timed("digests", examine, arrays)
        timed("blocked", checkpoints.save, 1, {"parameters": arrays}, {})
        timed("complete", checkpoints.wait)
        timed("verified", checkpoints.close)
        for saved in path.rglob("*"):
            drop_from_cache(saved)
        timed("restore", Checkpoints(path / "ours").restore, {"parameters": targets})
        shutil.rmtree(path)
    seconds = {name: values[1:] for name, values in seconds.items()}
    # Each stage from the beginning of the save on.
    seconds["complete"] = list(map(sum, zip(seconds["blocked"], seconds["complete"], strict=True)))
    seconds["verified"] = list(map(sum, zip(seconds["complete"], seconds["verified"], strict=True)))

    def ratio(a: str, b: str, unit: str = "", factor: float = 1) -> dict:
        return figure([x / y for x, y in zip(seconds[a], seconds[b], strict=True)], unit, factor)

    def speed(name: str) -> dict:
        return figure([size / value for value in seconds[name]], "MB/s", 1e-6)

    return {
        "size": figure([size], "MB", 1e-6),
        "synchronous save by Orbax alone": figure(seconds["synchronous"], "s"),
        "save() blocks the loop": figure(seconds["blocked"], "s"),
        "of which digests": figure(seconds["digests"], "s"),
        "save until complete": figure(seconds["complete"], "s"),
        "save until verified": figure(seconds["verified"], "s"),
        "blocked / synchronous (promise: 5 %)": ratio("blocked", "synchronous", "%", 100),
        "dd writes": speed("dd write"),
        "save until complete, speed": speed("complete"),
        "the same / dd": ratio("dd write", "complete"),
        "dd reads": speed("dd read"),
        "restore with digests, speed": speed("restore"),
        "the same / dd reads": ratio("dd read", "restore"),
    }


def make_arrays() -> dict[str, jax.Array]:
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), Rules().spec("embed", None))
    make = jax.jit(lambda key: jax.random.normal(key, (ARRAY_WIDTH, ARRAY_WIDTH)), out_shardings=sharding)
    return {f"layer_{i}": make(jax.random.key(i)) for i in range(NUM_ARRAYS)}


def beside(folder: pathlib.Path, step: Callable[[], None]) -> dict:
    """What a step takes in a quiet time, while a save is written, and while it is verified."""
    checkpoints, items = Checkpoints(folder, keep=1), {"parameters": make_arrays()}
    seconds: dict[str, list[float]] = {"quiet": [], "written": [], "verified": []}

    def timed_step(when: str) -> None:
        begin = time.perf_counter()
        step()
        seconds[when].append(time.perf_counter() - begin)

    for _ in range(40):
        timed_step("quiet")
    checkpoints.save(1, items, {})
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        for when, wait in (("written", checkpoints.wait), ("verified", checkpoints.close)):
            waiting = executor.submit(wait)
            while not waiting.done():
                timed_step(when)
            waiting.result()
    names = {"quiet": "short step", "written": "while a save is written", "verified": "while it is verified"}
    return {names[when]: figure(values, "ms", 1e3) for when, values in seconds.items() if values}


def faults(folder: pathlib.Path) -> dict:
    """How long after a fault in one of four processes all others are gone, with which exit codes. SIGTERM is a notice:
    all notice it, finish the step, save and leave."""
    folder.mkdir()
    found = {}
    for name, (victim, number) in FAULTS.items():
        seconds, codes = [], set()
        for repetition in range(REPETITIONS):
            print(f"{name}, {repetition + 1} of {REPETITIONS}", file=sys.stderr)
            with running(folder / f"{number.name}-{victim}-{repetition}") as processes:
                begin = time.perf_counter()
                processes[victim].send_signal(number)
                alive = [p for i, p in enumerate(processes) if i != victim or number == signal.SIGTERM]
                codes |= {process.wait(timeout=300) for process in alive}
                seconds.append(time.perf_counter() - begin)
        promise = " (promise: 5 s)" if number != signal.SIGTERM else ", saved"
        found[f"{name}: {sorted(codes)}{promise}"] = figure(seconds, "s")
    return found


@contextlib.contextmanager
def running(folder: pathlib.Path):
    """The processes of a small run, in its step loop."""
    folder.mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    small = {
        "model.num_layers": 1, "model.width": 64, "train.sequence_length": 64, "train.steps": 1_000_000,
        "evaluate.every": "none", "evaluate.subset": 4, "checkpoint.every": 1_000_000, "log.tensorboard": False,
    }  # fmt: skip
    command = [sys.executable, "-m", "llm_jax", "train", f"--config={QUICKSTART}", f"--workdir={folder / 'run'}"]
    command += [f"--config.{field}={value}" for field, value in small.items()]
    command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={NUM_PROCESSES}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # to be in the loop soon
    outputs = [folder / f"{process}.txt" for process in range(NUM_PROCESSES)]
    processes = []
    try:
        for process, output in enumerate(outputs):
            with open(output, "wb") as file:
                processes.append(subprocess.Popen(
                    [*command, f"--process_id={process}"], stdout=file, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, env=environment,
                ))  # fmt: skip
        while "step 10/" not in outputs[0].read_text(errors="replace"):
            for process, output in zip(processes, outputs, strict=True):
                if process.poll() is not None:
                    raise RuntimeError(f"a process ended before the fault:\n{output.read_text(errors='replace')}")
            time.sleep(0.05)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def dd(*arguments: str) -> None:
    subprocess.run(["dd", "bs=16M", *arguments], check=True, stderr=subprocess.DEVNULL)


def drop_from_cache(path: pathlib.Path) -> None:
    if path.is_file():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def figure(values: list[float], unit: str, factor: float = 1) -> dict:
    low, median, high = np.quantile(np.array(values) * factor, (0.25, 0.5, 0.75)).tolist()
    ends = [min(values) * factor, max(values) * factor]
    return {"median": median, "unit": unit, "quartiles": [low, high], "range": ends, "count": len(values)}


def machine() -> dict:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(QUICKSTART.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "llm-jax")}
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "load": os.getloadavg()[0],  # of the last minute: above the cores, others had a part of them
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit or None,
    }


def table(results: dict) -> str:
    lines = [f"{'':54}{'median':>10}{'quartiles':>28}{'range':>24}"]
    for title, figures in results.items():
        lines.append(title)
        for name, found in figures.items():
            line = f"  {name:52}{found['median']:10.4g} {found['unit']:5}"
            if found["count"] > 1:
                line += "".join(f"{low:12.4g} .. {high:<8.4g}" for low, high in (found["quartiles"], found["range"]))
            lines.append(line.rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
