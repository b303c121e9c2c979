"""What has to be in the environment before JAX, or Python itself, starts. Imports nothing heavy.

Compiled programs and autotuning results are not here: JAX keeps both in the compilation cache (see parallel.hosts),
autotuning results in its folder xla_gpu_per_fusion_autotune_cache_dir.
"""

import os
import pathlib
from collections.abc import Mapping

NVIDIA_DEVICE = "/dev/nvidiactl"
# Any of them shows that the user decides on the memory. The first two together are an error to JAX.
GPU_MEMORY = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


def has_gpu(environment: Mapping[str, str], device: str = NVIDIA_DEVICE) -> bool:
    """Whether JAX will find an NVIDIA GPU, if it has been installed for one."""
    wanted = environment.get("JAX_PLATFORMS", "")
    return os.path.exists(device) and (not wanted or wanted.split(",")[0] in ("cuda", "gpu"))


def for_gpu(environment: Mapping[str, str]) -> dict[str, str]:
    """What to set on a machine with GPUs: the share of their memory that is the run's.

    JAX takes 0.75 by itself, which leaves 20 to 35 GB of an H100 or H200 to nobody. What cuDNN, cuBLAS and NCCL
    allocate for themselves is in the rest.
    """
    return {} if any(environment.get(name) for name in GPU_MEMORY) else {"XLA_CLIENT_MEM_FRACTION": "0.9"}


def repeats_exactly(platform: str, environment: Mapping[str, str]) -> bool:
    """Whether a program gives the same bits each time: kernels for GPUs add up in any order if XLA does not forbid it
    (https://github.com/openxla/xla/pull/14125)."""
    flags = environment.get("XLA_FLAGS", "").split()
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    return platform != "gpu" or any(flag in (name, f"{name}=true", f"{name}=1") for flag in flags for name in names)


HUGE_PAGES = "glibc.malloc.hugetlb=1"
SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def for_malloc(environment: Mapping[str, str], setting: pathlib.Path = SETTING) -> dict[str, str]:
    """What makes the C library ask for huge pages, where Linux gives them to those who ask. It reads it once, when a
    process starts.

    XLA on CPU takes the memory for its temporaries anew for each update, and page faults of 4 KB each cost 15 to 20 %
    of the time.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not setting.exists() or "[madvise]" not in setting.read_text("utf-8"):
        return {}
    return {"GLIBC_TUNABLES": f"{tunables}:{HUGE_PAGES}" if tunables else HUGE_PAGES}
