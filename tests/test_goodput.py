"""The ledger against hand-made runs on a clock that the test turns: every second has its cause, and no step counts
twice."""

import errno
import json
import math
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from llm_jax.config import UserError
from llm_jax.measure import goodput
from llm_jax.measure.goodput import CAUSES, SECTIONS, Ledger, process_began, summarize, table
from llm_jax.measure.metrics import read


class Clock:
    def __init__(self, now: float):
        self.now = now

    def __call__(self) -> float:
        return self.now


class Run:
    """A run on a clock, and beside the ledger what is to be found in it: who made each step in how many seconds."""

    def __init__(self, path):
        self.path = path
        self.clock = Clock(1_000_000.0)
        self.step_seconds = {}  # of the steps that count
        self.lost = 0.0
        self.overhead = dict.fromkeys(set(SECTIONS) - {"step"}, 0.0)
        self.downtime = 0.0
        self.ledger: Ledger
        self.gap = 0.0  # since the end of a start
        self.unfinished = 0.0  # seconds of a step that was not finished

    def start(self, step: int, seconds: float) -> None:
        self.downtime += self.gap
        began = self.clock.now
        self.clock.now += seconds  # imports
        self.ledger = Ledger(self.path, began=began, now=self.clock)
        self.overhead["start"] += seconds
        self.section("restore", seconds)
        self.goes_on_from(step)
        self.section("compile", seconds)

    def goes_on_from(self, step: int) -> None:
        self.ledger.goes_on_from(step)
        self.lost += sum(self.step_seconds.pop(s) for s in list(self.step_seconds) if s > step)
        self.lost += self.unfinished
        self.unfinished = 0.0

    def section(self, section: str, seconds: float) -> None:
        before = self.ledger.enter(section)
        self.clock.now += seconds
        assert self.ledger.enter(before) == section
        self.overhead[section] += seconds

    def step(self, step: int, seconds: float) -> None:
        self.ledger.enter("step")
        self.clock.now += seconds
        self.ledger.reached(step)
        self.step_seconds[step] = seconds

    def end(self, downtime: float, unfinished: float = 0.0) -> None:
        if unfinished:
            self.ledger.enter("step")
        self.clock.now += unfinished
        self.unfinished += unfinished
        self.ledger.close()
        self.clock.now += downtime
        self.gap = downtime

    def check(self) -> dict:
        found = summarize(self.path)
        assert found["seconds"] == pytest.approx(
            self.overhead | {"step": sum(self.step_seconds.values()) + self.unfinished}
        )
        assert found["lost"] == pytest.approx(self.lost)
        assert found["downtime"] == pytest.approx(self.downtime)
        assert found["wall"] == pytest.approx(sum(found["seconds"].values()) + found["lost"] + found["downtime"])
        assert found["goodput"] == pytest.approx(found["seconds"]["step"] / found["wall"])
        return found


def test_one_undisturbed_start(tmp_path):
    run = Run(tmp_path / "run" / "ledger.jsonl")
    run.start(0, seconds=5.0)
    for step in range(1, 11):
        run.section("data", 0.25)
        run.step(step, 2.0)
        if step % 5 == 0:
            run.section("evaluation", 3.0)
            run.section("checkpoint", 1.0)
            run.ledger.saved(step)
    run.ledger.enter("finish")
    run.ledger.close()
    assert summarize(run.path) == {
        "starts": 1,
        "wall": 45.5,
        "seconds": {"start": 5.0, "prepare": 0.0, "restore": 5.0, "compile": 5.0, "step": 20.0, "data": 2.5,
                    "checkpoint": 2.0, "evaluation": 6.0, "finish": 0.0},
        "lost": 0.0,
        "downtime": 0.0,
        "goodput": 20.0 / 45.5,
    }  # fmt: skip


def test_a_later_start_repeats_steps_of_several_earlier_ones(tmp_path):
    run = Run(tmp_path / "ledger.jsonl")
    run.start(0, seconds=1.0)
    for step in range(1, 8):  # saves 3 and 6
        run.step(step, float(step))
        if step % 3 == 0:
            run.ledger.saved(step)
    run.end(downtime=100.0)
    run.start(6, seconds=2.0)
    for step in range(7, 12):
        run.step(step, 10.0 + step)
        if step == 9:
            run.ledger.saved(step)
    run.end(downtime=50.0)
    assert run.check()["lost"] == 7.0  # step 7, which nobody has needed since; 10 and 11 may still be gone on from
    run.start(3, seconds=3.0)  # the checkpoints of 9 and 6 were damaged
    run.end(downtime=0.0)
    found = run.check()
    assert found["lost"] == 7.0 + 4 + 5 + 6 + 17 + 18 + 19 + 20 + 21 and found["seconds"]["step"] == 6.0
    run.start(3, seconds=1.0)
    for step in range(4, 6):
        run.step(step, 1.5)
    run.end(downtime=1.0)
    run.start(0, seconds=1.0)  # and so were all others
    run.end(downtime=0.0)
    assert run.check()["seconds"]["step"] == 0.0
    assert run.check()["starts"] == 5


def test_rewinds_in_one_process(tmp_path):
    run = Run(tmp_path / "ledger.jsonl")
    run.start(0, seconds=1.0)
    for last in (7, 9, 12):  # twice to the same step
        for step in range(5 if last > 7 else 1, last + 1):
            run.step(step, step + last / 16)
            if step == 4:
                run.ledger.saved(step)
        if last < 12:
            run.goes_on_from(4)
            run.section("restore", 2.0)
    run.ledger.close()
    found = run.check()
    assert found["lost"] == 5 + 6 + 7 + 3 * 7 / 16 + 5 + 6 + 7 + 8 + 9 + 5 * 9 / 16
    assert found["starts"] == 1

    run.start(4, seconds=1.0)
    run.step(5, 1.0)
    run.goes_on_from(4)
    run.ledger._write()  # as the thread does at any time
    run.step(5, 2.0)
    run.ledger.saved(5)
    run.step(6, 4.0)
    run.end(downtime=1.0)
    run.start(5, seconds=1.0)
    run.end(downtime=0.0)
    run.check()


def test_a_killed_step_is_lost_although_its_checkpoint_is_not(tmp_path):
    run = Run(tmp_path / "ledger.jsonl")
    run.start(0, seconds=1.0)
    run.step(1, 2.0)
    run.ledger.saved(1)
    run.end(downtime=1.0, unfinished=7.0)
    assert run.check()["lost"] == 0.0
    run.start(1, seconds=1.0)
    run.end(downtime=0.0)
    assert run.check()["lost"] == 7.0


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_random_runs(tmp_path, seed):
    chance = random.Random(seed)
    run = Run(tmp_path / "ledger.jsonl")
    saved = [0]
    for start in range(chance.randint(1, 6)):
        if start:
            run.end(chance.uniform(0, 50), unfinished=chance.choice([0, 3]))
        step = chance.choice(saved)
        saved = [s for s in saved if s <= step]
        run.start(step, chance.uniform(0, 10))
        for _ in range(chance.randint(0, 60)):
            step += 1
            run.step(step, chance.expovariate(1.0))
            run.section(chance.choice(["data", "evaluation", "checkpoint"]), chance.expovariate(1.0))
            if chance.random() < 0.2:
                run.ledger.saved(step)
                saved.append(step)
            elif chance.random() < 0.05:
                step = chance.choice(saved)
                saved = [s for s in saved if s <= step]
                run.goes_on_from(step)
    run.ledger.close()
    run.check()


def test_a_step_without_a_line_is_interpolated(tmp_path):
    run = Run(tmp_path / "ledger.jsonl")
    run.start(0, seconds=1.0)
    for step in range(1, 11):
        run.step(step, 2.0)
    run.end(downtime=5.0)
    run.start(4, seconds=1.0)
    run.ledger.close()
    assert summarize(run.path)["lost"] == pytest.approx(12.0)


def test_an_older_run_begins_its_ledger_late(tmp_path):
    run = Run(tmp_path / "ledger.jsonl")
    run.start(500, seconds=1.0)
    run.step(501, 2.0)
    run.goes_on_from(400)  # a checkpoint from before the ledger
    run.step(401, 4.0)
    run.ledger.close()
    assert run.check()["lost"] == 2.0


def test_two_starts_in_one_process_and_a_torn_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    clock = Clock(100.0)
    for _ in range(2):
        ledger = Ledger(path, began=90.0, now=clock)
        ledger.goes_on_from(0)
        ledger.enter("finish")
        clock.now += 5
        ledger.close()
    with open(path, "a") as file:
        file.write('{"start": 1')
    ledger = Ledger(path, began=110.0, now=clock)
    clock.now += 1
    ledger.close()
    assert [json.loads(line)["start"] for line in path.read_text().splitlines()] == [
        90,
        90,
        90,
        105,
        105,
        105,
        110,
        110,
    ]
    found = summarize(path)
    assert (found["wall"], found["downtime"], found["starts"]) == (21.0, 0.0, 3)
    assert found["seconds"]["start"] == 11.0 and found["seconds"]["finish"] == 10.0


def test_processes_at_the_same_time_are_each_counted_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    clock = Clock(0.0)
    old = Ledger(path, began=0.0, now=clock)
    clock.now = 10.0
    new = Ledger(path, began=4.0, now=clock)
    clock.now = 12.0
    old.close()
    clock.now = 20.0
    new.close()
    found = summarize(path)
    assert (found["starts"], found["wall"], found["downtime"], found["seconds"]["start"]) == (2, 20.0, 0.0, 12.0 + 16.0)

    clock.now = 30.0
    old = Ledger(path, began=25.0, now=clock)
    Ledger(path, began=28.0, now=clock).close()
    clock.now = 40.0
    old.close()
    found = summarize(path)
    assert (found["starts"], found["wall"], found["downtime"]) == (4, 40.0, 5.0)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(None, began=0.0, now=Clock(1.0))
    assert ledger.enter("step") == "start" and ledger.enter("step") == "step"
    ledger.reached(1)
    ledger.saved(1)
    ledger.goes_on_from(0)
    ledger.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError):
        ledger.enter("steps")


def test_the_thread_writes_while_nothing_is_entered(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "SECONDS_BETWEEN_LINES", 0.001)
    path = tmp_path / "ledger.jsonl"
    clock, asked = Clock(50.0), queue.SimpleQueue()

    def now() -> float:
        if threading.current_thread() is not threading.main_thread():
            asked.put(clock.now)
        return clock.now

    ledger = Ledger(path, began=0.0, now=now)
    ledger.enter("prepare")
    clock.now = 3650.0
    while asked.get(timeout=60) != 3650.0:
        pass
    asked.get(timeout=60)  # for the next line, so the one before is written
    assert summarize(path)["seconds"]["prepare"] == 3600.0  # were the process killed now
    ledger.close()


def test_a_killed_process_leaves_its_lines(tmp_path):
    path = tmp_path / "ledger.jsonl"
    code = f"""if True:
        import pathlib, sys
        from llm_jax.measure.goodput import Ledger, process_began
        ledger = Ledger(pathlib.Path({str(path)!r}), began=process_began())
        ledger.goes_on_from(0)
        ledger.enter("step")
        ledger.saved(7)
        print("saved", flush=True)
        sys.stdin.read()
    """
    before = time.time()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"saved\n"
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.communicate()
    after = time.time()
    last = read(path)[-1]
    assert last["step"] == 7 and before - 0.02 <= last["start"] < last["now"] <= after  # 0.02: ticks of the kernel
    assert sum(last["seconds"].values()) == pytest.approx(last["now"] - last["start"], abs=1e-5)
    clock = Clock(last["now"] + 25.0)
    Ledger(path, began=clock.now, now=clock).close()
    assert summarize(path)["downtime"] == pytest.approx(25.0)


def test_process_began_is_the_creation_of_the_process():
    code = "import time; t = time.time(); from llm_jax.measure.goodput import process_began; print(t, process_began())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first_statement, began = map(float, done.stdout.split())
    assert before - 0.02 <= began < first_statement
    stat = [line.split() for line in open("/proc/stat")]
    boot = next(int(fields[1]) for fields in stat if fields[0] == "btime")
    ticks = int(open("/proc/self/stat").read().split(") ")[1].split()[19])
    assert math.floor(process_began() - ticks / os.sysconf("SC_CLK_TCK")) - boot in (-1, 0, 1)  # btime: whole seconds


def fill_the_disk(ledger: Ledger) -> None:
    assert ledger._log is not None
    ledger._log._file.close()
    ledger._log._file = open("/dev/full", "ab", buffering=0)


def test_a_full_disk_is_said_by_whatever_comes_next(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, began=0.0, now=Clock(1.0))
    fill_the_disk(ledger)
    with pytest.raises(OSError) as raised:
        ledger.saved(1)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    with pytest.raises(OSError, match="No space left"):
        ledger.enter("step")
    with pytest.raises(OSError, match="No space left"):
        ledger.close()


def test_the_thread_hands_its_error_on(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "SECONDS_BETWEEN_LINES", 0.001)
    ledger = Ledger(tmp_path / "ledger.jsonl", began=0.0)
    with ledger._lock:
        fill_the_disk(ledger)
    ledger._thread.join()
    with pytest.raises(OSError, match="No space left"):
        ledger.enter("step")


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="ledger.jsonl has no line yet"):
        summarize(tmp_path / "ledger.jsonl")
    (tmp_path / "ledger.jsonl").write_text('{"start": 1')
    with pytest.raises(UserError, match="ledger.jsonl has no line yet"):
        summarize(tmp_path / "ledger.jsonl")


def test_table():
    seconds = dict.fromkeys(SECTIONS, 0.0) | {"step": 300.0, "data": 20.0, "compile": 80.5}
    summary = {"seconds": seconds, "lost": 500.0, "downtime": 99.5, "wall": 1000.0, "goodput": 0.3, "starts": 3}
    assert table(summary).splitlines() == [
        "useful steps                   300.0 s   30.0%",
        "lost work                      500.0 s   50.0%",
        "downtime                        99.5 s   10.0%",
        "compiling                       80.5 s    8.1%",
        "waiting for data                20.0 s    2.0%",
        "in all, 3 starts             1,000.0 s  100.0%",
    ]
    assert set(CAUSES) == {*SECTIONS, "lost", "downtime"}
