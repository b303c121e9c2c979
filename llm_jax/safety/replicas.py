"""Do the devices agree? What is replicated is computed on each of them alike, so a copy that differs by a bit tells of
hardware that computes or keeps numbers wrongly (silent data corruption: Dixit et al. 2021, arXiv:2102.11245)."""

import collections
import functools

import jax
import jax.numpy as jnp
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
    digest_all = _digests_by_device(mesh, tuple(array.sharding.spec for array in arrays.values()))
    words = multihost_utils.process_allgather(digest_all(*arrays.values()), tiled=True)  # [devices, arrays, 2]
    lines = []
    for i, (name, array) in enumerate(arrays.items()):
        parts = array.sharding.devices_indices_map(array.shape)
        copies = collections.defaultdict(lambda: collections.defaultdict(list))  # part -> digest -> devices
        for device, found in zip(mesh.devices.flat, np.asarray(words)[:, i].tolist(), strict=True):
            copies[str(parts[device])][tuple(found)].append(f"device {device.id} of process {device.process_index}")
        for by_digest in copies.values():
            lines += [f"{name}: {line}" for line in _compare(list(by_digest.values()))]
    return lines


@functools.cache  # so that jit finds what it compiled
def _digests_by_device(mesh: jax.sharding.Mesh, specs: tuple[jax.P, ...]):
    """A function of arrays with these specs: uint32 [devices, arrays, 2], a row made by each device, nothing sent."""

    def local(*arrays):
        return jnp.stack([digest._sum(array) for array in arrays])[None]

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P(mesh.axis_names)))


def _compare(groups: list[list[str]]) -> list[str]:
    """groups: the devices that hold the same part, by what they hold."""
    if len(groups) == 1:
        return []
    groups = sorted(groups, key=len, reverse=True)
    most = groups[0]
    if 2 * len(most) > sum(map(len, groups)):
        return [f"{device} differs from {most[0]}" for group in groups[1:] for device in group]
    return [" differs from ".join(", ".join(group) for group in groups) + "; no majority tells which is right"]
