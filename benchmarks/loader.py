"""Whether the host keeps up: tokens/s of the loader on one core, and what an iteration of the step loop costs.

Command:  python benchmarks/loader.py [--config=FILE] [--config.X=VALUE ...] [--sizes=8x256,16x1024,4x4096]
          [--steps=1000] [--tokens_per_second=NUMBER] [--json=FILE]
Time:     1 minute on 2 cores, and what `llm-jax prepare` takes the first time

The loader makes batches of the config's data, rows x tokens of each of --sizes, and is timed in CPU seconds of all its
threads, which other work on the machine hardly changes. With --tokens_per_second, which the device takes by
benchmarks/train.py, it says how many times faster one core loads; the goal is 20. Documents are read whole, so the
tokens of a document (of a window, where that is longer) matter: they stand beside the figures.

The loop is that of `llm-jax train`, with its records, watchdog, preemption and checkpoints, around an update that does
nothing but count. The state and the metrics are those of the config, and the batch lies ready. So the time of an
iteration is what the host adds to a step if nothing of it is hidden behind the devices. The goal is 1 ms.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from facts import HERE, spread, write

from llm_jax.config import Config, UserError, to_dict, validate
from llm_jax.flags import load_config_file, override
from llm_jax.jobs import train
from llm_jax.jobs.prepare import Prepared, prepare
from llm_jax.jobs.setup import Setup
from llm_jax.jobs.workdir import start
from llm_jax.parallel.sharding import make_mesh

QUICKSTART = HERE.parent / "configs" / "quickstart.py"
BATCHES, REPETITIONS = 20, 5
GOAL_TIMES, GOAL_MS = 20, 1
FIRST_STEPS = 50  # of the loop, left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(QUICKSTART), help="as for `llm-jax train`")
    parser.add_argument("--sizes", default="8x256,16x1024,4x4096", help="rows x tokens of batches")
    parser.add_argument("--steps", type=int, default=1000, help="iterations of the loop")
    parser.add_argument("--tokens_per_second", type=float, help="that the device takes")
    parser.add_argument("--json", help="file to which the figures are written")
    arguments, overrides = parser.parse_known_args()
    try:
        config = override(load_config_file(arguments.config), overrides)
        validate(config)
        start(config)
        with contextlib.redirect_stdout(sys.stderr):
            prepared = prepare(config)
            loaded = loader(config, prepared, arguments.sizes.split(","), arguments.tokens_per_second)
            iteration = loop(config, arguments.steps)
    except UserError as error:
        sys.exit(str(error))
    print(table(loaded, iteration))
    write(arguments.json, {"config": to_dict(config), "loader": loaded, "seconds of an iteration": iteration})


def sized(config: Config, rows: int, length: int) -> Config:
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=rows, sequence_length=length, microbatches=1)
    )


def loader(config: Config, prepared: Prepared, sizes: list[str], device: float | None) -> list[dict]:
    documents = sum(store.num_documents for store in prepared.train.values())
    tokens = sum(store.num_tokens for store in prepared.train.values())
    found = []
    for size in sizes:
        rows, length = map(int, size.split("x"))
        with jax.set_mesh(make_mesh(config.parallel)):
            setup = Setup(sized(config, rows, length), prepared)
            numbers = itertools.count()
            alone = timed(lambda setup=setup, numbers=numbers: setup.stream.batch(next(numbers)))
            whole = timed(lambda setup=setup, numbers=numbers: jax.block_until_ready(setup.batch(next(numbers))))
        rate = rows * length / whole["median"]
        found.append({
            "rows": rows,
            "length": length,
            "tokens a document": tokens / documents,
            "CPU seconds of a batch": alone,
            "CPU seconds of a batch, with its way to the device": whole,
            "tokens per CPU second": rate,
            "times what the device takes": device and rate / device,
        })  # fmt: skip
    return found


def timed(make: Callable[[], object]) -> dict:
    """CPU seconds of one."""
    values = []
    for _ in range(1 + REPETITIONS):
        begin = time.process_time()
        for _ in range(BATCHES):
            make()
        values.append((time.process_time() - begin) / BATCHES)
    return spread(values[1:])


class Idle(Setup):
    """The setup of a run whose update only counts, and whose batches are all the same.

    marks: for each iteration, the time of day and the CPU time of this thread.
    """

    marks: list[tuple[float, float]]

    def compile(self, state):
        _, metrics = self.lower(state).out_info
        values = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)
        # Those of an untrained model, or the run would refuse them.
        values["loss"] = jnp.asarray(math.log(self.shape.vocab_size), jnp.float32)
        values["gradient_norms"] = jax.tree.map(jnp.ones_like, values["gradient_norms"])
        structure = jax.tree.structure(state)

        def count(leaves, batch):
            state = jax.tree.unflatten(structure, leaves)
            state = dataclasses.replace(state, step=state.step + 1)
            return jax.tree.leaves(state), jax.tree.map(jnp.copy, values)

        return jax.jit(count, donate_argnames="leaves").lower(jax.tree.leaves(state), self.batch(0)).compile()

    def batches(self, first_step: int, rewinds) -> Iterator[dict[str, jax.Array]]:
        batch, Idle.marks = self.batch(0), []
        while True:
            self.marks.append((time.perf_counter(), time.thread_time()))
            yield batch


def loop(config: Config, steps: int) -> dict[str, dict]:
    """Seconds of an iteration, and those that its thread is at work: all but waiting for others, or for a core."""
    steps += FIRST_STEPS
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0, decay_steps=None),
        train=dataclasses.replace(config.train, steps=steps),
        checkpoint=dataclasses.replace(config.checkpoint, every=steps, keep_best=None, recompute_every=None),
        evaluate=dataclasses.replace(config.evaluate, every=None),
        log=dataclasses.replace(config.log, sample_prompt=None),
    )
    validate(config)
    train.Setup = Idle
    with tempfile.TemporaryDirectory(prefix="loop-") as folder:
        code = train.run(config, folder)
    assert code == 0
    marks = Idle.marks[FIRST_STEPS:]
    return {
        name: spread([b - a for a, b in itertools.pairwise(values)])
        for name, values in zip(("wall", "thread"), zip(*marks, strict=True), strict=True)
    }


def table(loaded: list[dict], iteration: dict[str, dict]) -> str:
    lines = [f"{'batch':>12} {'tokens a document':>18} {'CPU ms':>8} {'to the device':>14} {'tokens/s a core':>16}"]
    for row in loaded:
        times = row["times what the device takes"]
        goal = "" if times is None else f", {times:,.0f} times the device (goal: {GOAL_TIMES})"
        lines.append(
            f"{row['rows']:5} x {row['length']:4} {row['tokens a document']:18,.0f} "
            f"{1e3 * row['CPU seconds of a batch']['median']:8.2f} "
            f"{1e3 * row['CPU seconds of a batch, with its way to the device']['median']:14.2f} "
            f"{row['tokens per CPU second']:16,.0f}{goal}"
        )
    low, high = (1e3 * value for value in iteration["wall"]["quartiles"])
    lines.append(
        f"an iteration of the loop: {1e3 * iteration['wall']['median']:.2f} ms, quartiles {low:.2f} .. {high:.2f}, of "
        f"{iteration['wall']['count']}; its thread works {1e3 * iteration['thread']['median']:.2f} ms of it (goal: "
        f"{GOAL_MS} ms)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
