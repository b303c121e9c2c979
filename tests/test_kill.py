"""SIGKILL at random moments costs time and nothing else: what the run writes in the end is bit for bit the same."""

import json
import os
import random
import select
import signal
import subprocess

import pytest
from conftest import ROOT
from test_train import curve, record

SEED = 1
# How long after it has been seen to begin, in seconds at most, a thing is killed: inside of it, or a little behind.
MOMENTS = {"start": 2.0, "prepare": 1.5, "compile": 1.5, "step": 0.05, "save": 0.05, "evaluation": 0.1, "end": 1.0}
STEPS = 24  # of tests/tiny.py, which saves every 4 and evaluates every 8


class Running:
    """The command, seen through what it prints and writes."""

    def __init__(self, command, environment, workdir):
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.workdir = workdir
        self.output = b""

    def read(self, seconds: float) -> bool:
        """Takes what is printed next, within so many seconds; False at the end of the output."""
        stdout = self.process.stdout.fileno()
        if not select.select([stdout], [], [], seconds)[0]:
            return True
        new = os.read(stdout, 1 << 16)
        self.output += new
        return bool(new)

    def has_reached(self, kind: str, step: int) -> bool:
        if kind == "start":
            return True
        if kind == "prepare":
            return b"training a unigram tokenizer" in self.output
        if kind == "compile":
            return b"model: " in self.output
        if b"MFU counts" not in self.output:  # until then, the files may be those of the process before
            return False
        if kind == "end":
            return (self.workdir / "checkpoints" / str(STEPS)).exists()
        lines = (self.workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        if kind == "save" and not any(
            ".orbax-checkpoint-tmp" in name for name in os.listdir(self.workdir / "checkpoints")
        ):
            return False
        return any(json.loads(line)["step"] >= step for line in lines)

    def kill(self, kind: str, step: int, delay: float) -> None:
        while not self.has_reached(kind, step):
            assert self.read(0.001), f"ended before {kind} {step}:\n{self.output.decode()}"
        self.read(delay)
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL, f"ended before it was killed in {kind} {step}"
        self.process.stdout.close()


def moments(count: int, chance: random.Random) -> list[tuple[str, int, float]]:
    """(what to be in, from which step on, how long to stay) of each kill, in the order in which a run comes by."""
    between = sorted(chance.randint(1, STEPS - 2) for _ in range(count - 4))
    kinds = [chance.choice(["step", "save", "evaluation"]) for _ in between]
    steps = [step // 8 * 8 + 7 if kind == "evaluation" else step for kind, step in zip(kinds, between, strict=True)]
    all_moments = [("start", 0), ("prepare", 0), ("compile", 0), *zip(kinds, steps, strict=True), ("end", STEPS)]
    return [(kind, step, chance.uniform(0, MOMENTS[kind])) for kind, step in all_moments[-count:]]


def test_killed_runs_end_as_if_nothing_had_happened(trained, tiny, tmp_path, request):
    count = request.config.getoption("--kills")
    cache = tmp_path / "cache"  # of its own, so that there is something to prepare; compiled programs are shared
    cache.mkdir()
    (cache / "compiled").symlink_to(tiny.cache / "compiled")
    environment = tiny.environment | {"LLM_JAX_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    workdir = tmp_path / "run"
    command = tiny.command("train", workdir)
    for kind, step, delay in moments(count, random.Random(SEED)):
        Running(command, environment, workdir).kill(kind, step, delay)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    assert len(curve(workdir)) == STEPS
    assert curve(workdir) == curve(trained)
    assert record(workdir, "evaluate") == record(trained, "evaluate")
    assert (workdir / "evaluate.json").read_bytes() == (trained / "evaluate.json").read_bytes()
    # A kill between the last save and the removal of the oldest leaves one too many: no save comes after it.
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert {"16", "20", "24"} <= kept <= {"12", "16", "20", "24"}
    left = {path.name for path in workdir.iterdir()} - {path.name for path in trained.iterdir()}
    assert not left, "left behind by killed processes"


@pytest.mark.parametrize("count", [4, 10, 50])
def test_moments(count):
    chosen = moments(count, random.Random(0))
    assert len(chosen) == count
    assert [kind for kind, *_ in chosen[:3]] == ["start", "prepare", "compile"] and chosen[-1][0] == "end"
    assert {kind for kind, *_ in moments(50, random.Random(0))} == set(MOMENTS)
