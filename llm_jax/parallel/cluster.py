"""Where a process was started: by what, as which of how many, and at which address the first one is found.

Read from the environment that Open MPI, Slurm, GKE and Kubernetes give their processes, and from the metadata of a
Cloud TPU VM. Elsewhere nothing is asked and no network is touched.

JAX's own detection (0.10 to 0.12) is taken for TPUs only. It counts the tasks of a Slurm allocation, so that a program
started alone in a shell of `salloc -n4` waits for three that never come; gives each process one GPU, also where it has
the host to itself, or its GPUs were chosen by Slurm; needs mpi4py for Open MPI 5, and for Kubernetes the right to ask
its API.
"""

import dataclasses
import os
import re
import socket

from jax._src.clusters import GceTpuCluster, GkeTpuCluster  # no public name; jax.distributed.initialize asks them, too

from llm_jax.config import RunFailed, UserError

PORT = 8482  # of process 0, where it has a host, a pod or a TPU VM to itself; what JAX takes there
PORTS = range(61440, 65536)  # elsewhere, by the number of the job; above what Linux hands out to clients


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One process of a run. It is number `process_id` of num_processes, and number `local_id` of the local_count on its
    host; `coordinator` is HOST:PORT of process 0, or "" where there is no other. Nothing is known of started_by=""."""

    started_by: str = ""
    num_processes: int = 1
    process_id: int = 0
    coordinator: str = ""
    local_id: int = 0
    local_count: int = 1

    def __str__(self) -> str:
        this = f", this is {self.process_id}, coordinator {self.coordinator}" if self.coordinator else ""
        return f"processes: {self.num_processes} ({self.started_by}){this}"


def find(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, tpus: bool, seconds: int
) -> Place:
    """The place of this process.

    Args:
      coordinator, num_processes, process_id: flags, which nothing found overrides. num_processes alone is a check, but
        in Kubernetes, which does not tell it; num_processes=1 alone is a process on its own, wherever it is
      tpus: TPUs are going to be used, if there are some
      seconds: how long to wait until the name of a TPU host is known
    """
    if num_processes == 1 and coordinator is None and process_id is None:
        return Place(started_by="--num_processes")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"--coordinator={coordinator} must be HOST:PORT; add a port that is free on the host of process 0"
        )
    if coordinator is not None and num_processes is not None and process_id is not None:
        place = Place(started_by="flags", num_processes=num_processes, process_id=process_id, coordinator=coordinator)
    else:
        place = Place() if coordinator or process_id is not None else _found(num_processes, tpus=tpus, seconds=seconds)
        given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
        if set(given.values()) != {None} and not place.started_by:
            missing = " and ".join(f"--{name}" for name, value in given.items() if value is None)
            raise UserError(f"--coordinator, --num_processes and --process_id belong together; give {missing}, too")
        if num_processes not in (None, place.num_processes):
            raise UserError(
                f"--num_processes={num_processes}, but there are {place.num_processes} ({place.started_by}); "
                "leave it out"
            )
    if place.process_id >= place.num_processes:
        raise UserError(f"--process_id={place.process_id} must be less than --num_processes={place.num_processes}")
    return place


def _found(num_processes: int | None, *, tpus: bool, seconds: int) -> Place:
    if "OMPI_COMM_WORLD_SIZE" in os.environ:  # before Slurm, by which mpirun may have started its daemons
        return _open_mpi()
    if "SLURM_JOB_ID" in os.environ:
        return _slurm(num_processes)
    if tpus and (place := _tpu(seconds)):
        return place
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return _kubernetes(num_processes)
    return Place()


def _open_mpi() -> Place:
    count, process = int(os.environ["OMPI_COMM_WORLD_SIZE"]), int(os.environ["OMPI_COMM_WORLD_RANK"])
    local_count = int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    if count == 1:
        return Place(started_by="Open MPI")
    # Where mpirun runs, by version 5 (prterun-HOST-PID@1) and by those before (JOB.0;tcp://IP,IP:PORT;...).
    uri = os.environ.get("OMPI_MCA_orte_hnp_uri", "")
    if found := re.fullmatch(r"\w+-(.+)-(\d+)@\d+", os.environ.get("PMIX_NAMESPACE", "")):
        host, job = found[1], int(found[2])
    elif found := re.match(r"(\d+)\.\d+;tcp(?:://([^,:]+)|6://\[([^],]+))", uri):
        host, job = found[2] or f"[{found[3]}]", int(found[1]) // 4096  # a multiple of it
    else:
        raise UserError(
            "this Open MPI does not tell where mpirun runs; give --coordinator=HOST:PORT of process 0, "
            "--num_processes=$OMPI_COMM_WORLD_SIZE and --process_id=$OMPI_COMM_WORLD_RANK"
        )
    if local_count == count:
        host = "127.0.0.1"
    elif process == 0 and not _is_here(host):
        raise UserError(
            f"Open MPI: mpirun runs on {host} and process 0 on {socket.gethostname()}, where the others would not look "
            "for it; start mpirun on the first of its hosts, or give --coordinator, --num_processes and --process_id"
        )
    return Place(
        started_by="Open MPI",
        num_processes=count,
        process_id=process,
        coordinator=f"{host}:{_port(job)}",
        local_id=int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]),
        local_count=local_count,
    )


def _is_here(host: str) -> bool:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.bind(address)
    except OSError:
        return False
    return True


def _slurm(num_processes: int | None) -> Place:
    name = f"Slurm job {os.environ['SLURM_JOB_ID']}"
    # Of the step, that is of one srun. SLURM_NTASKS may be that of the allocation, also in the shell that salloc opens
    # by its default of `srun --preserve-env --pty`.
    count = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if count == 1:
        tasks = int(os.environ.get("SLURM_NTASKS", 1))
        return Place(started_by=f"{name}, of which srun would start {tasks}" if tasks > 1 else name)
    process = int(os.environ["SLURM_PROCID"])
    if num_processes is None and os.isatty(0):
        raise UserError(
            f"{name}: in the shell of a step of {count} tasks, others are not started by themselves; use srun, or "
            f"--num_processes=1 to train in this one alone (--num_processes={count} if srun has started this)"
        )
    # "n[1-2,4],m7" or "rack[1-2]n[3-4]": the first of each list of numbers.
    nodes = re.match(r"(?:[^,[]|\[[^]]*\])+", os.environ["SLURM_STEP_NODELIST"])
    assert nodes, "SLURM_STEP_NODELIST is empty"
    host = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes[0])
    step = int(os.environ.get("SLURM_STEP_ID", 0))  # two steps of a job may be on a host at once
    counts = []  # of tasks on each node, from "4(x2),1"
    for part in os.environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    return Place(
        started_by=name,
        num_processes=count,
        process_id=process,
        coordinator=f"{host}:{_port(int(os.environ['SLURM_JOB_ID']) + 97 * step)}",
        local_id=int(os.environ["SLURM_LOCALID"]),
        local_count=counts[int(os.environ["SLURM_NODEID"])],
    )


def _tpu(seconds: int) -> Place | None:
    """Asks the metadata server only where libtpu is installed and a TPU is on the bus."""
    try:
        for name, cluster in (("GKE", GkeTpuCluster), ("Cloud TPU VM", GceTpuCluster)):
            if not cluster.is_env_present():
                continue
            count = cluster.get_process_count()
            if count == 1:
                return Place(started_by=name)
            return Place(
                started_by=name,
                num_processes=count,
                process_id=cluster.get_process_id(),
                coordinator=cluster.get_coordinator_address(seconds, str(_port())),
            )
    except (OSError, RuntimeError) as error:  # no metadata (one of the package requests is an OSError); no such host
        raise RunFailed(
            f"this TPU VM cannot be placed among others ({error}); in a container, give it the network of the host, or "
            "give --coordinator, --num_processes and --process_id"
        ) from error
    return None


def _kubernetes(num_processes: int | None) -> Place:
    """A pod of an indexed job, as those of a JobSet are; the host part of its name is JOB-INDEX."""
    process = int(os.environ["JOB_COMPLETION_INDEX"])
    pod, _, domain = socket.getfqdn().partition(".")
    job = pod.removesuffix(f"-{process}")
    if num_processes is None:
        raise UserError(
            f"this is pod {process} of the Kubernetes job {job}, and it is not told of how many; give --num_processes "
            "(1 to train in each pod alone)"
        )
    if not domain or job == pod:
        raise UserError(
            f"the pod {pod} has no name that others could find; give the job a headless service by `subdomain` (a "
            "JobSet does), or give --coordinator and --process_id, too"
        )
    return Place(
        started_by=f"Kubernetes job {job}",
        num_processes=num_processes,
        process_id=process,
        coordinator=f"{job}-0.{domain}:{_port()}",
    )


def _port(job: int | None = None) -> int:
    """JAX_COORDINATOR_PORT, as for JAX, or one that two jobs on a host do not share."""
    given = os.environ.get("JAX_COORDINATOR_PORT")
    return int(given) if given else PORT if job is None else PORTS[job % len(PORTS)]


def own_gpus(place: Place) -> list[int] | None:
    """The GPUs of this process among the visible ones, if it shares them with others on its host; None: all of them."""
    by_slurm = place.started_by.startswith("Slurm") and (
        "SLURM_GPUS_PER_TASK" in os.environ or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    )
    if place.local_count == 1 or by_slurm or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    each = len(gpus) // place.local_count
    return list(range(place.local_id * each, (place.local_id + 1) * each)) or None
