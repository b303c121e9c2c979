"""The mesh, and the one table that says which mesh axis shards which dimension. No other file names a mesh axis.

Axes are explicit (JAX's default): the sharding of an array is part of its type, so gradients, optimizer moments and
restore targets follow the parameters by themselves.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils

from llm_jax.config import Parallel, UserError

# Outermost first: replica and stage may lie across slices, tensor where links are fastest.
AXES = ("replica", "stage", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Logical dimension -> the mesh axes that shard it."""

    batch: tuple[str, ...] = ("replica", "fsdp", "expert")
    length: tuple[str, ...] = ("context",)  # the sequence within attention and feed-forward layers
    sequence: tuple[str, ...] = ("context", "tensor")  # the sequence between them: norms and residuals
    embed: tuple[str, ...] = ("fsdp", "expert", "context")  # the width of parameters; not that of activations
    table_embed: tuple[str, ...] = ("stage", "fsdp", "expert", "context")  # the same of what no stage holds: embeddings
    expert_embed: tuple[str, ...] = ("fsdp", "context")  # the same of experts
    layers: tuple[str, ...] = ("stage",)
    microbatches: tuple[str, ...] = ("stage",)  # of what leaves the pipeline
    experts: tuple[str, ...] = ("expert",)
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
    """The mesh over `devices` (default: all), see mesh_sizes."""
    devices = jax.devices() if devices is None else devices
    slices = num_slices(devices)
    sizes = mesh_sizes(parallel, len(devices), slices)
    shape = tuple(sizes.values())
    # An axis may take a part of a dimension of a TPU's torus: `tensor` of 4 in a row of 16 chips.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across = "replica" if sizes["replica"] % slices == 0 else "stage"
        over_slices = tuple(slices if axis == across else 1 for axis in AXES)
        within = tuple(size // n for size, n in zip(shape, over_slices, strict=True))
        placed = mesh_utils.create_hybrid_device_mesh(within, over_slices, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, (jax.sharding.AxisType.Explicit,) * len(AXES))


def num_slices(devices: list[jax.Device]) -> int:
    """Of TPUs: links within one are much faster than between them. What JAX calls so of GPUs are hosts."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def mesh_sizes(parallel: Parallel, num_devices: int, slices: int = 1) -> dict[str, int]:
    """{axis: size}. parallel.fsdp=None takes all devices that the other axes leave. Raises UserError if the product is
    not their number, or an axis other than `replica` or `stage` would go over the slow links between slices."""
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    sizes["fsdp"] = 1
    sizes["fsdp"] = parallel.fsdp or max(1, num_devices // math.prod(sizes.values()))
    if math.prod(sizes.values()) != num_devices:
        raise UserError(_no_such_mesh(sizes, num_devices))
    if sizes["replica"] % slices and sizes["stage"] % slices:
        raise UserError(
            f"parallel.replica={parallel.replica} or parallel.stage={parallel.stage} must divide by the {slices} "
            f"slices the devices lie in: other axes are too slow across slices; try parallel.replica={slices}"
        )
    return sizes


def _no_such_mesh(sizes: dict[str, int], num_devices: int) -> str:
    given = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1 or axis == "fsdp")
    message = f"parallel: {given} must be the number of devices, {num_devices}"
    others = math.prod(size for axis, size in sizes.items() if axis != "fsdp")
    if num_devices % others == 0:
        return f"{message}; try parallel.fsdp={num_devices // others}, or leave it out"
    # The axis whose nearest fitting size is nearest, in ratio, to the one given.
    changes = []
    for axis, size in sizes.items():
        if axis == "fsdp" or size == 1:
            continue
        rest = others // size
        fitting = [n for n in range(1, num_devices + 1) if num_devices % (rest * n) == 0]
        changes += [(abs(math.log(n / size)), axis, n, num_devices // (rest * n)) for n in fitting]
    if not changes:
        return f"{message}; try parallel.fsdp={num_devices} and 1 for all others"
    _, axis, nearest, fsdp = min(changes)
    return f"{message}; the nearest mesh that fits has parallel.{axis}={nearest} and parallel.fsdp={fsdp}"


def require_divisible(mesh: jax.sharding.Mesh, rules: Rules, sizes: dict[str, tuple[int, str]]) -> None:
    """Raises UserError where a size does not divide by its shards. sizes: {field: (value, logical dimension)}."""
    problems = []
    for field, (value, name) in sizes.items():
        axes = tuple(axis for axis in getattr(rules, name) if mesh.shape[axis] > 1)
        shards = num_shards(mesh, axes)
        if value % shards:
            nearest = max(1, round(value / shards)) * shards
            problems.append(
                f"{field}={value} must divide by the {shards} shards of mesh axes {', '.join(axes)}; "
                f"try {nearest}, or another parallel.{axes[-1]}"
            )
    if problems:
        raise UserError("\n".join(problems))


def require_balanced(mesh: jax.sharding.Mesh, rules: Rules, length: int) -> None:
    """Raises UserError if a row of so many tokens cannot be laid out so that all its shards have equal work."""
    shards = num_shards(mesh, rules.length)
    parts = 2 * shards
    if shards > 1 and length % parts:
        raise UserError(
            f"train.sequence_length={length} must divide by {parts}, twice parallel.context={shards}: each shard has "
            f"two parts of a row, which makes their work equal; try {max(1, round(length / parts)) * parts}"
        )


def replicated(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    return jax.NamedSharding(mesh, jax.P())


def blocks_gather(mesh: jax.sharding.Mesh, rules: Rules) -> bool:
    """Whether the blocks must gather weights or activations."""
    return num_shards(mesh, rules.embed) > 1 or num_shards(mesh, rules.sequence) > 1


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


def num_shards(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> int:
    """What a dimension that these axes shard must divide by."""
    return math.prod(mesh.shape[axis] for axis in axes)
