"""The processes of a run: how they start, know of each other, and leave together."""

import concurrent.futures
import dataclasses
import hashlib
import os
import signal
import socket
import sys
import threading
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name; Orbax uses it by this one, too
from jax.experimental import multihost_utils

from llm_jax.config import Parallel, RunFailed, UserError
from llm_jax.parallel.cluster import Place, find, own_gpus

PREEMPTED = 75  # exit code: stopped after a notice, start again
SECONDS_TO_MEET = 300  # for all processes to have come; JAX's default
SECONDS_BETWEEN_POLLS = 0.05
ALONE = 10**6  # seconds


def start(
    parallel: Parallel,
    *,
    compilation_cache: str,
    saves_on_sigterm: bool,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Configures JAX and meets the other processes of the run; call before the first device is touched.

    Without flags, what started the process tells of the others: Open MPI, Slurm, a TPU VM, Kubernetes; standard error
    is told which. jax.distributed is initialised for a single process, too: it is what receives preemption notices
    (SIGTERM), so that the run can save and stop instead of just dying. A job that does not ask for them still dies
    (saves_on_sigterm). Raises RunFailed if they do not meet.

    Args:
      coordinator: HOST:PORT at which process 0 can be reached; given in all num_processes processes or in none
      num_processes: alone, it is 1 for a process on its own, or how many there must be
    """
    if parallel.num_cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", parallel.num_cpu_devices)
    jax.config.update("jax_compilation_cache_dir", compilation_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.distributed.is_initialized():
        return
    on_cpu = jax.config.jax_platforms == "cpu"
    place = find(coordinator, num_processes, process_id, tpus=not on_cpu, seconds=SECONDS_TO_MEET)
    if place.started_by:
        print(place, file=sys.stderr, flush=True)
    heartbeat = parallel.heartbeat_seconds or (4 if on_cpu else 60)
    if not place.coordinator:
        jax.config.update("jax_cpu_collectives_implementation", None)  # devices of one process need no sockets
        place = dataclasses.replace(place, coordinator=f"127.0.0.1:{_free_port()}")
        heartbeat = ALONE  # a process that is stopped (Ctrl-Z) for a while must not take itself for dead
    elif place.process_id == 0:
        _require_free_port(place.coordinator)
    _reach_directly(place.coordinator)
    _meet(
        place,
        local_device_ids=own_gpus(place),
        cluster_detection_method="deactivate",
        initialization_timeout=2 * SECONDS_TO_MEET,  # JAX's end would be an abort that does not say what is amiss
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=60,
    )
    if not saves_on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _require_free_port(coordinator: str) -> None:
    """JAX would not notice another run there, and each would take the other's processes for its own."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise RunFailed(
                f"port {port} of process 0 ({coordinator}): {error.strerror}; end what has it, often an earlier start "
                "of this run, or give another one by --coordinator or JAX_COORDINATOR_PORT"
            ) from error


def _reach_directly(coordinator: str) -> None:
    """Not by a proxy of the environment, which gRPC would take even to this host, and wait for ever."""
    jax.config.update("jax_check_proxy_envs", False)
    others = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [coordinator.rpartition(":")[0].strip("[]"), others]))


def _meet(place: Place, **options) -> None:
    """jax.distributed.initialize in a thread: this one is open to SIGTERM and Ctrl-C, and gives up in time."""
    met = concurrent.futures.Future()

    def initialize() -> None:
        try:
            jax.distributed.initialize(place.coordinator, place.num_processes, place.process_id, **options)
        except BaseException as error:
            met.set_exception(error)
        else:
            met.set_result(None)

    threading.Thread(target=initialize, daemon=True, name="meeting").start()
    if not concurrent.futures.wait([met], SECONDS_TO_MEET).done:
        raise RunFailed(
            f"process {place.process_id} of {place.num_processes} has waited {SECONDS_TO_MEET} s for the others: "
            + _why_not_met(place.coordinator)
        )
    met.result()


def _why_not_met(coordinator: str) -> str:
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (
            f"process 0 cannot be reached at {coordinator} ({error}); see that it runs, that this is its address as "
            "seen from here, and that no firewall closes the port"
        )
    return f"process 0 is at {coordinator}, but not all have come; see that each runs, with its own number"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_first() -> bool:
    """Whether this process writes what is written once: metrics, tables, the config."""
    return jax.process_index() == 0


def first_says(number: int) -> int:
    """The number that the first process has, in all of them."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def anywhere(flag: bool) -> bool:
    """Whether it holds in one of the processes."""
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def require_same(what: str, text: str) -> None:
    """Raises UserError in every process if they do not all have the same text."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32)
    digests = multihost_utils.process_allgather(digest)
    other = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(other):
        raise UserError(f"{what}: process {other[0]} was given another one than process 0; give all of them the same")


class Preemption:
    """Preemption notices: SIGTERM to any process of the run reaches all of them, which then stop at the same point.

    JAX's preemption service agrees on a number that no process has come to yet; each counts up and stops there. In the
    loops that all processes go through in step, `reached` counts. Elsewhere (data, compilation, final evaluation)
    nothing that could be saved would be lost, and a thread counts: see `leaving_at_once`.
    """

    def __init__(self):
        self._count = 0
        self._caught_up = 0  # how often

    def reached(self) -> bool:
        """Whether to stop here. Every process must call it at the same places."""
        self._count += 1
        return multihost_utils.reached_preemption_sync_point(self._count)

    @contextmanager
    def leaving_at_once(self, say: typing.Callable[[str], None]) -> Iterator[None]:
        """Within it, a notice ends all processes with exit code 75, whatever they are doing."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(SECONDS_BETWEEN_POLLS):
                if self.reached():
                    self._leave(say)

        thread = threading.Thread(target=watch, daemon=True, name="preemption")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if jax.process_count() > 1:
            self._catch_up(say)

    def _catch_up(self, say: typing.Callable[[str], None]) -> None:
        """Counts on to where the process is that counted furthest, leaving out no number: it may be the agreed one.

        No collective: a process may leave instead of coming here.
        """
        self._caught_up += 1
        counts = f"counts/{self._caught_up}"
        post(f"{counts}/{jax.process_index()}", str(self._count))
        while len(found := posted(counts)) < jax.process_count():
            if posted("left"):
                self._leave(say)
            time.sleep(SECONDS_BETWEEN_POLLS)
        while self._count < max(map(int, found.values())):
            if self.reached():
                self._leave(say)

    def _leave(self, say: typing.Callable[[str], None]) -> typing.NoReturn:
        try:
            say("preempted: nothing to save; the same command goes on")
            sys.stdout.flush()
            sys.stderr.flush()
            post(f"left/{jax.process_index()}", "")
            jax.distributed.shutdown()  # waits for the others: who loses process 0 unawares takes it for a crash
        finally:
            os._exit(PREEMPTED)


def post(key: str, value: str) -> None:
    """Lets the other processes know: see posted."""
    _client().key_value_set(f"llm_jax/{key}", value, allow_overwrite=True)


def posted(directory: str) -> dict[str, str]:
    """What has been posted under directory/..., by the rest of the key."""
    pairs = _client().key_value_dir_get(f"llm_jax/{directory}/")
    return {key.rpartition("/")[2]: value for key, value in pairs}


def _client():
    client = distributed.global_state.client
    assert client is not None, "hosts.start has not been called"
    return client
