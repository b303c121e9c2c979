"""`llm-jax train` as several processes of this machine, as several hosts would run it."""

import contextlib
import pathlib
import random
import socket
import subprocess
import time
from collections.abc import Callable

from conftest import ROOT, Tiny

from llm_jax.parallel.cluster import PORTS

SECONDS_BETWEEN_LOOKS = 0.002
SECONDS_TO_REACH = 240  # so that a hang is a failure
SECONDS_TO_END = 60  # a bound for loaded machines; without our doing, it would be 98 to 301 s


def by_flags(port: int, number: int, process: int) -> tuple[list[str], dict[str, str]]:
    """The flags and the environment of one process of `number` on this host."""
    return [f"--coordinator=127.0.0.1:{port}", f"--num_processes={number}", f"--process_id={process}"], {}


def by_slurm(port: int, number: int, process: int) -> tuple[list[str], dict[str, str]]:
    """As `srun -n NUMBER` on one host; jobs have ports by their numbers."""
    names = {"JOB_ID": port - PORTS[0], "STEP_ID": 0, "STEP_NUM_TASKS": number, "NTASKS": number}
    names |= {"STEP_NODELIST": "localhost", "STEP_TASKS_PER_NODE": number, "NODEID": 0}
    names |= {"PROCID": process, "LOCALID": process}
    return [], {f"SLURM_{name}": str(value) for name, value in names.items()}


def by_open_mpi(port: int, number: int, process: int) -> tuple[list[str], dict[str, str]]:
    """As `mpirun -n NUMBER` of Open MPI 5 on one host."""
    names = {"SIZE": number, "RANK": process, "LOCAL_SIZE": number, "LOCAL_RANK": process}
    environment = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}
    return [], environment | {"PMIX_NAMESPACE": f"prterun-localhost-{port - PORTS[0]}@1"}


def free_port() -> int:
    """Of those that go by the number of a job."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise AssertionError("no port is free")


class Processes:
    """One run of num_processes processes with a device each; what process i prints goes to folder/i.txt."""

    def __init__(
        self, tiny: Tiny, workdir: pathlib.Path, folder: pathlib.Path, num_processes: int, *flags: str,
        environment: dict | None = None, programs: dict[int, str] | None = None, launcher=by_flags,
    ):  # fmt: skip
        """programs: Python code that a process runs first. launcher: how several know of each other: see by_flags."""
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.outputs = [folder / f"{process}.txt" for process in range(num_processes)]
        self.processes = []
        for process, output in enumerate(self.outputs):
            many, told = launcher(port, num_processes, process) if num_processes > 1 else ([], {})
            command = tiny.command("train", workdir, *many, *flags)
            if programs and process in programs:
                program = f"{programs[process]}\nfrom llm_jax.cli import entry\nentry()"
                command = [command[0], "-c", program, *command[3:]]
            with open(output, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env={
                            **(environment or tiny.environment),
                            **told,
                            "PYTHONUNBUFFERED": "1",
                            "JAX_PLATFORMS": "cpu",
                        },  # fmt: skip
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                    )
                )

    def text(self, process: int = 0) -> str:
        return self.outputs[process].read_text(errors="replace")

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        """Until it is true; none of the processes may end before."""
        deadline = time.monotonic() + SECONDS_TO_REACH
        while not reached():
            assert time.monotonic() < deadline, f"no {what} in {SECONDS_TO_REACH} s:\n{self.text()}"
            for process, running in enumerate(self.processes):
                try:
                    code = running.wait(SECONDS_BETWEEN_LOOKS)
                except subprocess.TimeoutExpired:
                    continue
                assert reached(), f"process {process} ended with {code} before {what}:\n{self.text(process)}"
                return

    def wait_for(self, text: str) -> None:
        """Until process 0 has printed it."""
        self.wait_until(lambda: text in self.text(), text)

    def wait(self, but: int | None = None) -> list[int | None]:
        """The exit codes of all, or of all but one."""
        return [
            running.wait(SECONDS_TO_END) if process != but else running.poll()
            for process, running in enumerate(self.processes)
        ]

    def kill(self) -> None:
        for running in self.processes:
            running.kill()
            running.wait()

    def wait_for_the_end(self) -> list[int | None]:
        """The exit codes of runs that end by themselves."""
        return [running.wait(SECONDS_TO_REACH) for running in self.processes]
