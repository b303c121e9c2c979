"""What stands beside a figure: the machine, the versions, the commit, and how far it scattered."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess

import llm_jax

HERE = pathlib.Path(__file__).parent


def machine() -> dict:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    huge = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "amx": "amx_bf16" in flags,
        "huge pages": huge.read_text().strip() if huge.exists() else None,
        "load": os.getloadavg()[0],  # of the last minute: above the cores, others had a part of them
        "versions": {"python": platform.python_version(), "llm_jax": llm_jax.__version__, **versions},
        "commit": commit or None,
    }


def spread(values: list[float]) -> dict:
    """Median, quartiles and ends of some repetitions."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "quartiles": [low, high], "range": [min(values), max(values)], "count": len(values)}


def write(path: str | None, results: dict) -> None:
    """The figures with the facts beside them, to the file that --json names."""
    if path is not None:
        pathlib.Path(path).write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
