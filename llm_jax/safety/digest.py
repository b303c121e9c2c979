"""A digest of each array, computed where the array lies: the proof that what was restored is what was saved.

Orbax restores a file with a flipped bit without a word, so the digest goes into the checkpoint beside the arrays. It
does not depend on the mesh or the number of hosts: every element is mixed with its global index, and the sum of the
mixed values modulo 2^32 is the same in any order. A change of any one element is always found, since the mixing is
one-to-one; other damage escapes with a probability of about 2^-64, as there are two such sums.
"""

import jax
import jax.numpy as jnp

BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digests(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """16 hexadecimal digits per array. All hosts must call it; all get the same answer.

    The arrays have elements of at most 4 bytes (float32, bfloat16, int32, uint32, bool, ...), sharded in any way.
    """
    sums = jax.device_get({name: _sum(array) for name, array in arrays.items()})
    return {name: "".join(f"{int(word):08x}" for word in words) for name, words in sums.items()}


@jax.jit  # array by array: a parameter and its moments have the same shape and share one compilation
def _sum(array: jax.Array) -> jax.Array:
    """uint32[2], replicated."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, BITS[array.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for dimension, size in enumerate(array.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, dimension)  # modulo 2^32
    mixed = _mix(bits + jnp.uint32(0x9E3779B9) * _mix(index + jnp.uint32(1)))
    return jnp.stack([
        jnp.sum(mixed, dtype=jnp.uint32),
        jnp.sum(_mix(mixed ^ jnp.uint32(0x5BD1E995)), dtype=jnp.uint32),
    ])  # fmt: skip


def _mix(words: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (Austin Appleby, public domain): one-to-one on 32 bits, each bit reaches all."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
