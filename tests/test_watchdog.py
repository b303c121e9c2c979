"""The watchdog: what it decides, on a clock that the test turns; and what it does, in processes that hang."""

import subprocess
import sys
import time

import pytest

from llm_jax.safety.watchdog import Watchdog

WATCH = Watchdog._watch


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(Watchdog, "_watch", lambda self: None)  # nobody ends the process of the tests
    return Clock()


def make(tmp_path, clock, **limits) -> Watchdog:
    return Watchdog(limits, tmp_path / "stacks", 0, clock=clock)


def test_each_section_has_its_limit(tmp_path, clock):
    watchdog = make(tmp_path, clock, start=30.0, compile=100.0, checkpoint=None)
    for section, limit in {"start": 30.0, "compile": 100.0}.items():
        if section != "start":  # in which it begins
            watchdog.enter(section)
        assert watchdog._late(clock.now + limit) is None
        assert section in str(watchdog._late(clock.now + limit + 0.1))
    for section in ("checkpoint", "data"):
        watchdog.enter(section)
        assert watchdog._late(clock.now + 1e9) is None
    watchdog.enter("compile")
    clock.now += 90
    watchdog.enter("compile")  # progress
    assert watchdog._late(clock.now + 90) is None and watchdog._late(clock.now + 101)


def test_a_step_may_take_ten_medians(tmp_path, clock):
    watchdog = make(tmp_path, clock, step=60.0, evaluation=60.0)

    def steps(*durations: float) -> None:
        for seconds in durations:
            watchdog.enter("data")
            clock.now += 0.5
            watchdog.enter("step")
            clock.now += seconds
            watchdog.enter("step")  # done
            watchdog.enter("evaluation")
            clock.now += 50.0
        watchdog.enter("step")

    def limit() -> float:
        return next(s for s in range(10_000) if watchdog._late(clock.now + s + 0.5))

    watchdog.enter("step")
    assert limit() == 60
    steps(3.0)
    assert limit() == 60
    steps(20.0, 30.0, 25.0, 900.0)  # with 3: the median is 25
    assert limit() == 250
    watchdog.enter("evaluation")
    assert limit() == 60
    steps(*[8.0] * 64)  # and the ones before are forgotten
    assert limit() == 80
    steps(*[12.0] * 32)
    assert limit() == 100
    steps(*[1.0] * 64)
    assert limit() == 60


def test_time_in_which_the_process_was_stopped_is_granted(tmp_path, clock):
    watchdog = make(tmp_path, clock, evaluation=60.0)
    watchdog.enter("evaluation")
    clock.now += 50 + 3600
    watchdog._grant(4.9, clock.now)  # a busy machine
    assert watchdog._late(clock.now)
    watchdog._grant(3600.0, clock.now)
    assert watchdog._late(clock.now + 10) is None and watchdog._late(clock.now + 10.1)
    clock.now += 5 + 600
    watchdog._grant(600.0, clock.now)  # again
    assert watchdog._late(clock.now + 5) is None and watchdog._late(clock.now + 5.1)

    watchdog.enter("evaluation")  # the next one has nothing of that
    assert watchdog._late(clock.now + 61)
    clock.now += 2
    watchdog._grant(7200.0, clock.now)  # it was begun after the stop, before the thread came to see it
    assert watchdog._late(clock.now + 60) is None and watchdog._late(clock.now + 60.1)


@pytest.mark.parametrize(
    "delays, ended",
    [
        ([0.0] * 59, 0),
        ([0.0] * 60, 1),
        ([4.0] * 11, 0),  # polls that are late on a busy machine: time passes all the same
        ([4.0] * 12, 1),
        ([3600.0, 0.0, 86400.0, 7.0, *[0.0] * 55], 0),  # stopped, three times
        ([3600.0, 0.0, 86400.0, 7.0, *[0.0] * 56], 1),
    ],
)
def test_polls_that_come_late(tmp_path, clock, monkeypatch, delays, ended):
    watchdog = make(tmp_path, clock, evaluation=59.5)
    watchdog.enter("evaluation")
    ends = []
    monkeypatch.setattr(watchdog, "_end", ends.append)
    delays = list(delays)

    class Closed:
        def wait(self, seconds):
            if not delays:
                return True
            clock.now += seconds + delays.pop(0)
            return False

    monkeypatch.setattr(watchdog, "_closed", Closed())
    WATCH(watchdog)
    assert len(ends) == ended


HANGS = """
import faulthandler, pathlib, signal, sys, threading
from llm_jax.safety.watchdog import Watchdog

def stuck_in_a_collective():
    print("stuck", flush=True)
    threading.Event().wait()

def waiting_for_a_disk():
    threading.Event().wait()

threading.Thread(target=waiting_for_a_disk, daemon=True).start()
watchdog = Watchdog({"start": None, "step": LIMIT}, pathlib.Path(sys.argv[1]), 3)
BEFORE
watchdog.enter("step")
stuck_in_a_collective()
"""


def command(folder, *, limit: float = 0.05, before: str = "") -> list[str]:
    return [sys.executable, "-c", HANGS.replace("LIMIT", str(limit)).replace("BEFORE", before), str(folder)]


def test_a_hanging_process_is_ended_with_the_stacks_of_all_threads(tmp_path):
    folder = tmp_path / "run" / "stacks"
    done = subprocess.run(command(folder), capture_output=True, text=True)
    assert done.returncode == 70
    (path,) = folder.iterdir()
    assert path.name.startswith("stacks-3-") and path.suffix == ".txt"
    assert 0 <= time.time() - int(path.stem.split("-")[2]) < 86400  # a unix time
    stacks = path.read_text()
    assert "in stuck_in_a_collective" in stacks and "in waiting_for_a_disk" in stacks
    assert stacks.endswith("End of stacks\n")
    (line,) = done.stderr.splitlines()
    assert "process 3" in line and "'step'" in line and "0.1 s are allowed" in line and str(path) in line
    assert stacks.startswith(line)


@pytest.mark.parametrize("problem", ["a file in the way", "a disk that becomes full"])
def test_stacks_that_cannot_be_written_go_to_stderr(tmp_path, problem):
    folder, before = tmp_path / "stacks", ""
    if problem == "a file in the way":
        folder.write_text("")
    else:  # in the midst of the stacks
        before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))"
    done = subprocess.run(command(folder, before=before), capture_output=True, text=True)
    assert done.returncode == 70
    assert "cannot be written (" in done.stderr
    assert "in stuck_in_a_collective" in done.stderr and "in waiting_for_a_disk" in done.stderr
    if problem != "a file in the way":
        (path,) = folder.iterdir()
        assert len(path.read_text()) == 600


def test_a_disk_that_hangs_does_not_keep_it(tmp_path):
    before = f"""
import llm_jax.safety.watchdog, os
llm_jax.safety.watchdog.SECONDS_TO_REPORT = 0.05
os.mkfifo({str(tmp_path / "fifo")!r})
pathlib.Path.mkdir = lambda *args, **options: open({str(tmp_path / "fifo")!r}, "w")  # which nobody reads"""
    done = subprocess.run(command(tmp_path / "stacks", before=before), capture_output=True, text=True)
    assert done.returncode == 70 and "no progress in section 'step'" in done.stderr


def test_close_ends_the_thread(tmp_path):
    code = command(tmp_path)[2].replace("stuck_in_a_collective()\n", "", 1)
    code = code[: code.rindex("watchdog.enter")] + "watchdog.close(); assert threading.active_count() == 2; print(1)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
