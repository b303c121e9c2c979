"""`llm-jax verify-resume`: proves on this machine that a killed run goes on as if nothing had happened.

It trains the given config for some steps undisturbed; again, killed on the way and started again; and a third time,
started again on another mesh. It compares what the runs recorded and writes a certificate. No run is killed before it
has a checkpoint to go on from: one that began anew would prove nothing. Run it on the machines of a long run before the
long run.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
import random
import socket
import subprocess
import sys
import typing

import llm_jax
from llm_jax.config import Checkpoint, Config, Log, Parallel, RunFailed, UserError, dumps, validate
from llm_jax.jobs.workdir import Workdir, write_atomically
from llm_jax.measure import metrics
from llm_jax.parallel.sharding import AXES
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.safety.remote import is_url

COMPARED = ("loss", "grad_norm", "learning_rate", "tokens", "batch")
OTHER_MESH_TOLERANCE = 1e-4  # relative, of the loss: another mesh adds up in another order
SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_END = 60.0  # for the processes that were not killed


def run(
    config: Config,
    workdir: str,
    as_json: bool = False,
    steps: int = 20,
    kills: int = 2,
    seed: int = 0,
    processes: int = 1,
    mesh: str | None = None,
    other_devices: int | None = None,
) -> int:
    """The verb: writes WORKDIR/certificate.json; exit code 0 if the promise holds, 70 if not.

    steps: how far the runs are compared; kills: by SIGKILL, of one of the processes, at steps drawn by `seed`;
    processes: of each run, on this machine; mesh and other_devices: axes and simulated devices of a third run, which
    is of one process (both None: no third run).
    """
    other_mesh = other_parallel(config.parallel, mesh, other_devices)
    if other_mesh is not None:
        validate(dataclasses.replace(config, parallel=other_mesh))
    if kills >= steps:
        raise UserError(f"--kills={kills} must be less than --steps={steps}; try --steps={2 * kills + 2}")
    if steps > config.train.steps:
        raise UserError(f"--steps={steps} must be at most train.steps={config.train.steps}")
    say = (lambda text: None) if as_json else print
    if is_url(workdir):
        raise UserError(f"--workdir={workdir}: verify-resume kills processes of this machine; give it a folder here")
    folder = pathlib.Path(workdir).expanduser().absolute()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--workdir={folder} is not empty; give a new directory")
    folder.mkdir(parents=True, exist_ok=True)

    every = max(1, steps // (kills + 2))
    config = dataclasses.replace(
        config,
        checkpoint=Checkpoint(every=every, keep=steps),
        evaluate=dataclasses.replace(config.evaluate, every=None, subset=1),
        log=Log(tensorboard=False, sample_prompt=None),
    )
    moments = sorted(random.Random(seed).sample(range(every, steps), kills))
    say(f"training {steps} steps undisturbed")
    undisturbed, _ = _train(config, folder / "undisturbed", [steps], processes)
    say(f"training {steps} steps, killed by SIGKILL at {', '.join(map(str, moments))}")
    killed, resumed = _train(config, folder / "killed", [*moments, steps], processes)
    results = {"same_mesh": {"resumed_from": resumed, **compare(undisturbed, killed, steps, tolerance=0.0)}}
    if other_mesh is not None:
        say(f"training {steps} steps, killed at {moments[0]} and continued on another mesh")
        other = dataclasses.replace(config, parallel=other_mesh)
        _train(config, folder / "other_mesh", [moments[0]], processes)
        moved, resumed = _train(other, folder / "other_mesh", [steps], 1)
        compared = compare(undisturbed, moved, steps, tolerance=OTHER_MESH_TOLERANCE)
        results["other_mesh"] = {"resumed_from": resumed, **compared}

    certificate = {
        "llm_jax": llm_jax.__version__,
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config_sha256": hashlib.sha256(dumps(config).encode()).hexdigest(),
        "steps": steps,
        "killed_at": moments,
        "processes": processes,
        **results,
        "holds": all(result["holds"] for result in results.values()),
    }
    text = json.dumps(certificate, sort_keys=True)
    certificate["sha256"] = hashlib.sha256(text.encode()).hexdigest()  # of the rest: an edit shows
    write_atomically(folder / "certificate.json", (json.dumps(certificate, indent=2) + "\n").encode())
    if as_json:
        print(json.dumps(certificate, indent=2))
    else:
        for name, result in results.items():
            print(f"{name.replace('_', ' ')}: {describe(result)}")
        print(f"{'HOLDS' if certificate['holds'] else 'DOES NOT HOLD'}: {folder / 'certificate.json'}")
    return 0 if certificate["holds"] else 70


def other_parallel(parallel: Parallel, mesh: str | None, devices: int | None) -> Parallel | None:
    """The mesh of the third run, from "fsdp=4,tensor=2" and the number of simulated devices, as far as given."""
    if mesh is None and devices is None:
        return None
    sizes: dict[str, int | None] = {**dict.fromkeys(AXES, 1), "fsdp": None}
    for part in mesh.split(",") if mesh else ():
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh={mesh}: {part!r} is not AXIS=SIZE with one of the axes {', '.join(sizes)}")
        sizes[axis] = int(size)
    devices = devices or parallel.num_cpu_devices
    return dataclasses.replace(parallel, **sizes, auto=False, rounds=1, num_cpu_devices=devices)


def compare(reference: Workdir, other: Workdir, steps: int, *, tolerance: float) -> dict[str, typing.Any]:
    """What two runs recorded in their first steps. tolerance 0 asks for the same bits, of the checkpoints too."""
    curves = [
        {line["step"]: line for line in metrics.read(run.metrics) if "kind" not in line and line["step"] <= steps}
        for run in (reference, other)
    ]
    missing = [step for step in range(1, steps + 1) if step not in curves[0] or step not in curves[1]]
    batches = [s for s in curves[0] if s not in missing and curves[0][s]["batch"] != curves[1][s]["batch"]]
    errors = {s: abs(curves[1][s]["loss"] / curves[0][s]["loss"] - 1) for s in range(1, steps + 1) if s not in missing}
    if tolerance:
        unequal = [step for step, error in errors.items() if not error <= tolerance]
        common, states = [], []
    else:
        unequal = [s for s in errors if any(curves[0][s][key] != curves[1][s][key] for key in COMPARED)]
        saved = [Checkpoints(run.checkpoints) for run in (reference, other)]
        common = [step for step in saved[0].steps() if step in saved[1].steps() and step <= steps]
        states = [s for s in common if saved[0].record(s)["digests"] != saved[1].record(s)["digests"]]
    return {
        "holds": not (missing or batches or unequal or states),
        "missing_steps": missing,
        "first_other_batch": batches[0] if batches else None,
        "first_other_loss": unequal[0] if unequal else None,
        "first_other_checkpoint": states[0] if states else None,
        "checkpoints_compared": common,
        "largest_relative_difference": max(errors.values(), default=0.0),
        "tolerance": tolerance,
    }


def describe(result: dict) -> str:
    if result["holds"]:
        largest = result["largest_relative_difference"]
        return "bit-identical" if not result["tolerance"] else f"same batches, losses within {largest:.1e} relative"
    found = {key: value for key, value in result.items() if key.startswith(("first", "missing")) and value}
    return "differs: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items())


def _train(config: Config, folder: pathlib.Path, ends: list[int], processes: int) -> tuple[Workdir, list[int]]:
    """Starts `llm-jax train` once for each of `ends`, and kills one of its processes when it has recorded that step and
    has a checkpoint; the others have a minute to end by themselves.

    Returns the run and the steps that its starts went on from.
    """
    work = Workdir(folder)
    folder.mkdir(exist_ok=True)
    work.save_config(config)
    saved = Checkpoints(work.checkpoints)
    command = [sys.executable, "-m", "llm_jax", "train", f"--workdir={folder}"]
    resumed = []
    for end in ends:
        first = saved.latest()
        if first is not None:
            resumed.append(first)
            record = metrics.MetricsLog(work.metrics)  # only as far as the checkpoint: what comes is of this start
            record.rewind(first)
            record.close()
        target = max(end, (first or 0) + 1)
        last_save = target // config.checkpoint.every * config.checkpoint.every

        def reached(step: int = target, save: int = last_save) -> bool:
            lines = metrics.read(work.metrics) if work.metrics.exists() else []
            return (saved.latest() or 0) >= save and any("kind" not in line and line["step"] >= step for line in lines)

        with open(folder / "output.txt", "ab") as output, socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"--coordinator=127.0.0.1:{listener.getsockname()[1]}"
            listener.close()
            many = [[address, f"--num_processes={processes}", f"--process_id={i}"] for i in range(processes)]
            running = [
                subprocess.Popen(
                    command + (flags if processes > 1 else ["--num_processes=1"]),
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                )
                for flags in many
            ]
            try:
                while not reached():
                    try:
                        code = running[0].wait(SECONDS_BETWEEN_LOOKS)
                    except subprocess.TimeoutExpired:
                        continue
                    if not reached():
                        tail = (folder / "output.txt").read_text(errors="replace").splitlines()[-1:]
                        raise UserError(f"the training ended with exit code {code} before step {end}: {' '.join(tail)}")
                running[end % processes].kill()
                for process in running:
                    process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired as error:
                raise RunFailed(f"one process was killed, and another did not end in {SECONDS_TO_END} s") from error
            finally:
                for process in running:
                    process.kill()
                    process.wait()
    return work, resumed
