"""The mesh, and the one table that says which mesh axis shards which dimension. No other file names a mesh axis.

Axes are explicit (JAX's default): the sharding of an array is part of its type, so gradients, optimizer moments and
restore targets follow the parameters by themselves.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from llm_jax.config import Parallel, UserError

AXES = ("replica", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Logical dimension -> the mesh axes that shard it."""

    batch: tuple[str, ...] = ("replica", "fsdp")
    embed: tuple[str, ...] = ("fsdp",)  # the width of parameters; activations are not sharded over it
    heads: tuple[str, ...] = ("tensor",)
    feed_forward: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)

    def spec(self, *names: str | None) -> jax.P:
        """The PartitionSpec of an array whose dimensions have these logical names; None is not sharded."""
        axes = [getattr(self, name) if name else () for name in names]
        used = [axis for dimension in axes for axis in dimension]
        if len(used) != len(set(used)):
            raise ValueError(
                f"dimensions {names} map to mesh axes {axes}, but one mesh axis can shard only one dimension"
            )
        return jax.P(*(dimension or None for dimension in axes))


def make_mesh(parallel: Parallel, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all). parallel.fsdp=None takes all that the other axes leave."""
    devices = jax.devices() if devices is None else devices
    fixed = parallel.replica * parallel.tensor
    fsdp = parallel.fsdp or max(1, len(devices) // fixed)
    if parallel.replica * fsdp * parallel.tensor != len(devices):
        fits = ", ".join(
            f"fsdp={len(devices) // tensor} tensor={tensor}"
            for tensor in range(1, len(devices) + 1)
            if len(devices) % tensor == 0
        )
        raise UserError(
            f"parallel.replica={parallel.replica} x fsdp={fsdp} x tensor={parallel.tensor} must be the number of "
            f"devices, {len(devices)}; with replica=1 these work: {fits}"
        )
    return jax.make_mesh((parallel.replica, fsdp, parallel.tensor), AXES, devices=devices)


def require_divisible(mesh: jax.sharding.Mesh, rules: Rules, sizes: dict[str, tuple[int, str]]) -> None:
    """Raises UserError where a size does not divide by its shards. sizes: {field: (value, logical dimension)}."""
    problems = []
    for field, (value, name) in sizes.items():
        axes = getattr(rules, name)
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if value % shards:
            nearest = max(1, round(value / shards)) * shards
            problems.append(
                f"{field}={value} must divide by the {shards} shards of mesh axes {axes} in {dict(mesh.shape)}; "
                f"try {nearest}, or another parallel.{axes[-1]}"
            )
    if problems:
        raise UserError("\n".join(problems))


def replicated(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    return jax.NamedSharding(mesh, jax.P())


def shards_parameters(mesh: jax.sharding.Mesh, rules: Rules) -> bool:
    """Whether the blocks must gather their weights."""
    return any(mesh.shape[axis] > 1 for axis in rules.embed)


def global_rows(
    read: Callable[[int, int], dict[str, np.ndarray]], num_rows: int, sharding: jax.NamedSharding
) -> dict[str, jax.Array]:
    """Arrays of num_rows rows over all processes; each reads the rows its own devices hold, by read(start, stop)."""
    slices = sharding.addressable_devices_indices_map((num_rows,)).values()
    ranges = [rows.indices(num_rows)[:2] for (rows, *_) in slices]
    first, last = min(start for start, _ in ranges), max(stop for _, stop in ranges)
    local = read(first, last)

    def to_global(array):
        def part(index):
            start, stop, _ = index[0].indices(num_rows)
            return array[start - first : stop - first]

        return jax.make_array_from_callback((num_rows, *array.shape[1:]), sharding, part)

    return {name: to_global(array) for name, array in local.items()}


def num_batch_shards(mesh: jax.sharding.Mesh, rules: Rules) -> int:
    """What the number of rows of a batch must divide by."""
    return math.prod(mesh.shape[axis] for axis in rules.batch)
