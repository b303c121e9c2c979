"""SIGKILL at random moments costs time and nothing else: what the run writes in the end is bit for bit the same."""

import contextlib
import json
import os
import random
import signal
import subprocess

import pytest
from processes import Processes
from test_train import curve, record

from llm_jax.measure.goodput import summarize

SEED = 1
# How long after it has been seen to begin, in seconds at most, a thing is killed: inside of it, or a little behind.
MOMENTS = {"start": 2.0, "prepare": 1.5, "compile": 1.5, "step": 0.05, "save": 0.05, "evaluation": 0.1, "end": 1.0}
STEPS = 24  # of tests/tiny.py, which saves every 4 and evaluates every 8


def has_reached(running: Processes, workdir, kind: str, step: int) -> bool:
    if kind == "start":
        return True
    text = running.text()
    if kind == "prepare":  # any process may be the one that does it
        return (workdir.parent / "cache" / "tokenizers.lock").exists()
    if kind == "compile":
        return "model: " in text
    if "MFU counts" not in text:  # until then, the files may be those of the processes before
        return False
    if kind == "end":
        return (workdir / "checkpoints" / str(STEPS)).exists()
    lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    if kind == "save" and not any(".orbax-checkpoint-tmp" in name for name in os.listdir(workdir / "checkpoints")):
        return False
    return any(json.loads(line)["step"] >= step for line in lines)


def kill_one(running: Processes, workdir, kind: str, step: int, delay: float, victim: int) -> None:
    """All processes must end; the others by themselves."""
    running.wait_until(lambda: has_reached(running, workdir, kind, step), f"{kind} {step}")
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.processes[victim].wait(delay)
    running.processes[victim].kill()
    if (
        kind == "start"
    ):  # JAX waits 300 s for a process that has never come: here, as a launcher, the test ends the others
        running.kill()
    codes = running.wait()
    assert codes[victim] == -signal.SIGKILL, f"ended before it was killed in {kind} {step}: {running.text(victim)}"
    assert all(codes), codes


def moments(count: int, chance: random.Random) -> list[tuple[str, int, float]]:
    """(what to be in, from which step on, how long to stay) of each kill, in the order in which a run comes by."""
    ends = [("start", 0), ("prepare", 0), ("compile", 0), ("end", STEPS)] if count >= 4 else []
    inside = []
    for _ in range(count - len(ends)):
        kind, step = chance.choice(["step", "save", "evaluation"]), chance.randint(1, STEPS - 2)
        inside.append((kind, step // 8 * 8 + 7 if kind == "evaluation" else step))
    inside.sort(key=lambda moment: moment[1])
    return [(kind, step, chance.uniform(0, MOMENTS[kind])) for kind, step in [*ends[:3], *inside, *ends[3:]]]


def share(kills: int, num_processes: int) -> int:
    """How many of all kills are made in runs of so many processes."""
    many = {2: max(1, kills // 5), 4: max(1, kills // 10)}
    return many.get(num_processes) or kills - sum(many.values())


@pytest.mark.soak
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_killed_runs_end_as_if_nothing_had_happened(num_processes, trained, tiny, tmp_path, request):
    """One of the processes is killed, all end, and the same command goes on."""
    count = share(request.config.getoption("--kills"), num_processes)
    chance = random.Random(SEED)
    cache = tmp_path / "cache"  # of its own, so that there is something to prepare; compiled programs are shared
    cache.mkdir()
    (cache / "compiled").symlink_to(tiny.cache / "compiled")
    environment = tiny.environment | {"LLM_JAX_CACHE": str(cache)}
    workdir = tmp_path / "run"
    for number, (kind, step, delay) in enumerate(moments(count, chance)):
        running = Processes(tiny, workdir, tmp_path / str(number), num_processes, environment=environment)
        kill_one(running, workdir, kind, step, delay, victim=chance.randrange(num_processes))
    last = Processes(tiny, workdir, tmp_path / "last", num_processes, environment=environment)
    assert last.wait_for_the_end() == [0] * num_processes, last.text()

    undisturbed = trained
    if num_processes > 1:  # whose losses differ in the last bits from those of one process
        undisturbed = tmp_path / "undisturbed"
        reference = Processes(tiny, undisturbed, tmp_path / "reference", num_processes)
        reference.wait_for_the_end()
    assert len(curve(workdir)) == STEPS
    assert curve(workdir) == curve(undisturbed)
    assert record(workdir, "evaluate") == record(undisturbed, "evaluate")
    assert (workdir / "evaluate.json").read_bytes() == (undisturbed / "evaluate.json").read_bytes()
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"16", "20", "24"}
    result = summarize(workdir / "ledger.jsonl")
    assert sum(result["seconds"].values()) + result["lost"] + result["downtime"] == pytest.approx(
        result["wall"], rel=0.02
    )
    assert 1 <= result["starts"] <= count + 1 and result["downtime"] > 0
    left = {path.name for path in workdir.iterdir()} - {path.name for path in trained.iterdir()}
    if num_processes > 1:
        left.discard("incidents")  # to those who lose a process, that is a crash
    assert not left, "left behind by killed processes"


@pytest.mark.parametrize("count", [1, 4, 10, 50])
def test_moments(count):
    chosen = moments(count, random.Random(0))
    assert len(chosen) == count
    if count >= 4:
        assert [kind for kind, *_ in chosen[:3]] == ["start", "prepare", "compile"] and chosen[-1][0] == "end"
    assert [step for _, step, _ in chosen] == sorted(step for _, step, _ in chosen)
    assert {kind for kind, *_ in moments(50, random.Random(0))} == set(MOMENTS)
