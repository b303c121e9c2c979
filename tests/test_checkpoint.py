"""Checkpoints against damage of every kind: what comes back is bit for bit what was saved, or it is refused."""

import collections
import concurrent.futures
import math
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.config import RunFailed, UserError
from llm_jax.safety import checkpoint
from llm_jax.safety.checkpoint import Checkpoints, SaveFailed
from llm_jax.safety.structure import named_leaves


class Moments(typing.NamedTuple):
    count: jax.Array
    mu: dict
    value: tuple


def numbers(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    wq = rng.standard_normal((16, 8, 32)).astype(np.float32)
    wq.flat[:3] = [3e38, -0.0, 1e-42]
    return {
        "parameters": {"blocks": {"wq": wq, "scale": wq[0, :, 0].astype(jnp.bfloat16)}, "layers": [wq[1], wq[2]]},
        "optimizer": (
            Moments(np.int32(seed), {"wq": rng.integers(-(2**31), 2**31, (16, 8), dtype=np.int32)}, ()),
            {"seen": rng.integers(0, 2**32, (8,), dtype=np.uint32), "mask": wq[3] > 0, "ok": np.bool_(True)},
        ),
    }


def placed(tree, mesh, axis="fsdp"):
    """On a mesh: every matrix split along its first dimension."""
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(axis) if np.ndim(a) > 1 else P())), tree)


def abstract(tree, mesh, axis="fsdp"):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            np.shape(a), a.dtype, sharding=NamedSharding(mesh, P(None, axis) if np.ndim(a) > 1 else P())
        ),
        tree,
    )


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("fsdp",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2 of different numbers; to be copied, not changed."""
    directory = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(directory, keep=3)
    for step in (1, 2):
        checkpoints.save(step, placed(numbers(step), jax.make_mesh((8,), ("fsdp",))), {"position": 100 * step})
    checkpoints.close()
    return directory


def copied(saved, tmp_path, name="copy"):
    return pathlib.Path(shutil.copytree(saved, tmp_path / name))


def data_files(step: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold numbers of arrays (the rest are small indices)."""
    return sorted(path for path in step.glob("*/**/d/*") if path.stat().st_size > 1000)


def test_names():
    class Layer(nnx.Module):
        def __init__(self):
            self.wq = nnx.Param(jnp.zeros(2))
            self.value = nnx.Param(jnp.zeros(3))
            self.parts = nnx.List([nnx.Param(jnp.zeros(4))])

    tree = {"layer": Layer(), "moments": (Moments(jnp.zeros(()), {"a": jnp.zeros(5)}, ()),)}
    shapes = {name: leaf.shape for name, leaf in named_leaves(tree).items()}
    assert shapes == {
        "layer/parts/0": (4,), "layer/value": (3,), "layer/wq": (2,), "moments/0/count": (), "moments/0/mu/a": (5,)
    }  # fmt: skip


@pytest.mark.parametrize("shape, axes, axis", [((4, 2), ("fsdp", "tensor"), "tensor"), ((1,), ("fsdp",), "fsdp")])
def test_round_trip_to_another_mesh(tmp_path, mesh, shape, axes, axis):
    want = numbers()
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
        assert checkpoints.restore({}) is None and checkpoints.latest() is None and checkpoints.steps() == []
        checkpoints.save(5, placed(want, mesh), {"position": 17, "fingerprint": {"seed": 0.1}})
        checkpoints.close()
    other = jax.make_mesh(shape, axes)
    with jax.set_mesh(other):
        reader = Checkpoints(tmp_path / "checkpoints")
        step, got, meta = reader.restore({item: abstract(tree, other, axis) for item, tree in want.items()})
    assert step == 5 and meta["position"] == 17 and meta["fingerprint"] == {"seed": 0.1} and meta["step"] == 5
    assert_same_bits(got, want)
    wq = got["parameters"]["blocks"]["wq"]
    assert wq.sharding == NamedSharding(other, P(None, axis)), wq.sharding


def test_restores_what_eval_shape_says_of_a_module(tmp_path):
    class Layer(nnx.Module):
        def __init__(self, key):
            self.wq = nnx.Param(jax.random.normal(key, (8, 4), out_sharding=P("fsdp", "tensor")))

    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tensor"))):
        layer = jax.jit(Layer)(jax.random.key(0))
        checkpoints = Checkpoints(tmp_path, keep=1)
        checkpoints.save(1, {"parameters": layer}, {})
        checkpoints.close()
        target = jax.eval_shape(Layer, jax.random.key(0))
        _, got, _ = Checkpoints(tmp_path).restore({"parameters": target})
    assert isinstance(got["parameters"], Layer)
    assert got["parameters"].wq[...].sharding == layer.wq[...].sharding
    assert_same_bits(got["parameters"], layer)


def test_arrays_may_be_overwritten_once_save_returns(tmp_path, mesh):
    with jax.set_mesh(mesh):
        state = placed({"w": np.arange(2**20, dtype=np.float32).reshape(1024, 1024)}, mesh)
        checkpoints = Checkpoints(tmp_path, keep=5)
        update = jax.jit(lambda state: jax.tree.map(lambda w: w * -2, state), donate_argnums=0)
        for step in range(3):
            checkpoints.save(step, {"state": state}, {})
            for _ in range(3):
                state = update(state)
        checkpoints.close()
        for step in range(3):  # the digest, taken before, is checked too
            _, got, _ = checkpoints.restore({"state": abstract(state, mesh)}, step=step)
            want = np.arange(2**20, dtype=np.float32).reshape(1024, 1024) * np.float32(-8) ** step
            np.testing.assert_array_equal(got["state"]["w"], want)


def numbers_in(step: pathlib.Path, tree) -> list[tuple[pathlib.Path, int]]:
    """(file, offset) of every byte of the arrays with at least 1000 elements, found by looking for their shards."""
    places = []
    for array in jax.tree.leaves(tree):
        for shard in np.split(array, 8) if np.size(array) > 1000 else ():
            found = [(path, path.read_bytes().find(shard.tobytes())) for path in data_files(step)]
            ((path, start),) = [place for place in found if place[1] >= 0]
            places += [(path, start + i) for i in range(shard.nbytes)]
    return places


@pytest.mark.parametrize("where", ["numbers", "anywhere"])
def test_every_flipped_bit_is_found(saved, tmp_path, mesh, capfd, where):
    """40 in the numbers: each must be found. 20 in any file of the step: found, or without an effect."""
    rng = np.random.default_rng(0)
    targets = {item: abstract(tree, mesh) for item, tree in numbers().items()}
    places = in_numbers = numbers_in(saved / "2", {"wq": numbers(2)["parameters"]["blocks"]["wq"]})
    assert len(in_numbers) == 16 * 8 * 32 * 4
    if where == "anywhere":
        files = [path for path in sorted((saved / "2").glob("**/*")) if path.is_file()]
        places = [(path, offset) for path in files for offset in range(path.stat().st_size)]
    for trial in range(40 if where == "numbers" else 20):
        directory = copied(saved, tmp_path, str(trial))
        source, offset = places[rng.integers(len(places))]
        path = directory / source.relative_to(saved)
        content = bytearray(path.read_bytes())
        content[offset] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        step, got, meta = Checkpoints(directory, keep=3).restore(targets)
        assert meta["position"] == 100 * step
        assert_same_bits(got, numbers(step))
        message = capfd.readouterr().err
        assert step == 1 or (source, offset) not in in_numbers
        if step == 1:
            assert (directory / "2.bad").exists() and Checkpoints(directory).steps() == [1]
            assert message.count("\n") == 1 and "2 is damaged and renamed to 2.bad" in message
        else:
            assert message == ""


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "deleted", "manifest", "no item", "empty step", "meta deleted", "meta flipped"]
)
def test_other_damage_is_found(saved, tmp_path, mesh, damage):
    directory = copied(saved, tmp_path)
    (directory / "2.bad").mkdir()
    step, path = directory / "2", data_files(directory / "2")[0]
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "deleted":
        path.unlink()
    elif damage == "manifest":
        (step / "parameters" / "manifest.ocdbt").unlink()
    elif damage == "no item":
        shutil.rmtree(step / "optimizer")
    elif damage == "empty step":
        shutil.rmtree(step)
        step.mkdir()
    elif damage == "meta deleted":
        (step / "meta" / "metadata").unlink()
    elif damage == "meta flipped":  # still JSON, another data position
        text = (step / "meta" / "metadata").read_text()
        (step / "meta" / "metadata").write_text(text.replace('"position": 200', '"position": 300'))
    found, got, _ = Checkpoints(directory, keep=3).restore({i: abstract(t, mesh) for i, t in numbers().items()})
    assert found == 1
    assert_same_bits(got, numbers(1))
    assert (directory / "2.bad.1").exists() and not step.exists()


def test_all_damaged_or_one_asked_for_is_an_error(saved, tmp_path, mesh):
    directory = copied(saved, tmp_path)
    targets = {"optimizer": abstract(numbers()["optimizer"], mesh)}
    os.truncate(directory / "2" / "optimizer" / "manifest.ocdbt", 7)
    checkpoints = Checkpoints(directory, keep=3)
    with pytest.raises(UserError, match="2 is damaged .*choose another step"):
        checkpoints.restore(targets, step=2)
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*\[1, 2\]"):
        checkpoints.restore(targets, step=3)
    assert checkpoints.restore(targets, step=1)[0] == 1
    assert Checkpoints(directory).restore(targets)[0] == 1 and (directory / "2").exists()  # reading renames nothing
    os.truncate(directory / "1" / "optimizer" / "manifest.ocdbt", 7)
    for reader in (Checkpoints(directory), checkpoints, checkpoints):
        with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
            reader.restore(targets)
    assert sorted(p.name for p in directory.iterdir()) == ["1.bad", "2.bad"]


def test_only_the_named_items_are_read(saved, tmp_path, mesh):
    directory = copied(saved, tmp_path)
    shutil.rmtree(directory / "2" / "optimizer")
    step, got, _ = Checkpoints(directory).restore({"parameters": abstract(numbers()["parameters"], mesh)})
    assert step == 2 and list(got) == ["parameters"]
    assert_same_bits(got["parameters"], numbers(2)["parameters"])


def test_another_tree_is_refused_with_a_diff(saved, tmp_path, mesh):
    target = abstract(numbers()["parameters"], mesh)
    target["blocks"]["wk"] = target["blocks"].pop("wq")
    target["blocks"]["scale"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    target["layers"][1] = jax.ShapeDtypeStruct((8, 31), jnp.float32)
    directory = copied(saved, tmp_path)
    with pytest.raises(UserError) as error:
        Checkpoints(directory, keep=3).restore({"parameters": target})
    message = str(error.value)
    assert "\n" not in message
    assert "parameters missing from the checkpoint: blocks/wk float32[16,8,32]" in message
    assert "parameters unknown to this model: blocks/wq float32[16,8,32]" in message
    assert "blocks/scale is bfloat16[8], not float32[8], layers/1 is float32[8,32], not float32[8,31]" in message
    with pytest.raises(UserError, match="no item 'ema', only"):
        Checkpoints(directory).restore({"ema": target})
    assert Checkpoints(directory).steps() == [1, 2]


def test_keeps_the_newest_and_every_so_many(tmp_path, mesh):
    state = placed({"w": np.zeros((8, 8), np.float32)}, mesh)
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, {"state": state}, {})
    checkpoints.save(7, {"state": state}, {})  # saved already
    checkpoints.close()
    assert checkpoints.steps() == [4, 6, 7] and checkpoints.latest() == 7
    again = Checkpoints(tmp_path, keep=1)
    again.save(8, {"state": state, "without arrays": ((), {})}, {})
    again.close()
    assert again.restore({"without arrays": ((), {})})[1] == {"without arrays": ((), {})}
    assert again.steps() == [8]


@pytest.fixture
def verification(monkeypatch):
    """Verifications wait for release.set(); started[step] is set when that of a step has begun."""
    release, started = threading.Event(), collections.defaultdict(threading.Event)

    def changed_arrays(directory, *arguments, **options):
        started[int(directory.name)].set()
        assert release.wait(60)
        return read(directory, *arguments, **options)

    read = checkpoint.changed_arrays
    monkeypatch.setattr(checkpoint, "changed_arrays", changed_arrays)
    yield types.SimpleNamespace(release=release, started=started)
    release.set()


def test_nothing_is_deleted_before_its_successor_is_verified(tmp_path, mesh, verification):
    state = placed({"w": np.zeros((8, 8), np.float32)}, mesh)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(1, 5):
        checkpoints.save(step, {"state": state}, {})  # does not wait for the verification of the one before
    checkpoints.wait()
    assert verification.started[1].wait(60) and checkpoints.steps() == [1, 2, 3, 4]
    verification.release.set()
    checkpoints._verifier.wait()
    checkpoints.save(5, {"state": state}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 5]
    checkpoints.close()
    assert checkpoints.steps() == [5]


def test_without_time_for_verification(tmp_path, mesh, verification):
    state = placed({"w": np.zeros((8, 8), np.float32)}, mesh)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"state": state}, {})
    checkpoints.save(2, {"state": state}, {})
    assert verification.started[1].wait(60)
    threading.Timer(0, verification.release.set).start()  # what reads at this moment ends at its next block
    checkpoints.close(verify=False)
    assert Checkpoints(tmp_path).steps() == [1, 2]
    again = Checkpoints(tmp_path, keep=1)
    again.close()
    assert again.steps() == [2]


@pytest.mark.parametrize("end", ["save", "close"])
def test_damage_found_after_the_save(tmp_path, mesh, capfd, verification, end):
    """The disk does not keep what was written: told in a line, renamed, not counted, and the run goes on."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, placed(numbers(step), mesh), {})
    checkpoints.wait()
    ((path, offset), *_) = numbers_in(tmp_path / "3", {"wq": numbers(3)["parameters"]["blocks"]["wq"]})
    content = bytearray(path.read_bytes())
    content[offset + 9] ^= 1
    path.write_bytes(content)
    verification.release.set()
    checkpoints._verifier.wait()
    if end == "save":
        checkpoints.save(4, placed(numbers(4), mesh), {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]  # 2 is the newest verified one when 4 is saved
        checkpoints.save(3, placed(numbers(33), mesh), {})
    checkpoints.close()
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and "/3 is damaged and renamed to 3.bad: changed since it was saved: " in message
    assert (tmp_path / "3.bad").exists() and checkpoints.steps() == ([4] if end == "save" else [2])


def test_a_step_of_an_earlier_process_is_verified_when_needed(saved, tmp_path, mesh, capfd):
    directory = copied(saved, tmp_path)
    os.truncate(data_files(directory / "2")[0], 100)
    checkpoints = Checkpoints(directory, keep=2)
    checkpoints.save(3, placed(numbers(3), mesh), {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 3] and (directory / "2.bad").exists()
    assert capfd.readouterr().err.count("\n") == 1


def test_keeps_the_best(tmp_path, mesh):
    state = placed({"w": np.zeros((8, 8), np.float32)}, mesh)
    losses = {1: 5.0, 2: 3.0, 3: np.float32(2.0), 4: math.nan, 5: 2.5, 6: None, 7: -math.inf, 8: 4.0}
    first = Checkpoints(tmp_path, keep=1, keep_best=2)
    for step, loss in losses.items():
        first.save(step, {"state": state}, {}, held_out_loss=loss)
    first.close()
    assert first.steps() == [3, 5, 8]
    assert [first.record(step)["held_out_loss"] for step in (3, 5, 8)] == [2.0, 2.5, 4.0]
    again = Checkpoints(tmp_path, keep=1, keep_best=2)
    again.save(9, {"state": state}, {}, held_out_loss=2.25)
    again.save(10, {"state": state}, {})
    again.close()
    assert again.steps() == [3, 9, 10]
    assert again.record(10)["held_out_loss"] is None


KILLED = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from llm_jax.safety.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=3)
checkpoints.save(1, {"state": {"w": jnp.full((64, 1024), 1.0)}}, {})
checkpoints.wait()
checkpoints.save(2, {"state": {f"w{i}": jnp.full((1024, 1024), i + 2.0) for i in range(32)}}, {})
print("saving", flush=True)
checkpoints.close()
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"saving\n"
    while process.poll() is None and not any(
        path.stat().st_size > 2**20 for path in tmp_path.glob("2.*/**/d/*") if path.exists()
    ):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    leftovers = [path.name for path in tmp_path.iterdir()]
    assert sorted(leftovers)[0] == "1" and sorted(leftovers)[1].startswith("2.orbax"), leftovers

    target = {"state": {"w": jax.ShapeDtypeStruct((64, 1024), jnp.float32)}}
    checkpoints = Checkpoints(tmp_path, keep=3)
    step, got, _ = checkpoints.restore(target)
    assert step == 1 and (np.asarray(got["state"]["w"]) == 1).all()
    checkpoints.save(2, got, {"again": True})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert checkpoints.restore(target)[2]["again"]


def test_what_is_not_finite_is_not_saved(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"state": placed({"w": np.ones((16, 8), np.float32)}, mesh)}, {})
    for value in (np.nan, -np.inf):
        wrong = np.ones((16, 8), np.float32)
        wrong[9, 3] = value
        with pytest.raises(RunFailed, match="step 2 made state/v NaN or infinite"):
            checkpoints.save(2, {"state": placed({"v": wrong, "w": np.ones((16, 8), np.float32)}, mesh)}, {})
    checkpoints.close()
    assert checkpoints.steps() == [1]


def test_a_slow_disk_holds_up_only_the_next_save(tmp_path, mesh, monkeypatch):
    """A save that does not come to an end: the loop goes on, what is there can be read, and the next save waits."""
    disk_answers, asked = threading.Event(), threading.Event()
    rename = type(Checkpoints(tmp_path).directory).rename

    def slow_rename(path, target):
        asked.set()
        assert disk_answers.wait(60)
        return rename(path, target)

    state = placed({"w": np.ones((64, 64), np.float32)}, mesh)
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, {"state": state}, {})
    checkpoints.wait()
    monkeypatch.setattr(type(checkpoints.directory), "rename", slow_rename)
    checkpoints.save(2, {"state": state}, {"number": 2})
    assert asked.wait(60)
    for _ in range(3):
        checkpoints.check()
        assert checkpoints.steps() == [1]
    assert Checkpoints(tmp_path).restore({"state": abstract(state, mesh)})[0] == 1
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        third = executor.submit(checkpoints.save, 3, {"state": state}, {"number": 3})
        assert checkpoints.steps() == [1] and not third.done()
        disk_answers.set()
        third.result()
    checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3]
    assert [checkpoints.record(step)["number"] for step in (2, 3)] == [2, 3]


def test_a_failed_save_is_seen_and_loses_nothing(tmp_path, mesh):
    state = placed({"w": np.ones((1024, 1024), np.float32)}, mesh)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"state": state}, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # as a full disk: a write fails in the background
    try:
        checkpoints.save(2, {"state": state}, {})
        with pytest.raises(SaveFailed) as error:
            while True:
                checkpoints.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint of step 2 could not be saved" in str(error.value) and "\n" not in str(error.value)
    assert "earlier ones are intact: [1]" in str(error.value)
    checkpoints.check()  # told once
    assert checkpoints.restore({"state": abstract(state, mesh)})[0] == 1
    checkpoints.save(2, {"state": state}, {})
    checkpoints.close()
    assert checkpoints.steps() == [2]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with 4 MiB; mount(options) changes it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
        subprocess.run(command, capture_output=True, text=True, check=True)

    if shutil.which("mount") is None:
        pytest.skip("needs the command mount")
    try:
        mount("size=4m")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"only root may mount a small file system here: {error.stderr.strip()}")
    yield disk, mount
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("problem", ["little space", "full while it writes", "read-only"])
def test_saves_fail_until_the_disk_is_mended(small_disk, mesh, monkeypatch, problem):
    disk, mount = small_disk
    directory = disk / "checkpoints"
    states = {step: {"w": np.full((512, 1024), step, np.float32), "n": np.int32(step)} for step in range(1, 6)}

    def save(checkpoints, step):
        checkpoints.save(step, {"state": placed(states[step], mesh)}, {})
        checkpoints.wait()

    checkpoints = Checkpoints(directory, keep=3)
    save(checkpoints, 1)  # 2 MB
    says = {
        "little space": "2,202,013 bytes of space are needed, [12],[0-9]{3},[0-9]{3} are free",
        "full while it writes": "RESOURCE_EXHAUSTED|No space left",
        "read-only": "Read-only file system",
    }[problem]
    if problem == "full while it writes":
        monkeypatch.setattr(checkpoint, "SPACE", 0.0)
    if problem == "read-only":
        mount("remount,size=64m,ro")
    before = sorted(disk.glob("**/*"))
    for failures, step in ((1, 2), (2, 2), (3, 3)):
        with pytest.raises(SaveFailed, match=says) as error:
            save(checkpoints, step)
        assert f"checkpoint of step {step} could not be saved in {directory} (" in str(error.value)
        assert str(error.value).endswith("earlier ones are intact: [1]; free some space or mend the storage")
        assert "\n" not in str(error.value)
        assert checkpoints.failures == failures and sorted(disk.glob("**/*")) == before
        checkpoints.check()  # told once
        step, got, _ = checkpoints.restore({"state": abstract(states[1], mesh)})
        assert step == 1
        assert_same_bits(got["state"], states[1])
    mount("remount,size=64m,rw")
    for step in (3, 4, 5):
        save(checkpoints, step)
        assert checkpoints.failures == 0
        assert_same_bits(checkpoints.restore({"state": abstract(states[step], mesh)})[1]["state"], states[step])
    checkpoints.close()
    assert sorted(path.name for path in directory.iterdir()) == ["3", "4", "5"]


def test_room_is_made_by_what_may_go(small_disk, mesh):
    """On a disk for two, keep=1 needs no third: the older of two goes when the newer is verified."""
    disk, mount = small_disk
    mount("remount,size=5m")
    state = placed({"w": np.ones((512, 1024), np.float32)}, mesh)
    checkpoints = Checkpoints(disk / "checkpoints", keep=1)
    for step in range(1, 5):
        checkpoints.save(step, {"state": state}, {})
        checkpoints.wait()
        checkpoints._verifier.wait()
        assert step in checkpoints.steps()
    checkpoints.close()
    assert checkpoints.steps() == [4]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints to .*/file/checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1)


TWO_PROCESSES = """
import os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
directory, address, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, num_processes=2, process_id=process, initialization_timeout=60)
import jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from llm_jax.parallel import hosts
from llm_jax.safety.checkpoint import Checkpoints

def state(seed):
    w = jax.random.normal(jax.random.key(seed), (256, 512), out_sharding=P("fsdp"))
    return {"w": w, "count": jnp.int32(seed)}

with jax.set_mesh(jax.make_mesh((8,), ("fsdp",))):
    checkpoints = Checkpoints(directory, keep=3)
    assert checkpoints.restore({"state": jax.eval_shape(lambda: state(1))}) is None
    for step in (1, 2, 3):
        checkpoints.save(step, {"state": jax.jit(state, static_argnums=0)(step)}, {"position": step})
        checkpoints.check()
    checkpoints.wait()
    if process == 1:
        for name in os.listdir(f"{directory}/3/state/ocdbt.process_1/d"):  # what only process 1 reads
            os.truncate(f"{directory}/3/state/ocdbt.process_1/d/{name}", 5)
    multihost_utils.sync_global_devices("damaged")
    step, restored, meta = checkpoints.restore({"state": jax.eval_shape(lambda: state(1))})
    assert (step, meta["position"]) == (2, 2), step
    want = jax.jit(state, static_argnums=0)(2)["w"]
    assert jax.jit(lambda a, b: jnp.abs(a - b).max())(restored["state"]["w"], want) == 0
    checkpoints.save(3, restored, {"position": 33})
    if process == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    preemption, step = hosts.Preemption(), 4
    while not preemption.reached():
        step += 1
    same = multihost_utils.process_allgather(np.int32(step))
    assert same[0] == same[1] == step, same
    checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3]
    multihost_utils.sync_global_devices("verified")
    if process == 0:  # of the two arrays of step 3, w is in the share of process 1
        folder = f"{directory}/3/state/ocdbt.process_1/d"
        for path in (f"{folder}/{name}" for name in os.listdir(folder)):
            if os.path.getsize(path) > 1000:
                with open(path, "r+b") as file:
                    file.seek(500)
                    file.write(b"damaged")
    multihost_utils.sync_global_devices("damaged again")
    checkpoints = Checkpoints(directory, keep=2)
    checkpoints.save(4, restored, {"position": 44}, held_out_loss=1.0)
    checkpoints.check()
    checkpoints.close()
    assert checkpoints.steps() == [2, 4] == list(checkpoints._manager.all_steps()), checkpoints.steps()
    assert os.path.exists(f"{directory}/3.bad.1")
    print("finished", flush=True)
jax.distributed.shutdown()
"""


def test_two_processes_agree(tmp_path, mesh):
    """The second cannot read its part of step 3; both go back to step 2. Told to stop, both stop at the same step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "checkpoints"), address, str(number)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error for _, error in outputs)
    assert "3 is damaged and renamed to 3.bad.1: as process 1 has found" in outputs[0][1]
    assert all("finished" in output for output, _ in outputs)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3.bad", "3.bad.1", "4"]

    target = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))}
    target["count"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    step, got, meta = Checkpoints(tmp_path / "checkpoints").restore({"state": target})  # one process, other shards
    assert (step, meta["position"], int(got["state"]["count"])) == (4, 44, 2)
