"""What a training run is doing at this moment: for the ledger, the watchdog and the search for the slow process."""

import json
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from llm_jax.measure.goodput import Ledger
from llm_jax.parallel import hosts
from llm_jax.safety.watchdog import Watchdog

SECONDS_BETWEEN_REPORTS = 10.0
STRAGGLES = 0.1  # of a step that a process spends on its own, above what the median process does


class Sections:
    """Use: `with sections("evaluation"): ...`; what is in no other section is a step."""

    def __init__(self, ledger: Ledger, watchdog: Watchdog, say: Callable[[str], None]):
        self.ledger = ledger
        self._watchdog = watchdog
        self._say = say
        self._section = "start"
        self._reported = time.monotonic()
        self._steps = 0
        self._waited = 0.0

    def enter(self, section: str) -> str:
        """Returns the section before."""
        self._section = section
        self._watchdog.enter(section)
        return self.ledger.enter(section)

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        before = self.enter(section)
        try:
            yield
        finally:
            self.enter(before)

    def progress(self) -> bool:
        """True: there is progress within the section, of which nobody else would know."""
        self._watchdog.enter(self._section)
        return True

    def step(self, step: int, waited: float) -> None:
        """A step has been finished, of which this process waited so many seconds for the devices."""
        self.ledger.reached(step)
        self._steps += 1
        self._waited += waited
        elapsed = time.monotonic() - self._reported
        if jax.process_count() > 1 and elapsed > SECONDS_BETWEEN_REPORTS:
            self._report(step, elapsed / self._steps, (elapsed - self._waited) / self._steps)
            self._reported, self._steps, self._waited = time.monotonic(), 0, 0.0

    def _report(self, step: int, seconds: float, own: float) -> None:
        """Processes wait for the slowest in every step. That one is the one that waits least: it spends the most time
        `own` outside the devices, on data or on a busy host."""
        mine = {"host": socket.gethostname(), "step": step, "own": own}
        try:
            hosts.post(f"steps/{jax.process_index()}", json.dumps(mine))
            posted = hosts.posted("steps") if hosts.is_first() else {}
        except jax.errors.JaxRuntimeError as error:  # whether the others are there is for the heartbeats to tell
            self._say(f"WARNING: no search for a straggler at step {step}: {error}")
            return
        found = {int(process): json.loads(value) for process, value in posted.items()}
        if found and (line := straggler(found, seconds)):
            self._say(line)


def straggler(found: dict[int, dict], step_seconds: float) -> str | None:
    """A line that names the slow process, if there is one. found: {process: {"host": str, "own": seconds a step}}."""
    process = max(found, key=lambda process: found[process]["own"])
    slow, median = found[process], statistics.median(value["own"] for value in found.values())
    if slow["own"] - median < STRAGGLES * step_seconds:
        return None
    return (
        f"straggler: process {process} on {slow['host']} spends {slow['own']:.3f} s of each step of {step_seconds:.3f} "
        f"s outside its devices, the median process {median:.3f} s"
    )
