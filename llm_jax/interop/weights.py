"""Parameters from and to folders of safetensors files, tensor by tensor.

On the way in, a tensor goes from its file, mapped into memory, to the devices that hold parts of it, in the type of the
file, and becomes float32 there: the host holds a copy of one layer's tensor at most. Pickles are not read: they can run
code.
"""

import collections
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from llm_jax.config import UserError
from llm_jax.interop.families import Family, Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
PLACE = re.compile(r"^blocks/(\d+)/")
BYTES_PER_FILE = 5_000_000_000
# Buffers of old files that are computed, not learned.
BUFFERS = re.compile(r"\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


class Folder:
    """The tensors of a folder, by name. Raises UserError for what is missing, damaged or of a type that is no float."""

    def __init__(self, folder: pathlib.Path, prefix: str):
        """prefix: of most names, such as "model."; files of a model without a head lack it."""
        self.folder = folder
        self._files, self._bytes = {}, {}
        if (folder / INDEX).exists():
            files = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        elif (folder / WEIGHTS).exists():
            files = [WEIGHTS]
        else:
            pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
            what = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no weights"
            raise UserError(f"{folder} holds {what}; {WEIGHTS} or {INDEX} is needed: save the model as safetensors")
        for file in files:
            if not (folder / file).exists():
                raise UserError(f"{folder} lacks {file}, which {INDEX} names; fetch it")
            try:
                opened = safetensors.safe_open(folder / file, "np")
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(f"{folder / file} is no intact safetensors file: {error}; fetch it again") from error
            self._files |= dict.fromkeys(opened.keys(), opened)
            self._bytes |= _mapped(folder / file)
        bare = not any(name.startswith(prefix) for name in self._files)
        self._stored = {prefix + name if bare and name != "lm_head.weight" else name: name for name in self._files}

    @property
    def names(self) -> set[str]:
        return {name for name in self._stored if not BUFFERS.search(name)}

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, type) without reading it."""
        if name not in self._stored:
            raise UserError(f"{self.folder} has no tensor {name}; config.json asks for it")
        found = self._files[self._stored[name]].get_slice(self._stored[name])
        if found.get_dtype() not in DTYPES:
            raise UserError(
                f"{self.folder}: tensor {name} is {found.get_dtype()}; only {', '.join(DTYPES)} are read: import the "
                "unquantised model"
            )
        return tuple(found.get_shape()), found.get_dtype()

    def read(self, name: str) -> np.ndarray:
        """The tensor where it lies in its file: only what is looked at is read."""
        shape, dtype = self.describe(name)
        return self._bytes[self._stored[name]].view(DTYPES[dtype]).reshape(shape)


def _mapped(path: pathlib.Path) -> dict[str, np.ndarray]:
    """{name: bytes}, by the header: https://huggingface.co/docs/safetensors. The library would copy whole tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    return {name: data[slice(*at["data_offsets"])] for name, at in header.items() if name != "__metadata__"}


def load(folder: Folder, family: Family, target: dict[str, jax.ShapeDtypeStruct], sizes: dict[str, int]) -> dict:
    """{name: array} of the family's parameters, sharded as the target, which names all there are. Under a mesh.

    sizes: of the dimensions by their letters. Tensors that are missing, left over or of another shape: UserError.
    """
    table = {row.ours: row for row in family.tensors}
    used = set()
    for name, struct in target.items():  # before the first byte is read
        row = table[_row_of(name)]
        for theirs, _, _ in _tensors(row, _layers(name, struct, sizes), sizes):
            used.add(theirs)
            shape, _ = folder.describe(theirs)
            wanted = their_shape(row, sizes)
            if shape != wanted:
                raise UserError(
                    f"{folder.folder}: tensor {theirs} is {list(shape)}; by config.json it should be {list(wanted)}"
                )
    tied = {"lm_head.weight"} if "head" not in target else set()
    if left := sorted(folder.names - used - tied):
        raise UserError(f"{folder.folder} has tensors that a {family.name} does not have here: {', '.join(left[:4])}")
    # One behind the other: transfers under way would hold copies of the next ones.
    return {
        name: _load(folder, table[_row_of(name)], struct, _layers(name, struct, sizes), sizes).block_until_ready()
        for name, struct in target.items()
    }


def _row_of(name: str) -> str:
    """In the family's table, where the places of a pattern of layers have the same rows."""
    return PLACE.sub("blocks/", name)


def _layers(name: str, stack: jax.Array | jax.ShapeDtypeStruct, sizes: dict[str, int]) -> range:
    """The numbers of the layers in a stack: of those of a place of the pattern, every so many."""
    place = PLACE.match(name)
    return range(int(place[1]), sizes["L"], sizes["L"] // stack.shape[0]) if place else range(sizes["L"])


def _load(folder: Folder, row: Tensor, struct: jax.ShapeDtypeStruct, layers: range, sizes: dict[str, int]) -> jax.Array:
    spec = struct.sharding.spec
    if row.theirs is None:
        return _zeros(struct.shape, struct.dtype, spec)

    theirs = row.theirs

    def part(layer: int | None) -> Callable:
        """What reads a part of our array, of one layer, from their tensor or tensors."""
        if "{E}" not in theirs:
            whole = from_theirs(folder.read(theirs.format(L=layer)), row, sizes)
            return lambda index: whole[index]

        def experts(index):
            chosen = range(*index[0].indices(sizes["E"]))
            names = (theirs.format(L=layer, E=expert) for expert in chosen)
            return np.stack([from_theirs(folder.read(name), row, sizes)[index[1:]] for name in names])

        return experts

    mesh = jax.sharding.get_mesh()
    if "{L}" not in theirs:
        sharding = jax.NamedSharding(mesh, spec)
        return _cast(jax.make_array_from_callback(struct.shape, sharding, part(None)), struct.dtype, row.plus)
    sharding = jax.NamedSharding(mesh, jax.P(*spec[1:]))
    array = _zeros(
        struct.shape, struct.dtype, jax.P(None, *spec[1:])
    )  # written layer by layer, so on no device in part
    for number, layer in enumerate(layers):
        one = jax.make_array_from_callback(struct.shape[1:], sharding, part(layer))
        array = _set_layer(array, one, number, row.plus).block_until_ready()
    return jax.reshard(array, spec)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, spec):
    return jnp.zeros(shape, dtype, out_sharding=spec)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cast(array, dtype, plus):
    array = array.astype(dtype)
    return array + plus if plus else array  # -0.0 + 0 is another number


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _set_layer(stack, layer, number, plus):
    return jax.lax.dynamic_update_index_in_dim(stack, _cast(layer, stack.dtype, plus), number, axis=0)


def save(
    to: pathlib.Path, family: Family, parameters: dict[str, jax.Array], sizes: dict[str, int], dtype: np.dtype
) -> list[str]:
    """Writes all tensors into one file, or into several with an index; the names of the files.

    The host holds those of one file at a time. UserError for a parameter that must be zero, and is not.
    """
    table = {row.ours: row for row in family.tensors}
    tensors = collections.defaultdict(list)  # by their name: (row, array, number of the layer in it, expert)
    for name, array in parameters.items():
        row, layers = table[_row_of(name)], _layers(name, array, sizes)
        if row.theirs is None and np.any(_fetch(array)):
            raise UserError(f"{name} is not zero, and a {family.name} has none")
        for theirs, layer, expert in _tensors(row, layers, sizes):
            number = None if layer is None else layers.index(layer)
            tensors[theirs].append((row, array, number, expert))
    tensors = {name: sorted(parts, key=lambda part: part[0].part) for name, parts in tensors.items()}
    files, room = [[]], BYTES_PER_FILE
    for name, places in tensors.items():
        size = int(np.prod(their_shape(places[0][0], sizes))) * dtype.itemsize
        if size > room and files[-1]:
            files.append([])
            room = BYTES_PER_FILE
        files[-1].append(name)
        room -= size
    names = [WEIGHTS] if len(files) == 1 else [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]  # fmt: skip

    def tensor(name: str) -> np.ndarray:
        parts = []
        for row, array, *numbers in tensors[name]:
            for number in numbers:
                array = array if number is None else _at(array, number)
            parts.append(to_theirs(_fetch(array) - row.plus, row, sizes))
        joined = parts[0] if len(parts) == 1 else _join(parts, tensors[name][0][0], sizes)
        return np.ascontiguousarray(joined.astype(dtype))

    for file, members in zip(names, files, strict=True):
        safetensors.numpy.save_file({name: tensor(name) for name in members}, to / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, members in zip(names, files, strict=True) for name in members}
        total = sum(int(np.prod(their_shape(p[0][0], sizes))) * dtype.itemsize for p in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (to / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        names.append(INDEX)
    return names


def _at(stack: jax.Array, number: int) -> jax.Array:
    return jax.reshard(stack, jax.P(None, *jax.typeof(stack).sharding.spec[1:]))[number]


def _fetch(array: jax.Array) -> np.ndarray:
    return multihost_utils.process_allgather(array, tiled=True)


def _tensors(row: Tensor, layers: range, sizes: dict[str, int]) -> Iterator[tuple[str, int | None, int | None]]:
    """(name, layer, expert) of each of their tensors."""
    if row.theirs is None:
        return
    for layer in layers if "{L}" in row.theirs else (None,):
        for expert in range(sizes["E"]) if "{E}" in row.theirs else (None,):
            yield row.theirs.format(L=layer, E=expert), layer, expert


def their_shape(row: Tensor, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(int(np.prod([_size(letter, sizes) for letter in letters])) for letters in row.their_dims.split())


def from_theirs(tensor: np.ndarray, row: Tensor, sizes: dict[str, int]) -> np.ndarray:
    """A view of their tensor, of one layer and expert, with our dimensions."""
    letters = row.their_dims.replace(" ", "")
    tensor = tensor.reshape([_size(letter, sizes) for letter in letters])
    if "3" in letters:
        tensor, letters = tensor.take(row.part, letters.index("3")), letters.replace("3", "")
    return tensor.transpose([letters.index(letter) for letter in _of_one(row)])


def to_theirs(array: np.ndarray, row: Tensor, sizes: dict[str, int]) -> np.ndarray:
    """The inverse; of a tensor that is one of three, that one, with its letters apart."""
    letters, ours = row.their_dims.replace(" ", "").replace("3", ""), _of_one(row)
    array = array.transpose([ours.index(letter) for letter in letters])
    return array if "3" in row.their_dims else array.reshape(their_shape(row, sizes))


def _join(parts: list[np.ndarray], row: Tensor, sizes: dict[str, int]) -> np.ndarray:
    return np.stack(parts, row.their_dims.replace(" ", "").index("3")).reshape(their_shape(row, sizes))


def _of_one(row: Tensor) -> str:
    """Our dimensions, of one expert."""
    assert row.theirs is not None
    dims = row.dims.replace(" ", "")
    return dims.replace("E", "") if "{E}" in row.theirs else dims


def _size(letter: str, sizes: dict[str, int]) -> int:
    return 3 if letter == "3" else sizes[letter]


def read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a folder as `save_pretrained` writes it is needed") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
