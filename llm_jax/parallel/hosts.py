"""Starting the processes of a run."""

import signal
import socket

import jax

from llm_jax.config import Parallel


def start(parallel: Parallel, *, compilation_cache: str, saves_on_sigterm: bool) -> None:
    """Configures JAX; call before the first device is touched.

    jax.distributed is initialised for a single process, too: it is what receives preemption notices (SIGTERM), so that
    the run can save and stop instead of just dying. A job that does not ask for them still dies (saves_on_sigterm).
    """
    if parallel.num_cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", parallel.num_cpu_devices)
    jax.config.update("jax_compilation_cache_dir", compilation_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not jax.distributed.is_initialized():
        jax.config.update("jax_cpu_collectives_implementation", None)  # devices of one process need no sockets
        jax.distributed.initialize(f"127.0.0.1:{_free_port()}", num_processes=1, process_id=0)
        if not saves_on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_first() -> bool:
    """Whether this process writes what is written once: metrics, tables, the config."""
    return jax.process_index() == 0
