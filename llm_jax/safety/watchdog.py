"""Ends a run that hangs. Heartbeats between hosts do not see a live process that waits for ever in a collective."""

import faulthandler
import os
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Callable

CRASHED = 70  # exit code
WINDOW = 64  # steps
MEDIANS = 10  # what a step may take
STOPPED = 5.0  # s; a poll so late means that the whole process stood still
SECONDS_TO_REPORT = 10.0


class Watchdog:
    """A thread that ends the process with exit code 70 when a section takes longer than its limit without progress,
    after writing what every thread was doing to folder/stacks-PROCESS-UNIXTIME.txt.

    limits: seconds by section; no limit where it is None or left out. For "step" it is at least ten times the median
    of the last 64 steps, each taken from one enter("step") to the next with no other section between. It begins in
    "start". Time in which the process was stopped (Ctrl-Z, SIGSTOP) is not counted. clock: seconds that only go
    forward.

    It needs the interpreter: foreign code that holds the GIL for ever is left to the heartbeats of the other hosts.
    """

    def __init__(
        self,
        limits: dict[str, float | None],
        folder: pathlib.Path,
        process: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._limits = {section: limit for section, limit in limits.items() if limit is not None}
        self._folder = folder
        self.process = process
        self._clock = clock
        # Each is replaced as a whole, which is why no lock is needed.
        self._begun = ("start", clock())
        self._steps: tuple[float, ...] = ()
        self._granted = (self._begun, 0.0)  # to what was begun, seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, section: str) -> None:
        """Begins a section, or says that there is progress in it."""
        now = self._clock()
        before, since = self._begun
        if section == before == "step":
            self._steps = (*self._steps[1 - WINDOW :], now - since)
        self._begun = (section, now)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        poll = min([1.0, *(limit / 4 for limit in self._limits.values())])
        last = self._clock()
        while not self._closed.wait(poll):
            now = self._clock()
            self._grant(now - last - poll, now)
            last = now
            if late := self._late(now):
                self._end(late)

    def _grant(self, delay: float, now: float) -> None:
        """The thread was to run `delay` seconds ago: what is under way gets them back if the process was stopped."""
        if delay > STOPPED:
            begun = self._begun
            before = self._granted[1] if self._granted[0] is begun else 0.0
            # Not more than it has taken: it may have begun after the stop.
            self._granted = (begun, min(before + delay, now - begun[1]))

    def _late(self, now: float) -> str | None:
        begun = self._begun
        section, since = begun
        limit = self._limits.get(section)
        if limit is None:
            return None
        if section == "step" and self._steps:
            limit = max(limit, MEDIANS * statistics.median(self._steps))
        seconds = now - since
        if begun is self._granted[0]:
            seconds -= self._granted[1]
        if seconds <= limit:
            return None
        return f"no progress in section {section!r} for {seconds:.1f} s, where {limit:.1f} s are allowed"

    def _end(self, why: str) -> None:
        # The folder may lie on what hangs, and nobody may read stderr: another thread tries, this one goes.
        try:
            reporter = threading.Thread(target=self._report, args=(why,), name="watchdog report", daemon=True)
            reporter.start()
            reporter.join(SECONDS_TO_REPORT)
        finally:
            os._exit(CRASHED)

    def _report(self, why: str) -> None:
        path = self._folder / f"stacks-{self.process}-{int(time.time())}.txt"
        line = f"watchdog, process {self.process}: {why}; the stacks of all threads: {path}"
        print(line, file=sys.stderr, flush=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
                # faulthandler does not say that a disk is full; this does.
                print("End of stacks", file=file, flush=True)
        except OSError as error:
            print(f"{path} cannot be written ({error.strerror}), so here they are:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
