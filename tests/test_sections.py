"""What a run is doing is booked, watched, and compared between processes."""

import pytest
from processes import Processes

from llm_jax.jobs.sections import straggler


def test_straggler_is_named():
    found = {process: {"host": f"host-{process}", "own": 0.01 + 0.001 * process} for process in range(8)}
    assert straggler(found, 0.5) is None
    found[5]["own"] = 0.2
    line = straggler(found, 0.5)
    assert line is not None
    assert line.startswith("straggler: process 5 on host-5 spends 0.200 s of each step of 0.500 s outside its devices")
    found[5]["own"] = 0.05  # 0.037 s above the median: of a step of 0.5 s, no matter
    assert straggler(found, 0.5) is None
    assert straggler(found, 0.2)


@pytest.mark.soak
def test_a_slow_process_is_named_by_the_first(tiny, tmp_path):
    """One whose data come late, in a run of two."""
    slow = """
import threading
import llm_jax.jobs.setup as setup
batch = setup.Setup.batch
def late(self, number):
    threading.Event().wait(0.3)
    return batch(self, number)
setup.Setup.batch = late
"""
    often = "import llm_jax.jobs.sections as sections; sections.SECONDS_BETWEEN_REPORTS = 1.0"
    flags = ("--config.train.steps=1000000", "--config.optimizer.schedule=constant", "--config.evaluate.every=none")
    programs = {0: often, 1: often + slow}
    running = Processes(tiny, tmp_path / "run", tmp_path / "out", 2, *flags, programs=programs)
    running.wait_for("straggler: process 1 on ")
    running.kill()
