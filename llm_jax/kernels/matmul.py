"""Products of activations with weights.

A weight-times-activation product is one matrix product forward and two backward. On TPU and GPU the compiler takes them
as they stand. XLA's CPU compiler has a fast bfloat16 product, which uses AMX, only for operands that lie as
`[m, k] @ [k, n]` in memory; the two backward products come with one of them transposed, and are then computed in
float32.

M rows, K contracted, N columns
"""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: jax.Array, *, contracted: int = 1, out_sharding: jax.P | None = None) -> jax.Array:
    """Contracts the last `contracted` dimensions of x with as many first ones of w, in their dtype.

    x [..., K...] and w [K..., N...] give [..., N...].
    """
    if not _transposes(x):
        return jnp.tensordot(x, w, axes=contracted, out_sharding=out_sharding)
    rows, columns = x.shape[: x.ndim - contracted], w.shape[contracted:]
    size = math.prod(w.shape[:contracted])
    spec = out_sharding or jax.P(*_spec(x)[: len(rows)], *_spec(w)[contracted:])
    y_MN = _product(unsharded(x).reshape(-1, size), unsharded(w).reshape(size, -1))
    return jax.reshard(y_MN.reshape(*rows, *columns), spec)


def _spec(x):
    return jax.typeof(x).sharding.spec


def unsharded(x: jax.Array) -> jax.Array:
    """Without the names of mesh axes, all of size 1, which would have to be told for every reshape."""
    return jax.reshard(x, jax.P(*[None] * x.ndim))


def has_fast_bfloat16_on_cpu(mesh: jax.sharding.Mesh) -> bool:
    """Whether an update of a dense model takes less time than in float32.

    It does with one device, AMX and JAX 0.12 (docs/performance.md; before 0.12 products are computed in float32, on
    simulated devices the gain is lost). That is asked, not measured at each start: a run that goes on
    must not change its type with the noise of a machine.
    """
    return mesh.size == 1 and jax.__version_info__ >= (0, 12) and _has_amx()


@functools.cache
def _has_amx() -> bool:
    info = pathlib.Path("/proc/cpuinfo")
    return info.exists() and "amx_bf16" in info.read_text("utf-8")


def _transposes(x: jax.Array) -> bool:
    """Whether the compiler's own backward products would be slow."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    return x.dtype == jnp.bfloat16 and mesh.size == 1 and device is not None and device.platform == "cpu"


@jax.custom_vjp
def _product(x_MK, w_KN):
    return x_MK @ w_KN


def _forward(x_MK, w_KN):
    return x_MK @ w_KN, (x_MK, w_KN)


def _backward(operands, d_MN):
    x_MK, w_KN = operands
    return d_MN @ transposed(w_KN), transposed(x_MK) @ d_MN


_product.defvjp(_forward, _backward)


def transposed(x: jax.Array) -> jax.Array:
    """The last two dimensions exchanged in memory, too. The barrier stands before the shape, or the compiler would see
    through it and only rename the dimensions."""
    flat = jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2).reshape(-1))
    return flat.reshape(*x.shape[:-2], x.shape[-1], x.shape[-2])
