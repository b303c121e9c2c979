"""Where a process finds itself, by the environment of each launcher. Nothing here reaches a network."""

import os
import socket

import pytest
from jax._src.clusters import cloud_tpu_cluster

from llm_jax.config import RunFailed, UserError
from llm_jax.parallel import cluster
from llm_jax.parallel.cluster import Place

SOCKET = socket.socket
LAUNCHERS = ("SLURM", "OMPI_", "PMIX_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION", "JAX_", "CUDA_VISIBLE")

# `srun` of 6 tasks on two nodes, as task 5 sees it.
SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# A batch script: of the allocation, but of no step.
BATCH = {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
# The shell of `salloc -n6` where LaunchParameters=use_interactive_step: a step of one task, SLURM_NTASKS preserved.
SALLOC = SLURM | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_PTY_PORT": "34889",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
# What mpirun 4.1.4 and 5.0.11 set, with other addresses.
OMPI_4 = OMPI | {
    "OMPI_MCA_orte_hnp_uri": "121372672.0;tcp://203.0.113.7,10.1.0.2:35459;tcp6://[fd00::2]:55467",
    "PMIX_NAMESPACE": "121372673",
}
OMPI_5 = OMPI | {"OMPI_VERSION": "5.0.11", "PMIX_NAMESPACE": "prterun-gpu-a-7-27146@1"}
ON_ONE_HOST = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
GKE = {"TPU_WORKER_HOSTNAMES": "t-0.train,t-1.train", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "s0-t-0.train:8080",
}
ONE_SLICE = {"MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": "", "MEGASCALE_COORDINATOR_ADDRESS": ""}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}


def no_network(*arguments, **options):
    raise AssertionError(f"asked the network: {arguments}")


@pytest.fixture
def places(monkeypatch):
    """find(), in an environment of which it is given all."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    for name in ("socket", "getaddrinfo", "gethostbyname", "create_connection", "getfqdn"):
        monkeypatch.setattr(socket, name, no_network)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", no_network)

    def find(environment, *, coordinator=None, num_processes=None, process_id=None, tpus=True) -> Place:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return cluster.find(coordinator, num_processes, process_id, tpus=tpus, seconds=1)

    return find


def test_a_laptop_asks_nobody(places):
    assert places({}) == Place()


def test_flags_come_first(places):
    place = places(SLURM, coordinator="host:1", num_processes=2, process_id=1)
    assert place == Place(started_by="flags", num_processes=2, process_id=1, coordinator="host:1")
    assert str(place) == "processes: 2 (flags), this is 1, coordinator host:1"


@pytest.mark.parametrize("environment", [{}, SLURM, OMPI_5, POD])
def test_one_process_alone_wherever_it_is(environment, places):
    place = places(environment, num_processes=1)
    assert (place.num_processes, place.process_id, place.coordinator) == (1, 0, "")


FOUND = {
    "srun": (SLURM, 6, 5, "n1:61563", 1, 2, "Slurm job 123"),
    "srun, first node": (SLURM | {"SLURM_NODEID": "0"}, 6, 5, "n1:61563", 1, 4, "Slurm job 123"),
    "second step": (SLURM | {"SLURM_STEP_ID": "1"}, 6, 5, "n1:61660", 1, 2, "Slurm job 123"),
    "another port": (SLURM | {"JAX_COORDINATOR_PORT": "77"}, 6, 5, "n1:77", 1, 2, "Slurm job 123"),
    "equal nodes": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, 6, 5, "n1:61563", 1, 3, "Slurm job 123"),
    "fewer than allocated": (SLURM | {"SLURM_NTASKS": "8"}, 6, 5, "n1:61563", 1, 2, "Slurm job 123"),
    "mpirun 4": (OMPI_4, 4, 3, f"203.0.113.7:{61440 + 29632 % 4096}", 1, 2, "Open MPI"),
    "mpirun 4, IPv6": (
        OMPI_4 | {"OMPI_MCA_orte_hnp_uri": "40960.0;tcp6://[fe80::1,fd00::2]:5"}, 4, 3, "[fe80::1]:61450", 1, 2,
        "Open MPI",
    ),
    "mpirun 5": (OMPI_5, 4, 3, f"gpu-a-7:{61440 + 27146 % 4096}", 1, 2, "Open MPI"),
    "mpirun, one host": (OMPI_5 | ON_ONE_HOST, 4, 3, f"127.0.0.1:{61440 + 27146 % 4096}", 3, 4, "Open MPI"),
    # Its daemons are the tasks of a step.
    "mpirun in Slurm": (SLURM | OMPI_5, 4, 3, f"gpu-a-7:{61440 + 27146 % 4096}", 1, 2, "Open MPI"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_found(case, places):
    environment, count, process, coordinator, local, local_count, by = FOUND[case]
    assert places(environment) == Place(
        started_by=by, num_processes=count, process_id=process, coordinator=coordinator, local_id=local,
        local_count=local_count,
    )  # fmt: skip


ALONE = {
    "srun -n1": (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, "Slurm job 123"),
    "batch script": (BATCH, "Slurm job 123, of which srun would start 6"),
    "shell of salloc": (SALLOC, "Slurm job 123, of which srun would start 6"),
    "ssh to a node": ({"SLURM_JOB_ID": "123"}, "Slurm job 123"),
    "mpirun -n1": (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, "Open MPI"),
    "pod of no indexed job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),
}


@pytest.mark.parametrize("case", ALONE)
def test_alone(case, places):
    environment, by = ALONE[case]
    assert places(environment) == Place(started_by=by)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n1,m[2-3]", "n1"),
        ("gpu-[007-015],host2", "gpu-007"),
        ("n[3,1]", "n3"),
        ("rack[1-2]n[3-4],m", "rack1n3"),
    ],
)
def test_first_node_of_slurm(nodes, first, places):
    assert places(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:61563"


def test_shell_of_a_step_of_several_tasks(places, monkeypatch):
    """The others are shells, too, which wait for nobody: it would wait for ever."""
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 0)
    with pytest.raises(UserError, match="--num_processes=1 to train in this one alone"):
        places(SLURM)
    assert places(SLURM, num_processes=6).process_id == 5
    assert places(SALLOC).num_processes == 1


def test_open_mpi_whose_first_process_is_elsewhere(places, monkeypatch):
    """On a host that has none of the addresses at which the others look for it."""
    monkeypatch.setattr(socket, "socket", SOCKET)
    address = "203.0.113.7"  # of no host (RFC 5737)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0))]
    )
    first = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(UserError, match="start mpirun on the first of its hosts"):
        places(OMPI_4 | first)
    address = "127.0.0.1"
    assert places(OMPI_4 | first).process_id == 0


def test_another_mpi(places):
    with pytest.raises(UserError, match="give --coordinator=HOST:PORT"):
        places(OMPI)


def test_pods_of_an_indexed_job(places, monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", lambda: "train-workers-0-2.train.default.svc.cluster.local")
    assert places(POD, num_processes=4) == Place(
        started_by="Kubernetes job train-workers-0",
        num_processes=4,
        process_id=2,
        coordinator="train-workers-0-0.train.default.svc.cluster.local:8482",
    )
    with pytest.raises(UserError, match="pod 2 of the Kubernetes job train-workers-0, .* give --num_processes"):
        places(POD)
    with pytest.raises(UserError, match="--process_id=2 must be less than --num_processes=2"):
        places(POD, num_processes=2)
    monkeypatch.setattr(socket, "getfqdn", lambda: "train-workers-0-2")
    with pytest.raises(UserError, match="headless service"):
        places(POD, num_processes=4)


@pytest.mark.parametrize(
    "environment, count, process, coordinator",
    [
        (GKE | ONE_SLICE, 2, 1, "t-0.train:8482"),
        (GKE | ONE_SLICE | POD, 2, 1, "t-0.train:8482"),
        (GKE | ONE_SLICE | {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476,c:8476"}, 3, 1, "a:8482"),
        (GKE | SLICES, 6, 5, "s0-t-0.train:8482"),
        (GKE | ONE_SLICE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, 1, 0, ""),
    ],
)
def test_tpus_on_gke(environment, count, process, coordinator, places, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.2")
    place = places(environment)
    assert (place.started_by, place.num_processes, place.process_id, place.coordinator) == (
        "GKE", count, process, coordinator,
    )  # fmt: skip


@pytest.mark.parametrize(
    "worker, endpoints, tpu_env, count, process, coordinator",
    [
        ("1", "a:1:10.0.0.1,b:2:10.0.0.2", "", 2, 1, "10.0.0.1:8482"),
        ("0", "a:1:10.0.0.1", "", 1, 0, ""),
        (
            "1",
            "host-2,host-3",
            "ACCELERATOR_TYPE: 'v6e-16'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'\nMEGASCALE_NUM_SLICES: '2'\n"
            "MEGASCALE_SLICE_ID: '1'",
            4,
            3,
            "10.0.0.9:8482",
        ),
    ],
)
def test_tpu_vm(worker, endpoints, tpu_env, count, process, coordinator, places, monkeypatch):
    metadata = {"agent-worker-number": worker, "worker-network-endpoints": endpoints, "tpu-env": tpu_env}
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    monkeypatch.setattr(socket, "gethostbyname", lambda name: name)
    place = places({})
    assert (place.started_by, place.num_processes, place.process_id, place.coordinator) == (
        "Cloud TPU VM", count, process, coordinator,
    )  # fmt: skip


def test_tpu_vm_that_computes_on_cpu(places, monkeypatch):
    """Such as --config.parallel.num_cpu_devices=8 on one host of many, to try something."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    assert places({}, tpus=False) == Place()


def test_tpu_vm_whose_metadata_do_not_answer(places, monkeypatch):
    """As in a container that does not have the network of its host."""

    def get_metadata(key):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)
    with pytest.raises(RunFailed, match="TPU VM cannot be placed among others .no route to host.*network"):
        places({})


@pytest.mark.parametrize(
    "flags, environment, message",
    [
        ({"num_processes": 2}, {}, "belong together; give --coordinator and --process_id, too"),
        ({"num_processes": 2}, BATCH, "--num_processes=2, but there are 1 .Slurm job 123, of which srun"),
        ({"process_id": 1}, SLURM, "belong together; give --coordinator and --num_processes, too"),
        ({"coordinator": "a:1"}, {}, "belong together; give --num_processes and --process_id, too"),
        ({"num_processes": 2}, SLURM, "--num_processes=2, but there are 6 .Slurm job 123.; leave it out"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 1}, {}, "--coordinator=a must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, {}, "must be less than --num_processes=2"),
    ],
)
def test_wrong_flags(flags, environment, message, places):
    with pytest.raises(UserError, match=message):
        places(environment, **flags)


@pytest.mark.parametrize(
    "local_id, local_count, environment, gpus",
    [
        (0, 1, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # JAX would take the first only
        (1, 4, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [1]),
        (1, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, [2, 3]),
        (1, 4, {"CUDA_VISIBLE_DEVICES": "0"}, None),  # chosen by Slurm: JAX would look for the second of one
        (1, 2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "4"}, None),
        (1, 2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=4"}, None),
        (1, 2, {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
        (2, 4, ["nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"], [2]),
        (1, 2, ["null"], None),
    ],
)
def test_gpus_of_processes_that_share_a_host(local_id, local_count, environment, gpus, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    if isinstance(environment, list):
        monkeypatch.setattr(os, "listdir", {"/dev": environment}.get)
    else:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
    place = Place(started_by="Slurm job 123", local_id=local_id, local_count=local_count)
    assert cluster.own_gpus(place) == gpus


def test_gpus_that_slurm_has_not_bound(monkeypatch):
    """mpirun in an allocation: its processes inherit what Slurm's tasks would have had."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert cluster.own_gpus(Place(started_by="Open MPI", local_id=1, local_count=4)) == [1]
