"""The digest against the same sum written in numpy, on several meshes, and against damage."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.safety import digest
from llm_jax.safety.digest import block_sums, digests, examine, hexadecimal


def mix(words):
    words = words ^ (words >> np.uint32(16))
    words = words * np.uint32(0x85EBCA6B)
    words = words ^ (words >> np.uint32(13))
    words = words * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))


def expected(array):
    array = np.asarray(array)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    bits = np.frombuffer(array.tobytes(), unsigned).astype(np.uint32)
    position = np.arange(1, array.size + 1, dtype=np.uint32)
    mixed = mix(bits + np.uint32(0x9E3779B9) * mix(position))
    second = mix(mixed ^ np.uint32(0x5BD1E995))
    return "".join(f"{int(words.astype(np.uint64).sum() % 2**32):08x}" for words in (mixed, second))


def example():
    x = np.random.default_rng(0).standard_normal((16, 8, 24)).astype(np.float32)
    x.flat[:4] = [np.nan, np.inf, -0.0, 1e-42]
    return {
        "float32": x, "bfloat16": x.astype(jnp.bfloat16), "int32": x.view(np.int32), "uint32": x.view(np.uint32)[0],
        "bool": x[0] > 0, "count": np.int32(7), "scale": np.float32(0.5), "vector": x[0, 0],
    }  # fmt: skip


MESHES = {
    "8": ((8,), ("fsdp",), [P("fsdp"), P(None, None, "fsdp")]),
    "4x2": ((4, 2), ("fsdp", "tensor"), [P(("fsdp", "tensor")), P(None, "tensor", "fsdp")]),
}


def test_equals_numpy():
    arrays = example()
    assert digests(jax.tree.map(jnp.asarray, arrays)) == {name: expected(array) for name, array in arrays.items()}


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("name", MESHES)
def test_is_independent_of_the_mesh(name, axis_type):
    shape, axes, specs = MESHES[name]
    mesh = jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(axes))
    arrays = {name: array for name, array in example().items() if name in ("float32", "bfloat16", "count")}
    want = {name: expected(array) for name, array in arrays.items()}
    for spec in specs:
        placed = {
            name: jax.device_put(array, NamedSharding(mesh, spec if array.ndim == 3 else P()))
            for name, array in arrays.items()
        }
        assert digests(placed) == want
        with jax.set_mesh(mesh):
            assert digests(placed) == want


def cut_at_random(shape, rng):
    """(start, end) of blocks that fill a shape."""
    cuts = [sorted({0, size, *rng.integers(0, size + 1, 2).tolist()}) for size in shape]
    for pairs in itertools.product(*(zip(places, places[1:], strict=False) for places in cuts)):
        yield tuple(start for start, _ in pairs), tuple(end for _, end in pairs)


@pytest.mark.parametrize("piece", [1, 7, 2**16])
def test_in_numpy_by_blocks(monkeypatch, piece):
    monkeypatch.setattr(digest, "BLOCK", piece)
    rng = np.random.default_rng(piece)
    for shape in [(), (1,), (300,), (13, 7), (2, 1, 5, 3), (1, 40, 1), (600, 300)][: None if piece > 7 else 6]:
        for dtype in (np.float32, jnp.bfloat16, np.int8, np.bool_, np.uint32):
            array = np.asarray((rng.standard_normal(shape) * 100).astype(np.int32).astype(dtype))
            want = digests({"a": jnp.asarray(array)})["a"]
            sums = np.zeros(2, np.uint32)
            for start, end in cut_at_random(shape, rng):
                block = array[tuple(map(slice, start, end))]
                for add in block_sums(block, start, shape):
                    sums += add
            assert hexadecimal(sums) == want == expected(array)


def test_in_numpy_the_index_may_pass_32_bits():
    """The index of the last element of [2^20, 3, 2^13] is beyond 2^32."""
    shape, start = (2**20, 3, 2**13), (2**20 - 1, 2, 2**13 - 5)
    block = np.arange(5, dtype=np.uint32).reshape(1, 1, 5)
    (sums,) = block_sums(block, start, shape)
    first = (start[0] * 3 + start[1]) * 2**13 + start[2]
    index = np.array([(first + i + 1) % 2**32 for i in range(5)], np.uint32)
    mixed = mix(block.ravel() + np.uint32(0x9E3779B9) * mix(index))
    assert sums.tolist() == [int(mixed.sum(dtype=np.uint32)), int(mix(mixed ^ np.uint32(0x5BD1E995)).sum(dtype="u4"))]


def test_finds_a_flipped_bit_and_a_swap():
    rng = np.random.default_rng(1)
    for dtype in (np.float32, jnp.bfloat16, np.int32):
        array = rng.standard_normal((13, 7)).astype(dtype)
        whole = digests({"a": jnp.asarray(array)})
        for _ in range(30):
            damaged = bytearray(array.tobytes())
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
            flipped = np.frombuffer(bytes(damaged), dtype).reshape(array.shape)
            assert digests({"a": jnp.asarray(flipped)}) != whole
        assert digests({"a": jnp.asarray(array[::-1])}) != whole
        assert digests({"a": jnp.asarray(array.reshape(7, 13))}) == whole  # shapes are kept beside the digest


def test_no_device_holds_a_whole_sharded_array_or_waits_for_another():
    mesh = jax.make_mesh((8,), ("fsdp",))
    array = jax.device_put(np.zeros((4096, 256), np.float32), NamedSharding(mesh, P("fsdp")))
    compiled = digest._sums(mesh, P("fsdp")).lower(array).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < array.nbytes / 8
    assert not re.search("all-|collective|permute", compiled.as_text())


def test_the_index_may_pass_32_bits_on_a_device():
    """As in numpy, above: the last part of [2^20, 3, 2^13]."""
    shape, start = [2**20, 3, 2**13], (2**20 - 1, 2, 2**13 - 5)
    block = np.arange(5, dtype=np.uint32).reshape(1, 1, 5)
    (sums,) = block_sums(block, start, tuple(shape))
    assert digest._sum(jnp.asarray(block), list(start), shape)[:2].tolist() == sums.tolist()


def test_names_arrays_with_an_element_that_is_not_finite():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    largest = {"int32": np.int32(-1), "uint32": np.uint32(2**32 - 1), "bool": np.True_}
    fine, wrong = {}, {}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        fine[f"{dtype.__name__} largest"] = np.full((8, 6), jnp.finfo(dtype).max, dtype)
        fine[f"{dtype.__name__} smallest"] = np.full((8, 6), -jnp.finfo(dtype).tiny, dtype)
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            array = np.ones((8, 6), dtype)
            array[5, 1] = value
            wrong[f"{dtype.__name__} {value} {np.signbit(value)}"] = array
    arrays = fine | wrong | {name: np.broadcast_to(value, (8, 6)) for name, value in largest.items()}
    for spec in (P(), P("fsdp"), P(None, "tensor"), P("tensor", None)):
        placed = jax.tree.map(lambda array, spec=spec: jax.device_put(array, NamedSharding(mesh, spec)), arrays)
        assert set(examine(placed)[1]) == set(wrong)
    assert examine({"scalar": jnp.float32(jnp.nan), "count": jnp.int32(-1)})[1] == ["scalar"]
