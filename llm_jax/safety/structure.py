"""What a checkpoint holds, by name: shapes and types of its arrays, as its record says them."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.config import UserError
from llm_jax.safety.verification import few


def named_leaves(tree) -> dict[str, object]:
    """The leaves of a tree by name: attributes, keys and indices of the path, joined by "/", in the order of the tree.

    The last `.value` of a path is left out: it is how a parameter module holds its array.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert name not in leaves, f"two arrays are named {name}"
        leaves[name] = leaf
    return leaves


def shape(array) -> str:
    """Such as float32[4,256]."""
    return f"{np.dtype(array.dtype).name}[{','.join(map(str, array.shape))}]"


def structs(shapes: dict[str, str]) -> dict[str, jax.ShapeDtypeStruct]:
    """The inverse of shape, for all arrays of an item."""

    def struct(text: str) -> jax.ShapeDtypeStruct:
        dtype, _, sizes = text.rstrip("]").partition("[")
        return jax.ShapeDtypeStruct(tuple(map(int, sizes.split(",") if sizes else ())), jnp.dtype(dtype))

    return {name: struct(shape) for name, shape in shapes.items()}


def concrete(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding:
    """With devices: what has none, or an abstract mesh, goes to the current mesh; without one, to the first device."""
    mesh = jax.sharding.get_mesh()
    if sharding is None and mesh.empty:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if sharding is None:  # jax.eval_shape leaves it open for constants, such as a counter that begins at 0
        return NamedSharding(mesh, PartitionSpec())
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        return NamedSharding(mesh, sharding.spec)
    return sharding


def require_same_shapes(directory: epath.Path, saved: dict[str, dict[str, str]], wanted: dict[str, dict]) -> None:
    problems = []
    for item, leaves in wanted.items():
        if item not in saved:
            raise UserError(f"checkpoint {directory} has no item {item!r}, only {sorted(saved)}")
        have, want = saved[item], {name: shape(leaf) for name, leaf in leaves.items()}
        lines = collections.defaultdict(list)
        for name in sorted(have | want):
            if name not in have:
                lines["missing from the checkpoint"].append(f"{name} {want[name]}")
            elif name not in want:
                lines["unknown to this model"].append(f"{name} {have[name]}")
            elif have[name] != want[name]:
                lines["of another shape or type"].append(f"{name} is {have[name]}, not {want[name]}")
        problems += [f"{item} {kind}: {few(names)}" for kind, names in lines.items()]
    if problems:
        raise UserError(f"checkpoint {directory} is of another model or optimizer; " + "; ".join(problems))
