"""Copies that differ by one bit on one device are found and named; those that do not, are not."""

import contextlib
import json
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import Parallel
from llm_jax.parallel.sharding import make_mesh
from llm_jax.safety.replicas import disagreeing

RNG = np.random.default_rng(0)
VALUES = {
    "float32": RNG.normal(size=(8, 6)).astype(np.float32),
    "bfloat16": RNG.normal(size=(8, 6)).astype(jnp.bfloat16),
    "int8": RNG.integers(-100, 100, size=(8, 6)).astype(np.int8),
    "bool": RNG.random((8, 6)) < 0.5,
    "float32 scalar": np.float32(np.nan),
    "int32 scalar": np.int32(7),
}
MESH = dict(replica=2, fsdp=2, tensor=2)  # device = 4 * replica + 2 * fsdp + tensor
EIGHT = [f"device {i} of process 0" for i in range(8)]


def place(value, mesh, spec, damaged: dict[int, int]) -> jax.Array:
    """The array, with that bit of the first byte of its part flipped on each of these devices of the mesh."""
    value = np.asarray(value)
    sharding = jax.NamedSharding(mesh, spec if value.ndim else jax.P())
    pieces = []
    places = {device: i for i, device in enumerate(mesh.devices.flat)}
    for device, index in sharding.addressable_devices_indices_map(value.shape).items():
        part = np.array(value[index])
        if places[device] in damaged:
            data = bytearray(part.tobytes())
            data[0] ^= 1 << damaged[places[device]]
            part = np.frombuffer(data, value.dtype).reshape(part.shape)
        pieces.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(value.shape, sharding, pieces)


SPECS = {"replicated": jax.P(), "rows": jax.P("fsdp"), "rows and columns": jax.P("fsdp", "tensor"),
         "columns twice": jax.P(None, ("fsdp", "tensor")), "all": jax.P(("replica", "fsdp", "tensor"))}  # fmt: skip


@pytest.mark.parametrize("under_mesh", [True, False])
def test_equal_copies_are_not_reported(under_mesh):
    mesh = make_mesh(Parallel(**MESH))
    arrays = {
        f"{name} {how}": place(value, mesh, spec, {})
        for name, value in VALUES.items()
        for how, spec in SPECS.items()
        if how != "columns twice"
    }
    with jax.set_mesh(mesh) if under_mesh else contextlib.nullcontext():
        assert disagreeing(arrays) == []


@pytest.mark.parametrize("name", VALUES)
def test_one_bit_on_one_device_of_many(name):
    mesh, bit = make_mesh(Parallel(**MESH)), 0 if VALUES[name].dtype == bool else 6
    arrays = {"sound": place(VALUES[name], mesh, jax.P(), {}), "w": place(VALUES[name], mesh, jax.P(), {3: bit})}
    assert disagreeing(arrays) == [f"w: {EIGHT[3]} differs from {EIGHT[0]}"]


@pytest.mark.parametrize(
    "spec, damaged, lines",
    [
        ("replicated", {0: 1, 5: 1}, [f"{EIGHT[0]} differs from {EIGHT[1]}", f"{EIGHT[5]} differs from {EIGHT[1]}"]),
        ("replicated", {0: 1, 5: 2}, [f"{EIGHT[0]} differs from {EIGHT[1]}", f"{EIGHT[5]} differs from {EIGHT[1]}"]),
        ("rows", {6: 0}, [f"{EIGHT[6]} differs from {EIGHT[2]}"]),  # one of four
        ("rows", {0: 3, 1: 3, 7: 3},
         [f"{EIGHT[0]}, {EIGHT[1]} differs from {EIGHT[4]}, {EIGHT[5]}; no majority tells which is right",
          f"{EIGHT[7]} differs from {EIGHT[2]}"]),
        ("rows and columns", {5: 0}, [f"{EIGHT[1]} differs from {EIGHT[5]}; no majority tells which is right"]),
        ("all", {5: 0}, []),  # no device has a copy
    ],
)  # fmt: skip
def test_each_part_is_compared_with_its_copies(spec, damaged, lines):
    arrays = {"w": place(VALUES["float32"], make_mesh(Parallel(**MESH)), SPECS[spec], damaged)}
    assert disagreeing(arrays) == [f"w: {line}" for line in lines]


def test_every_bit_counts():
    mesh = make_mesh(Parallel(**MESH))
    arrays = {str(bit): place(VALUES["int8"], mesh, jax.P("tensor"), {2: bit}) for bit in range(8)}
    assert disagreeing(arrays) == [f"{bit}: {EIGHT[2]} differs from {EIGHT[0]}" for bit in range(8)]


PROCESS = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]), initialization_timeout=60)
from test_replicas import MESH, SPECS, VALUES, make_mesh, place
from llm_jax.config import Parallel
from llm_jax.safety.replicas import disagreeing
mesh, value = make_mesh(Parallel(**MESH)), VALUES["float32"]
with jax.set_mesh(mesh):
    sound = place(value, mesh, SPECS["rows"], {})
    found = [disagreeing({"sound": sound}),
             disagreeing({"sound": sound, "rows": place(value, mesh, SPECS["rows"], {6: 5}),
                          "both": place(value, mesh, SPECS["rows and columns"], {1: 5})})]
print(json.dumps([found, [[device.id, device.process_index] for device in mesh.devices.flat]]))
jax.distributed.shutdown()
"""


def test_two_processes_compare_across_and_agree():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number)],
            cwd=pathlib.Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error for _, error in outputs)
    (found, devices), other = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    name = [f"device {device} of process {process}" for device, process in devices]
    assert {process for _, process in devices[:4]} == {0} and {process for _, process in devices[4:]} == {1}
    assert [found, devices] == other
    assert found == [
        [],
        [
            f"rows: {name[6]} differs from {name[2]}",
            f"both: {name[1]} differs from {name[5]}; no majority tells which is right",
        ],
    ]
