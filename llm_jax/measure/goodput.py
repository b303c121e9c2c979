"""WORKDIR/ledger.jsonl: what the time of a run went into, over all its starts.

One line says what a start has done so far, {"start": 1e9, "now": 1e9, "seconds": {"step": 7.5, ...}, "step": 3}: unix
times, seconds by section since that start, and the newest finished update, None before the first. A line with
"goes_on_from" says that updates after that one are repeated from then on: a restart, or a rewind. Lost work is found
when the ledger is read, for only then is it known where a killed start was followed.
"""

import bisect
import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Callable

import numpy as np

from llm_jax.config import UserError
from llm_jax.measure.metrics import MetricsLog, read

SECTIONS = ("start", "prepare", "restore", "compile", "step", "data", "checkpoint", "evaluation", "finish")
CAUSES = {
    "step": "useful steps",
    "start": "start of the process",
    "prepare": "preparing data",
    "restore": "restoring",
    "compile": "compiling",
    "data": "waiting for data",
    "checkpoint": "waiting for saves",
    "evaluation": "evaluation",
    "finish": "finish",
    "lost": "lost work",
    "downtime": "downtime",
}
SECONDS_BETWEEN_LINES = 10.0  # what a killed process at most leaves unbooked


class Ledger:
    """Books the seconds of one start. The first section is "start", from `began` on.

    A thread writes a line every 10 s, whatever the run is doing. Where that fails, the next call of enter raises the
    OSError, and so does every later one. path: None in processes other than the first, which keep count and write
    nothing. began: unix time, as from process_began. now: gives the unix time.
    """

    def __init__(self, path: pathlib.Path | None, *, began: float, now: Callable[[], float] = time.time):
        self._now = now
        self._log = None
        if path is not None:
            self._log = MetricsLog(path)
            # A process that trains twice began before the end of the first time.
            began = max([began, *(line["now"] for line in read(path)[-1:])])
        self._start = self._since = began
        self._section = "start"
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        self._step = None
        self._error = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write_regularly, name="ledger", daemon=True)
        if self._log is not None:
            self._write()
            self._thread.start()

    def enter(self, section: str) -> str:
        """Begins a section, and returns the one before."""
        assert section in SECTIONS, section
        with self._lock:
            if self._error is not None:
                raise self._error
            self._book()
            before, self._section = self._section, section
        return before

    def reached(self, step: int) -> None:
        """The newest finished update."""
        self._step = step

    def saved(self, step: int) -> None:
        """Now, with `step` as the newest finished update, a checkpoint of it is made: the ledger remembers the time at
        this point, so that what is lost when a start goes on from it is exact."""
        self._step = step
        self._write()

    def goes_on_from(self, step: int) -> None:
        """Updates after `step` are made again, by this start from now on; 0 where the run begins."""
        self._write(goes_on_from=step)
        self._step = step

    def close(self) -> None:
        if self._log is not None:
            self._closed.set()
            self._thread.join()
            self._write()
            self._log.close()

    def _book(self) -> None:
        now = self._now()
        self._seconds[self._section] += now - self._since
        self._since = now

    def _write(self, **event: int) -> None:
        if self._log is None:
            return
        with self._lock:
            if self._error is not None:  # the line it was about may be there in part: nothing may follow it
                raise self._error
            self._book()
            seconds = {section: round(value, 6) for section, value in self._seconds.items() if value}
            line = {"start": self._start, "now": self._since, "seconds": seconds, "step": self._step}
            try:
                self._log.append(line | event)
            except OSError as error:
                self._error = error
                raise

    def _write_regularly(self) -> None:
        while self._error is None and not self._closed.wait(SECONDS_BETWEEN_LINES):
            with contextlib.suppress(OSError):  # enter raises it
                self._write()


def summarize(path: str | os.PathLike) -> dict:
    """Where the time of a run went, in seconds:

    {"starts": int, "wall": from the beginning of the first start to the newest line, "seconds": {section: ...},
    "lost": step seconds of updates that were made again, not counted as "step", "downtime": between the newest line of
    a start and the beginning of the next, so with up to 10 s that a killed process did not write, "goodput":
    seconds["step"] / wall}

    seconds, lost and downtime sum to wall; to more than wall only where two processes ran at the same time. Where a
    start goes on from a step at which no line was written, lost is interpolated between the lines next to it.
    UserError: there is nothing to read.
    """
    lines = read(path) if os.path.exists(path) else []
    if not lines:
        raise UserError(f"{path} has no line yet; it is written by `llm-jax train`")
    newest = {}  # of each start
    steps, totals = [0], [0.0]  # useful seconds until the update was finished, for some updates
    useful = lost = 0.0
    for line in lines:
        before = newest.get(line["start"])
        useful += line["seconds"].get("step", 0.0) - (before["seconds"].get("step", 0.0) if before else 0.0)
        newest[line["start"]] = line
        if line["step"] is not None and line["step"] > steps[-1]:
            steps.append(line["step"])
            totals.append(useful)
        if "goes_on_from" in line:
            step = line["goes_on_from"]
            kept = float(np.interp(step, steps, totals))
            lost += useful - kept
            useful = kept
            cut = bisect.bisect_left(steps, step)
            steps[cut:], totals[cut:] = [step], [kept]

    seconds = {section: sum(line["seconds"].get(section, 0.0) for line in newest.values()) for section in SECTIONS}
    downtime, end = 0.0, min(newest)
    for start, line in sorted(newest.items()):
        downtime += max(0.0, start - end)
        end = max(end, line["now"])
    wall = end - min(newest)
    return {
        "starts": len(newest),
        "wall": wall,
        "seconds": seconds | {"step": useful},
        "lost": lost,
        "downtime": downtime,
        "goodput": useful / wall,
    }


def table(summary: dict) -> str:
    """A row per cause that took time: seconds and share of the whole. Useful steps first, then by size."""
    causes = summary["seconds"] | {"lost": summary["lost"], "downtime": summary["downtime"]}
    useful = causes.pop("step")
    others = sorted(((cause, seconds) for cause, seconds in causes.items() if seconds), key=lambda row: -row[1])
    rows = [(CAUSES[cause], seconds) for cause, seconds in [("step", useful), *others]]
    starts = summary["starts"]
    rows.append(("in all, " + (f"{starts} starts" if starts > 1 else "1 start"), summary["wall"]))
    return "\n".join(f"{name:22}{seconds:14,.1f} s{seconds / summary['wall']:8.1%}" for name, seconds in rows)


def process_began() -> float:
    """Unix time at which this process was created, to 10 ms; where there is no /proc, now."""
    stat = pathlib.Path("/proc/self/stat")
    if not stat.exists():
        return time.time()
    fields = stat.read_text().rpartition(")")[2].split()  # from the third on; the second, the name, may hold spaces
    ticks = int(fields[22 - 3])  # after the boot
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
