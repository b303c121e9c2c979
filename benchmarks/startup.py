"""From a command to its first useful work: import, help, and the first step of training, with cold and warm caches.

Command:  python benchmarks/startup.py [--config=FILE] [--config.X=VALUE ...] [--repetitions=3] [--install]
          [--json=FILE]
Time:     3 minutes on 2 cores; with --install 2 more, and what pip downloads

It measures the llm_jax that is installed. A training is started in a workdir of its own, timed from the start of the
process until the record has its first step, and ended by SIGTERM; the ledger of the run says what the time went into.
First with nothing prepared, then with the data but nothing compiled, then with both. --install makes a new virtual
environment, installs this repository there, and trains to the first step: all that the first command of README.md does
until then.

Goals: llm_jax.cli is imported in 0.2 s, and with warm caches the first step is done within 15 s on CPU.
"""

import argparse
import contextlib
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from facts import HERE, machine, spread, write

from llm_jax.config import UserError
from llm_jax.measure.goodput import summarize
from llm_jax.measure.metrics import read

QUICKSTART = HERE.parent / "configs" / "quickstart.py"
SECONDS_TO_STEP = 900  # so that a hang is an error
IMPORT = "import time; begin = time.perf_counter(); import llm_jax.cli; print(time.perf_counter() - begin)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(QUICKSTART), help="as for `llm-jax train`")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--install", action="store_true", help="into a new environment, first")
    parser.add_argument("--json", help="file to which the figures are written")
    arguments, overrides = parser.parse_known_args()
    flags = [f"--config={arguments.config}", *overrides]
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = pathlib.Path(name)
        try:
            if arguments.install:
                results |= install(folder / "install", flags)
            results |= commands(arguments.repetitions)
            results |= trainings(folder, flags, arguments.repetitions)
        except UserError as error:
            sys.exit(str(error))
    print(table(results))
    write(arguments.json, {"flags": flags, "startup": results})


def timed(call: Callable[[], object], repetitions: int) -> dict:
    """Seconds, and CPU seconds of the processes that it starts."""
    seconds, cpu = [], []
    for _ in range(repetitions):
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"seconds": spread(seconds), "CPU seconds": spread(cpu)}


def commands(repetitions: int) -> dict[str, dict]:
    def output(*arguments: str) -> str:
        return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout

    output("-c", IMPORT)  # bytecode is written
    imports = [float(output("-c", IMPORT)) for _ in range(max(repetitions, 5))]
    return {
        "python -c pass": timed(lambda: output("-c", "pass"), repetitions),
        "import llm_jax.cli (goal: 0.2 s)": {"seconds": spread(imports)},
        "llm-jax --help": timed(lambda: output("-m", "llm_jax", "--help"), repetitions),
    }


def trainings(folder: pathlib.Path, flags: list[str], repetitions: int) -> dict[str, dict]:
    cache = folder / "cache"
    results = {}
    for what, times in (
        ("first step, nothing prepared", 1),
        ("first step, data prepared, nothing compiled", repetitions),
        ("first step, all of it there (goal: 15 s)", repetitions),
    ):
        found = []
        for _ in range(times):
            if "nothing compiled" in what:
                shutil.rmtree(cache / "compiled")
            found.append(first_step([sys.executable, "-m", "llm_jax"], cache, flags))
        results[what] = {
            "seconds": spread([one["seconds"] for one in found]),
            "CPU seconds": spread([one["CPU seconds"] for one in found]),
            "of which": {
                part: spread([one["of which"][part] for one in found])["median"] for part in found[0]["of which"]
            },
        }
    return results


def first_step(command: list[str], cache: pathlib.Path, flags: list[str]) -> dict:
    """Seconds until the record has a step; the CPU seconds and the parts are those until the end, a moment later."""
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache.parent) as workdir, contextlib.ExitStack() as stack:
        record, output = pathlib.Path(workdir) / "metrics.jsonl", stack.enter_context(tempfile.TemporaryFile("w+"))
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(
            [*command, "train", f"--workdir={workdir}", *flags],
            env=os.environ | {"LLM_JAX_CACHE": str(cache)},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        while not record.exists() or all("kind" in line for line in read(record)):
            if process.poll() is not None or time.perf_counter() > begin + SECONDS_TO_STEP:
                output.seek(0)
                raise UserError(f"the training came to no first step; it printed:\n{output.read()}")
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        process.terminate()
        process.wait(SECONDS_TO_STEP)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        parts = summarize(pathlib.Path(workdir) / "ledger.jsonl")["seconds"]
    return {
        "seconds": seconds,
        "CPU seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "of which": parts,
    }


def install(folder: pathlib.Path, flags: list[str]) -> dict[str, dict]:
    folder.mkdir()
    python = str(folder / "venv" / "bin" / "python")

    def make() -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", str(HERE.parent)], check=True, stdout=sys.stderr)

    made = timed(make, 1)
    first = first_step([str(folder / "venv" / "bin" / "llm-jax")], folder / "cache", flags)
    size = sum(path.stat().st_size for path in (folder / "venv").rglob("*") if not path.is_symlink())
    return {
        f"venv and pip install ({size / 1e9:.1f} GB)": made,
        "first step there, nothing prepared": {
            "seconds": spread([first["seconds"]]),
            "CPU seconds": spread([first["CPU seconds"]]),
            "of which": first["of which"],
        },
    }


def table(results: dict[str, dict]) -> str:
    found = machine()
    lines = [
        f"{found['cpu']}, {found['cores']} cores, load {found['load']:.1f}; jax {found['versions']['jax']}; "
        f"{found['commit']}",
        f"{'':46}{'seconds':>9}{'range':>18}{'CPU seconds':>13}",
    ]
    for name, row in results.items():
        seconds, cpu = row["seconds"], row.get("CPU seconds")
        low, high = seconds["range"]
        lines.append(
            f"{name:46}{seconds['median']:9.2f}{f'{low:.2f} .. {high:.2f}':>18}"
            + (f"{cpu['median']:13.2f}" if cpu else "")
        )
        for part, value in row.get("of which", {}).items():
            if value >= 0.05:
                lines.append(f"    {part:42}{value:9.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
