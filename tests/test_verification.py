"""What lies on the disk against what was saved, read without JAX; and the rule of what stays."""

import concurrent.futures
import itertools
import json
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.safety import verification
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.safety.verification import Verifier, changed_arrays, kept

NEVER = threading.Event()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory of a step, its record, its arrays) on 4 x 2 devices: sharded in both dimensions, in one, in none."""
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    specs = {"a/both": P("fsdp", "tensor"), "a/second": P(None, "tensor"), "none": P()}
    arrays = {
        name: {
            dtype.__name__: (rng.standard_normal((64, 48)) * 50).astype(np.int32).astype(dtype)
            for dtype in (np.float32, jnp.bfloat16, np.int8, np.bool_)
        }
        for name in specs
    } | {"count": {"step": np.int32(7), "row": np.arange(3, dtype=np.uint32)}}
    placed = {
        name: jax.device_put(tree, NamedSharding(mesh, specs[name] if name in specs else P()))
        for name, tree in arrays.items()
    }
    directory = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(1, {"state": placed, "other": {"w": placed["none"]["int8"]}}, {})
    checkpoints.close()
    return epath.Path(directory / "1"), checkpoints.record(1), arrays


def test_what_was_saved_is_there(saved):
    directory, record, _ = saved
    names = sorted(f"{item}/{name}" for item, digests in record["digests"].items() for name in digests)
    assert len(names) == 15 and "state/a/both/bfloat16" in names and "state/count/step" in names
    assert changed_arrays(directory, record, NEVER) == []


def test_every_other_digest_and_shape_is_seen_in_one_part(saved):
    directory, record, _ = saved
    for item, digests in record["digests"].items():
        for name, digest in digests.items():
            for key, other in (("digests", f"{int(digest, 16) ^ 1:016x}"), ("shapes", "float16[3]")):
                changed = json.loads(json.dumps(record))
                changed[key][item][name] = other
                found = [changed_arrays(directory, changed, NEVER, part=part, parts=3) for part in range(3)]
                assert sorted(found) == [[], [], [f"{item}/{name}"]]


def test_a_flipped_bit_on_the_disk(saved, tmp_path):
    directory, record, arrays = saved
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "1"))
    shard = arrays["a/both"]["float32"][16:32, 24:].tobytes()
    (path,) = [path for path in copy.glob("**/d/*") if shard in path.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.find(shard) + 100] ^= 8
    path.write_bytes(content)
    assert changed_arrays(epath.Path(copy), record, NEVER) == ["state/a/both/float32"]
    path.unlink()
    with pytest.raises(ValueError) as error:
        changed_arrays(epath.Path(copy), record, NEVER)
    assert verification.is_damage(error.value)


def test_stops(saved):
    directory, record, _ = saved
    stop = threading.Event()
    stop.set()
    with pytest.raises(concurrent.futures.CancelledError):
        changed_arrays(directory, record, stop)


def test_a_step_that_cannot_be_read_is_told_and_tried_again(capsys):
    answers = iter([OSError("PERMISSION_DENIED: no"), None])

    def damage_of(step, stop):
        if error := next(answers):
            raise error

    verifier = Verifier(damage_of)
    for want in (verification.UNKNOWN, verification.INTACT):
        verifier.begin(5)
        verifier.wait()
        assert verifier.finding(5) == want
    verifier.close()
    message = capsys.readouterr().err
    assert message == "checkpoint of step 5 could not be verified: OSError: PERMISSION_DENIED: no\n"


def test_kept():
    steps = [4, 8, 12, 16, 20]
    none = dict.fromkeys(steps)
    assert kept(steps, set(), none, newest=2) == set(steps)
    assert kept(steps, {20}, none, newest=2) == set(steps)
    assert kept(steps, {4, 8}, none, newest=2) == set(steps)
    assert kept(steps, {4, 8, 12, 16}, none, newest=2) == {12, 16, 20}
    assert kept(steps, {*steps, 24}, none, newest=2) == {16, 20}
    assert kept(steps, {8, 20}, none, newest=2) == {8, 12, 16, 20}
    assert kept(steps, set(steps), none, newest=1, every=8) == {8, 16, 20}
    losses = {4: 2.0, 8: 1.0, 12: None, 16: 3.0, 20: 4.0}
    assert kept(steps, set(steps), losses, newest=1, best=1) == {8, 20}
    assert kept(steps, set(steps), losses, newest=1, best=3) == {4, 8, 16, 20}
    assert kept(steps, set(steps), losses, newest=1, best=9) == {4, 8, 16, 20}
    assert kept(steps, {20}, losses, newest=1, best=1) == {4, 8, 16, 20}  # lower than the one that is verified
    assert kept(steps, {16, 20}, losses, newest=1, best=1) == {4, 8, 16, 20}
    assert kept(steps, {4, 20}, losses, newest=1, best=1) == {4, 8, 20}


def test_whatever_is_verified_what_shall_stay_is_there():
    """By brute force: no set of verified steps lets a step go that the rule wants when all are verified, and what is
    there holds as many verified ones as the rule wants, or everything."""
    steps = list(range(5))
    rng = np.random.default_rng(0)
    for _ in range(30):
        losses = {step: float(rng.integers(3)) if rng.random() < 0.7 else None for step in steps}
        for newest, best, size in itertools.product((1, 2, 3), (None, 1, 2), range(6)):
            final = kept(steps, set(steps), losses, newest=newest, best=best)
            for verified in map(set, itertools.combinations(steps, size)):
                stay = kept(steps, verified, losses, newest=newest, best=best)
                assert final <= stay
                assert len(stay & verified) >= newest or stay == set(steps)
