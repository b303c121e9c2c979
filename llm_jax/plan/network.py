"""How fast the devices along mesh axes reach each other, by where the mesh lies on the machine.

Sources: "How to Scale Your Model" (Austin et al. 2025), chapters TPUs and GPUs, for what a collective takes on a ring
and across hosts; jax.experimental.mesh_utils for which mesh axis gets which dimension of a torus.
"""

import dataclasses
import functools
import itertools
import math

from llm_jax.parallel.chips import ON_CHIP
from llm_jax.plan.memory import Sizes
from llm_jax.plan.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a mesh axis lies: `inner` of its devices in a slice (of GPUs: a host), `cores` of these in a chip, along
    parts of the dimensions of the torus; `outer` slices."""

    inner: int
    outer: int = 1
    cores: int = 1
    parts: tuple[int, ...] = ()


class Network:
    def __init__(self, topology: Topology, sizes: Sizes):
        self.topology = topology
        self.places = _on_torus(topology, sizes) if topology.chip.torus else _in_hosts(topology, sizes)

    def crosses(self, axes: tuple[str, ...]) -> bool:
        """Whether these axes leave the slice, or the host of GPUs."""
        return any(self.places[axis].outer > 1 for axis in axes)

    def seconds(self, axes: tuple[str, ...], size: float) -> float:
        """Of an all-gather to arrays of `size` bytes, or of a reduce-scatter of such; an all-reduce takes two.

        On a ring each device receives all but its own part, from both sides at once, along all dimensions of the torus
        at once. Between slices each device carries its part of what the slice needs, while the links within are busy
        with other parts: the slower of the two counts.
        """
        places = [self.places[axis] for axis in axes]
        inner, outer, cores = (math.prod(getattr(p, name) for p in places) for name in ("inner", "outer", "cores"))
        chip = self.topology.chip
        within = between = 0.0
        if inner > 1:
            if not chip.torus:
                rate = chip.link
            elif inner == cores:
                rate = ON_CHIP * chip.link
            else:  # the cores of a chip share its links, and what they fetch if both need it
                rate = self._links(places) * chip.link * cores / chip.devices
            within = size * (1 - 1 / inner) / rate
        if outer > 1:
            between = size / inner * (1 - 1 / outer) / (chip.dcn / chip.devices)
        return max(within, between)

    def _links(self, places: list[Place]) -> int:
        """Over how many links a chip receives from the others along these axes: of a ring two, of a line one."""
        links = 0
        for i, (length, wraps) in enumerate(zip(self.topology.shape, self.topology.wraps, strict=True)):
            part = math.prod(place.parts[i] for place in places)
            links += 0 if part == 1 else 2 if wraps and part == length else 1
        return links

    def hop(self, axis: str, size: float) -> float:
        """Of sending `size` bytes to the neighbour along an axis."""
        chip = self.topology.chip
        return size / ((chip.dcn if self.crosses((axis,)) else chip.link) / chip.devices)


@functools.cache
def network(topology: Topology, sizes: Sizes) -> Network:
    return Network(topology, sizes)


def _on_torus(topology: Topology, sizes: Sizes) -> dict[str, Place]:
    """From the innermost axis on, each takes whole dimensions of the torus that give its size, as many as it can, or
    else parts of them."""
    across = "replica" if sizes.replica % topology.slices == 0 else "stage"
    free, cores, places = topology.shape, topology.chip.devices, {}
    for axis, size in reversed(sizes._asdict().items()):
        outer = topology.slices if axis == across else 1
        mine = math.gcd(size // outer, cores)
        cores //= mine
        parts = _parts(free, size // outer // mine)
        free = tuple(left // part for left, part in zip(free, parts, strict=True))
        places[axis] = Place(inner=size // outer, outer=outer, cores=mine, parts=parts)
    return places


@functools.cache
def _parts(free: tuple[int, ...], size: int) -> tuple[int, ...]:
    """How much of each dimension an axis of this size takes."""
    for whole in sorted(itertools.product((True, False), repeat=len(free)), key=sum, reverse=True):
        parts = tuple(n if taken else 1 for n, taken in zip(free, whole, strict=True))
        if math.prod(parts) == size:
            return parts
    parts = [1] * len(free)
    for i in sorted(range(len(free)), key=lambda i: -free[i]):
        parts[i] = math.gcd(size, free[i])
        size //= parts[i]
    return tuple(parts)


def _in_hosts(topology: Topology, sizes: Sizes) -> dict[str, Place]:
    """From the innermost axis on, hosts are filled first."""
    left, places = min(topology.chip.host, topology.num_chips), {}
    for axis, size in reversed(sizes._asdict().items()):
        inner = math.gcd(size, left)
        left //= inner
        places[axis] = Place(inner=inner, outer=size // inner)
    return places
