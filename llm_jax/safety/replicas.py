"""Do the devices agree? What is replicated is computed on each of them alike, so a copy that differs by a bit tells of
hardware that computes or keeps numbers wrongly (silent data corruption: Dixit et al. 2021, arXiv:2102.11245)."""

import collections

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.safety import digest


def disagreeing(arrays: dict[str, jax.Array]) -> list[str]:
    """A line for every device whose copy of an array, or of its part, is not that of most; empty if all agree.

    "blocks/attention/wq: device 3 of process 0 differs from device 1 of process 0". Where no majority says which is
    right, one line names all. Compares bits, by a digest of 64 that each device makes of what it holds; only digests
    are sent. Arrays: as digest.digests takes them, with NamedShardings over one mesh. All processes must call it; all
    get the same answer.
    """
    mesh = next(iter(arrays.values())).sharding.mesh
    sums = {name: digest.sums_by_device(array) for name, array in arrays.items()}
    words = multihost_utils.process_allgather(sums, tiled=True)  # {name: [devices, 3]}
    lines = []
    for name, array in arrays.items():
        parts = array.sharding.devices_indices_map(array.shape)
        copies = collections.defaultdict(lambda: collections.defaultdict(list))  # part -> digest -> devices
        for device, found in zip(mesh.devices.flat, np.asarray(words[name]).tolist(), strict=True):
            copies[str(parts[device])][tuple(found)].append(f"device {device.id} of process {device.process_index}")
        for by_digest in copies.values():
            lines += [f"{name}: {line}" for line in _compare(list(by_digest.values()))]
    return lines


def _compare(groups: list[list[str]]) -> list[str]:
    """groups: the devices that hold the same part, by what they hold."""
    if len(groups) == 1:
        return []
    groups = sorted(groups, key=len, reverse=True)
    most = groups[0]
    if 2 * len(most) > sum(map(len, groups)):
        return [f"{device} differs from {most[0]}" for group in groups[1:] for device in group]
    return [" differs from ".join(", ".join(group) for group in groups) + "; no majority tells which is right"]
