"""A machine by its name: `v5p:4x4x8`, `v6e:16x16` and the like are slices of TPU chips, `h100:64` a number of GPUs."""

import dataclasses
import difflib
import importlib.util
import itertools
import math
import os
import re

import jax
from jax.experimental import topologies

from llm_jax.config import UserError
from llm_jax.parallel import chips

# What libtpu calls a chip where it has another name for it.
LIBTPU_NAMES = {"v7x": "tpu7x"}
# Where there is no TPU: no question to a metadata server, no lock that only one process can hold, and no complaint that
# the machine has no name. What is compiled does not depend on them.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    chip: chips.Chip
    shape: tuple[int, ...]  # of one slice, in chips; of GPUs: how many
    slices: int = 1

    @property
    def name(self) -> str:
        times = f" x {self.slices} slices" if self.slices > 1 else ""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}{times}"

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def num_hosts(self) -> int:
        return math.ceil(math.prod(self.shape) / self.chip.host) * self.slices

    @property
    def num_devices(self) -> int:
        """As JAX counts them."""
        return self.num_chips * self.chip.devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions of a slice close to a ring."""
        return self.chip.wraps(self.shape)

    def devices(self) -> list[jax.Device]:
        """Devices that programs can be lowered and compiled for but not run on; no TPU is needed. Those of several
        slices have a slice_index.

        Sets what libtpu reads from the environment, and JAX's own platform to CPU where none was chosen: for a process
        that only plans. Raises UserError where libtpu is not installed, and for GPUs.
        """
        if not self.chip.torus:
            raise UserError(
                f"--topology={self.name}: programs are compiled for TPU topologies only (try --topology=v5p:4x4x4); "
                "leave --compile out to plan GPUs by formulas"
            )
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"--topology={self.name}: compiling needs libtpu, which is not installed: pip install 'llm-jax[tpu]'"
            )
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not jax.config.jax_platforms:
            jax.config.update("jax_platforms", "cpu")
        padding = 3 - len(self.shape)
        options = {"wrap": self.wraps + (False,) * padding}
        if self.slices > 1:
            options["num_slices"] = self.slices
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if self.chip.name == "v4":  # both cores of a chip as one device, as on a Cloud TPU
            options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
        name = LIBTPU_NAMES.get(self.chip.name, self.chip.name)
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{'x'.join(map(str, self.shape))}", **options
        )
        return list(description.devices)


def parse(text: str, slices: int = 1) -> Topology:
    """`v5p:4x4x8` is a slice of 128 chips; `h100:64` 64 GPUs. Raises UserError, with the nearest that exists."""
    match = re.fullmatch(r"([a-z]\w*):(\d+(?:x\d+)*)", text.strip().lower())
    if not match:
        raise UserError(f"--topology={text} must be CHIP:SHAPE, such as v5e:4x4, v5p:4x4x8 or h100:64")
    chip = chips.find(match[1])
    if chip is None:
        names = [chip.name for chip in chips.CHIPS]
        near = difflib.get_close_matches(match[1], names, n=1)
        known = f"try {near[0]}; known: " if near else "known: "
        raise UserError(f"--topology={text}: no chip of the name {match[1]}; {known}{', '.join(names)}")
    if slices < 1 or (slices > 1 and not chip.torus):
        rule = "1 or more" if chip.torus else "1 for GPUs, whose hosts need no slices"
        raise UserError(f"--slices={slices} must be {rule}; try --slices=1")
    shape = tuple(int(size) for size in match[2].split("x"))
    if len(shape) != max(1, chip.torus) or not chip.fits(shape):
        near = ", ".join(f"{chip.name}:{'x'.join(map(str, other))}" for other in _nearest(chip, shape))
        raise UserError(f"--topology={text}: there is no such slice of {chip.name}; the nearest are {near}")
    return Topology(chip=chip, shape=shape, slices=slices)


def _nearest(chip: chips.Chip, shape: tuple[int, ...], count: int = 3) -> list[tuple[int, ...]]:
    """Shapes that exist, by the number of chips first and then by the sizes."""
    largest = max(4, math.isqrt(chip.max_chips))
    sizes = range(4, largest + 1, 4) if chip.torus else range(1, chip.max_chips + 1)
    candidates = {*chip.shapes, *itertools.combinations_with_replacement(sizes, max(1, chip.torus))}
    wanted = max(1, math.prod(shape))

    def distance(other: tuple[int, ...]) -> tuple[float, int]:
        sizes = itertools.zip_longest(sorted(shape, reverse=True), sorted(other, reverse=True), fillvalue=1)
        return abs(math.log(math.prod(other) / wanted)), sum(abs(a - b) for a, b in sizes)

    return sorted(filter(chip.fits, candidates), key=distance)[:count]
