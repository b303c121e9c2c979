"""A digest of each array, computed where the array lies: the proof that what was restored is what was saved.

Orbax restores a file with a flipped bit without a word, so the digest goes into the checkpoint beside the arrays. It
does not depend on the mesh or the number of hosts: every element is mixed with its global index, and the sum of the
mixed values modulo 2^32 is the same in any order. A change of any one element is always found, since the mixing is
one-to-one; other damage escapes with a probability of about 2^-64, as there are two such sums.

The same sums in numpy, block by block, are there to check what lies on the disk without a device.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
BLOCK = 2**16  # elements digested at once in numpy: in the cache of a core, 1.7 times as fast as 16 MB


def digests(arrays: dict[str, jax.Array]) -> dict[str, str]:
    """16 hexadecimal digits per array. All hosts must call it; all get the same answer.

    The arrays have elements of at most 4 bytes (float32, bfloat16, int32, uint32, bool, ...), sharded in any way.
    """
    # One after the other: simulated devices of one CPU share its threads, and programs with collectives that are under
    # way at once have taken them from each other for ever (JAX 0.10.2, 2 devices on 2 cores).
    return {name: hexadecimal(jax.device_get(_sum(array))) for name, array in arrays.items()}


def hexadecimal(words: np.ndarray) -> str:
    return "".join(f"{int(word):08x}" for word in words)


def block_sums(block: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """uint32[2] for each piece of the block that begins at index `start` of an array of the shape. The sum of all of
    them modulo 2^32, over the blocks of the whole array, is its digest.

    Needs no device and a few MB of memory, and leaves the interpreter to other threads nearly all of the time.
    """
    bits = block.view(f"uint{8 * block.itemsize}")
    if bits.size > BLOCK:
        axis = next(axis for axis, size in enumerate(bits.shape) if size > 1)
        rows = max(1, BLOCK * bits.shape[axis] // bits.size)
        for row in range(0, bits.shape[axis], rows):
            piece = bits[(slice(None),) * axis + (slice(row, row + rows),)]
            yield from block_sums(piece, (*start[:axis], start[axis] + row, *start[axis + 1 :]), shape)
        return
    mixed = np.ones(bits.shape or 1, np.uint32)  # the index + 1, modulo 2^32
    stride = 1
    for axis in reversed(range(len(shape))):
        places = (start[axis] + np.arange(bits.shape[axis])) * stride % 2**32
        mixed += places.astype(np.uint32).reshape(-1, *[1] * (len(shape) - 1 - axis))
        stride = stride * shape[axis] % 2**32
    _mix_in_place(mixed)
    mixed *= np.uint32(0x9E3779B9)
    mixed += bits
    _mix_in_place(mixed)
    first = mixed.sum(dtype=np.uint32)
    mixed ^= np.uint32(0x5BD1E995)
    _mix_in_place(mixed)
    yield np.array([first, mixed.sum(dtype=np.uint32)])


def _mix_in_place(words: np.ndarray) -> None:
    """As _mix."""
    shifted = np.empty_like(words)
    for bits, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        np.right_shift(words, np.uint32(bits), out=shifted)
        words ^= shifted
        words *= np.uint32(factor)
    np.right_shift(words, np.uint32(16), out=shifted)
    words ^= shifted


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
