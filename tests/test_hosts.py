"""Starting a process, in processes of their own."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("saves_on_sigterm, code, out", [(False, -15, ""), (True, 0, "2 devices, still there\n")])
def test_sigterm_ends_a_job_that_does_not_save(saves_on_sigterm, code, out, tmp_path):
    program = f"""
import os, signal
from llm_jax.config import Parallel
from llm_jax.parallel import hosts
hosts.start(
    Parallel(num_cpu_devices=2), compilation_cache={str(tmp_path)!r}, saves_on_sigterm={saves_on_sigterm}
)
os.kill(os.getpid(), signal.SIGTERM)
import jax
assert hosts.is_first()
print(len(jax.devices()), "devices, still there")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, out), done.stderr
