"""Starting a process, in processes of their own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from processes import by_flags, by_slurm, free_port


def start(tmp_path, *arguments, environment=None) -> subprocess.Popen:
    """hosts.start, with a second for the others to come; prints the sum of all processes' numbers + 1."""
    program = f"""
import sys
from llm_jax import cli
from llm_jax.config import Parallel
from llm_jax.parallel import hosts
hosts.SECONDS_TO_MEET = 1 if "--hurry" in sys.argv else 60
flags = dict(argument[2:].split("=") for argument in sys.argv[1:] if "=" in argument)
flags = {{name: int(value) if name != "coordinator" else value for name, value in flags.items()}}
def job(*_):
    hosts.start(Parallel(), compilation_cache={str(tmp_path)!r}, saves_on_sigterm=True, **flags)
    from jax.experimental import multihost_utils
    import jax, numpy as np
    print(multihost_utils.process_allgather(np.int32(jax.process_index() + 1)).sum())
    jax.distributed.shutdown()
    return 0
cli.run = job
sys.argv[1:] = ["train"]
cli.entry()
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ends_of(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


def test_a_proxy_is_not_asked(tmp_path):
    """Nor is it for the devices of this process alone: gRPC would wait for it until JAX aborts."""
    proxy = dict.fromkeys(["http_proxy", "https_proxy", "grpc_proxy"], "http://127.0.0.1:9")
    port = free_port()
    started = [start(tmp_path, environment=proxy)]
    for process in range(2):
        flags, environment = by_slurm(port, 2, process)
        started.append(start(tmp_path, *flags, environment=proxy | environment))
    alone, *both = ends_of(*started)
    assert alone == (0, "1\n", ""), alone[2]
    assert [(code, out.splitlines()[-1:]) for code, out, _ in both] == [(0, ["3"])] * 2, both  # Gloo prints, too
    name = f"processes: 2 (Slurm job {port - 61440})"
    for process, (_, _, err) in enumerate(both):
        assert err.splitlines()[0] == f"{name}, this is {process}, coordinator localhost:{port}"


def test_those_who_do_not_meet_crash_and_say_why(tmp_path):
    """JAX would abort (exit code 134) with a C++ stack."""
    port, other = free_port(), free_port()
    first = start(tmp_path, "--hurry", *by_flags(port, 3, 0)[0])
    nowhere = start(tmp_path, "--hurry", *by_flags(other, 3, 2)[0])
    unknown = start(tmp_path, "--hurry", "--coordinator=no-such-host.invalid:1", "--num_processes=3", "--process_id=1")
    ends = ends_of(first, nowhere, unknown)
    reasons = [
        f"process 0 of 3 has waited 1 s for the others: process 0 is at 127.0.0.1:{port}, but not all have come",
        f"process 2 of 3 has waited 1 s for the others: process 0 cannot be reached at 127.0.0.1:{other} ([Errno 111]",
        "process 1 of 3 has waited 1 s for the others: process 0 cannot be reached at no-such-host.invalid:1 ([Errno -",
    ]
    for (code, out, err), reason in zip(ends, reasons, strict=True):
        assert (code, out) == (70, "") and f"llm-jax: stopped (exit code 70): {reason}" in err, err


def test_ctrl_c_while_waiting_for_the_others(tmp_path):
    """And SIGTERM, for which the command has a handler of the same kind; JAX would wait on."""
    process = start(tmp_path, *by_flags(free_port(), 2, 0)[0])
    assert process.stderr is not None and process.stderr.readline().startswith("processes: 2 (flags), this is 0")
    process.send_signal(signal.SIGINT)
    ((code, _, err),) = ends_of(process)
    assert (code, err) == (130, "llm-jax: interrupted; the same command goes on from what has been saved\n")


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_that_is_taken(address, tmp_path):
    """By another run with the same port, JAX would be found there without a complaint: here it listens as JAX does."""
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        ((code, _, err),) = ends_of(start(tmp_path, *by_flags(port, 2, 0)[0]))
    assert code == 70 and f"port {port} of process 0 (127.0.0.1:{port}): Address already in use; end what has it" in err


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
