"""Slurm on this machine, without systemd: its controller and two nodes, as long as the tests last that use them."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

# Names of nodes that are addresses: JAX looks for process 0 at that of the first node, and these need no /etc/hosts.
NODES = ("127.0.0.1", "127.0.0.2")
SECONDS_TO_REACH = 240  # so that a hang is a failure
SECONDS_BETWEEN_LOOKS = 0.1
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")  # states of a job

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=20
FirstJobId={first_job}
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=2 RealMemory=2000
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=2 RealMemory=2000
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def what_is_missing() -> str | None:
    """For Slurm to be started here."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "srun") if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    return "Slurm can only be started by root" if os.geteuid() else None


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator["Slurm"]:
    """Two nodes with two CPUs each. Jobs of the partition `high` preempt those of `low`, the default."""
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.end()


class Slurm:
    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons = []

    def start(self) -> None:
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(socket.socket()) for _ in range(3)]
            for listener in listeners:
                listener.bind(("127.0.0.1", 0))
            ports = [listener.getsockname()[1] for listener in listeners]
        conf = CONF.format(
            folder=self.folder,
            host=socket.gethostname().partition(".")[0],
            nodes=NODES,
            ports=ports,
            first_job=random.randrange(1, 1_000_000),  # JAX's port goes by it: another one than in another cluster here
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        flags = [f"--{flag}={self.folder}/munge.{name}" for flag, name in files.items()]
        self._start("munged", "munged", "--foreground", "--force", *flags)
        self.wait_until((self.folder / "munge.sock").exists, "munged")
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        states = ("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T")
        self.wait_until(lambda: self.call(*states).split() == ["idle"] * len(NODES), "nodes")

    def start_node(self, node: str) -> None:
        self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node, NODE=node)

    def _start(self, name: str, *command: str, **environment: str) -> None:
        """It ends with this process, too, should that be killed."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig=TERM", *command],
                    env=self.environment | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def fail_node(self, node: str) -> None:
        """As if its power had gone: nothing that runs there can say a word."""
        self._kill(f"NODE={node}", f"SLURMD_NODENAME={node}")

    def end(self) -> None:
        self._kill(f"SLURM_CONF={self.environment['SLURM_CONF']}")
        for daemon in self.daemons:
            daemon.wait()

    def _kill(self, *marks: str) -> None:
        """Processes of this cluster with one of these in their environment, also those that they start meanwhile."""
        cluster, wanted = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(), {mark.encode() for mark in marks}
        found = True
        while found:
            found = False
            for environment in pathlib.Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):  # it has ended
                    given = set(environment.read_bytes().split(b"\0"))
                    if cluster in given and wanted & given:
                        os.kill(int(environment.parent.name), signal.SIGKILL)
                        found = True

    def call(self, *command: str) -> str:
        """What a command of Slurm has to say."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=SECONDS_TO_REACH)
        return done.stdout + done.stderr

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_REACH
        while not reached():
            late = time.monotonic() > deadline
            assert not late, f"no {what} in {SECONDS_TO_REACH} s\n{self.call('squeue', '--states=all')}"
            time.sleep(SECONDS_BETWEEN_LOOKS)


class Job:
    """One that has been handed in; its output goes to a file."""

    def __init__(
        self, slurm: Slurm, output: pathlib.Path, *command: str, cwd: pathlib.Path, environment: dict[str, str]
    ):
        """command: what follows `sbatch --parsable --output=...`"""
        self.slurm = slurm
        self.output = output
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={output}", *command],
            cwd=cwd,
            env={**environment, "SLURM_CONF": slurm.environment["SLURM_CONF"]},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def __getitem__(self, field: str) -> str:
        """Of `scontrol show job`."""
        text = self.slurm.call("scontrol", "show", "job", "-o", self.number)
        return dict(reversed([pair.partition("=")[::2] for pair in text.split()]))[field]  # the command comes last

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def update(self, **fields: object) -> None:
        said = self.slurm.call("scontrol", "update", f"JobId={self.number}", *(f"{k}={v}" for k, v in fields.items()))
        assert not said, said

    def wait_for(self, text: str) -> None:
        """Until it has printed it; its first start may not end before."""

        def has_printed() -> bool:
            state, restarts = self["JobState"], self["Restarts"]
            found = text in self.text()
            assert found or (state in ALIVE and restarts == "0"), f"{state} before {text}:\n{self.text()}"
            return found

        self.slurm.wait_until(has_printed, text)

    def wait_until_queued_again(self, restarts: int) -> None:
        """Not after two minutes, as by itself, but two seconds, so that no node takes it for the start before."""

        def queued() -> bool:
            state, count = self["JobState"], self["Restarts"]
            assert state in ALIVE and int(count) <= restarts, f"{state}, {count} restarts:\n{self.text()}"
            return (state, count) == ("PENDING", str(restarts))

        self.slurm.wait_until(queued, f"restart {restarts} of job {self.number}")
        self.update(StartTime="now+2")

    def end(self) -> tuple[str, str, str]:
        """(state, exit code, how often it was started again), as soon as it has ended."""
        self.slurm.wait_until(lambda: self["JobState"] not in ALIVE, f"end of job {self.number}")
        return self["JobState"], self["ExitCode"].partition(":")[0], self["Restarts"]
