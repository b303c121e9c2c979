"""Checkpoints that can be trusted: saved beside the training, checked when read, never half restored.

DIRECTORY/STEP/ holds one Orbax item per saved tree, a flat dictionary of arrays under their names
("blocks/attention/wq"), and the item `meta`, a JSON record: what the caller gave, a digest and the shape of every
array, and a checksum of itself. Orbax writes into STEP.orbax-checkpoint-tmp and renames it when complete, so a step is
there as a whole or not at all, however the process ends. TensorStore syncs the files with numbers, Orbax neither the
small ones nor the rename: what a power failure does to a step is found like any other damage, and the step before it
is used.

This is the only file that imports Orbax. Uncompressed, since that saves 4-5 times faster for 8 % more bytes.
"""

import collections
import gc
import hashlib
import itertools
import json
import logging
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from llm_jax.config import UserError
from llm_jax.safety.digest import digests

VERSION = 1  # of the layout described above
META = "meta"
OWN_KEYS = ("step", "version", "digests", "shapes", "checksum")

# What the storage or the machine says although the checkpoint may be sound: not a reason to put a checkpoint aside.
NOT_DAMAGE = (
    "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED",
    "Permission denied", "Too many open files", "Cannot allocate memory",
)  # fmt: skip
# What the user can mend when a save fails.
STORAGE_PROBLEMS = (
    "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "No space left", "File too large", "quota", "Permission denied",
    "Read-only file system", "Not a directory", "NotADirectoryError",
)  # fmt: skip


# Orbax also logs each failure, with pages of traceback; here every failure is raised or reported once, in one line.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def _report_unraisable(unraisable, report=sys.unraisablehook) -> None:
    # When one write fails, Orbax closes the event loop that the other writes under way report to, a page for each.
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


sys.unraisablehook = _report_unraisable


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


class Checkpoints:
    """The checkpoints of one run. Every process of the run makes the same calls; all see the same directory.

    keep: the newest ones that stay; keep_every: and those of every so many steps. keep=None opens for reading only,
    which may be done beside a training that writes: nothing is then saved, renamed or removed.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int | None = None, keep_every: int | None = None):
        self.directory = epath.Path(directory).absolute()
        self._manager = None
        self._saving = None  # the step of the last save begun
        if keep is None:
            return
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every is not None:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
        registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.directory}: {error.strerror or error}") from error

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, ascending."""
        if not self.directory.exists():
            return []
        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory))

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, items: dict[str, object], meta: dict) -> None:
        """Begins to save trees of arrays and a JSON-able record, and returns once the arrays may be overwritten.

        Waits for the save before, and raises what went wrong with it (see check). A step that is saved already stays as
        it is; what a killed save left of it is replaced.
        """
        assert self._manager is not None, "these checkpoints were opened for reading only"
        assert META not in items and not set(OWN_KEYS) & set(meta), (list(items), list(meta))
        self.wait()
        if step in self._manager.all_steps():  # not steps(): all processes must decide alike
            return
        named = {item: named_leaves(tree) for item, tree in items.items()}
        record = json.loads(json.dumps(meta)) | {
            "step": step,
            "version": VERSION,
            "digests": {item: digests(arrays) for item, arrays in named.items()},
            "shapes": {item: {name: _shape(a) for name, a in arrays.items()} for item, arrays in named.items()},
        }
        record["checksum"] = _checksum(record)
        arguments = {item: ocp.args.PyTreeSave(arrays) for item, arrays in named.items() if arrays}
        arguments[META] = ocp.args.JsonSave(record)
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)
        except Exception as error:
            raise self._save_error(error) from error

    def check(self) -> None:
        """Raises if the save under way has failed: UserError where the storage is to blame (full, read-only), else
        RuntimeError. Does not wait; call it every step. The checkpoints before stay intact."""
        # Not CheckpointManager.check_for_errors: it takes the error away from the thread that then deletes old steps.
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when the save under way is complete; raises as check does."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error

    def close(self) -> None:
        """Waits, and ends the threads; raises as check does."""
        if self._manager is not None:
            self.wait()
            self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        """Whether a process of the run was told to stop (SIGTERM), and this is the step at which all of them save and
        leave. Call it every step in every process. Always False where jax.distributed is not initialized."""
        return ocp.multihost.reached_preemption(step)

    def restore(self, targets: dict[str, object], *, step: int | None = None) -> tuple[int, dict, dict] | None:
        """(step, {item: tree}, meta) of the newest intact checkpoint, or of the given step; None if there is none.

        targets: {item: tree of jax.ShapeDtypeStruct with shardings, as from jax.eval_shape}; only these items are read.
        A sharding over an abstract mesh means the current mesh, and none means replicated over it.
        A damaged step is reported and renamed to STEP.bad, and the one before is tried; if none is left, or a step was
        asked for, UserError. Arrays missing from the targets or the checkpoint, or of another shape or type: UserError.
        """
        wanted = {item: named_leaves(tree) for item, tree in targets.items()}
        tried = step + 1 if step is not None else None
        while True:
            found = self._before(tried)
            if step is not None and found != step:
                raise UserError(f"there is no checkpoint of step {step} in {self.directory}; there are {self.steps()}")
            if found is None:
                return self._nothing_left()
            meta, arrays, damage = self._read(found, wanted)
            if damage is None:
                trees = {
                    item: jax.tree.unflatten(jax.tree.structure(target), [arrays[item][name] for name in wanted[item]])
                    for item, target in targets.items()
                }
                return found, trees, meta
            if step is not None:
                raise UserError(f"checkpoint {self.directory / str(step)} is damaged ({damage}); choose another step")
            self._put_aside(found, damage)
            tried = found

    def record(self, step: int) -> dict:
        """What was saved beside the arrays of a step: the caller's meta, "digests" and "shapes" {item: {name: ...}}."""
        if step not in self.steps():
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}; there are {self.steps()}")
        meta, damage = _attempt(_read_meta, self.directory / str(step) / META)
        if damage:
            raise UserError(f"checkpoint {self.directory / str(step)} is damaged ({damage}); choose another step")
        return meta

    def verify(self, step: int) -> str | None:
        """Reads all of a step; what is damaged, or None. Changes nothing."""
        meta, damage = _attempt(_read_meta, self.directory / str(step) / META)
        if damage:
            return damage
        return self._read(step, {item: _structs(shapes) for item, shapes in meta["shapes"].items()})[2]

    def read(self, item: str, step: int) -> dict[str, jax.Array]:
        """The arrays of one item by name, whatever model they are of."""
        shapes = self.record(step)["shapes"]
        found = self.restore({item: _structs(shapes[item])}, step=step)
        assert found is not None
        return found[1][item]

    def _before(self, step: int | None) -> int | None:
        """The newest complete step before the given one, as the first process sees it."""
        newest = max((s for s in self.steps() if step is None or s < step), default=-1)
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def _read(self, step: int, wanted: dict[str, dict]) -> tuple[dict, dict[str, dict[str, jax.Array]], str | None]:
        """(record, arrays, what is damaged or None). Reads item by item without Orbax's manager, whose barriers leave
        the other processes waiting when one cannot read its part."""
        directory = self.directory / str(step)
        meta, damage = _attempt(_read_meta, directory / META)
        if damage:
            return {}, {}, damage
        if meta["version"] != VERSION:
            raise UserError(f"checkpoint {directory} has layout {meta['version']}, this llm_jax reads layout {VERSION}")
        _require_same_shapes(directory, meta["shapes"], wanted)
        arrays, damage = _attempt(_read_items, directory, wanted)
        if damage:
            return meta, {}, damage
        changed = []
        for item, leaves in arrays.items():
            found = digests(leaves)
            changed += [f"{item}/{name}" for name in leaves if found[name] != meta["digests"][item][name]]
        return meta, arrays, f"changed since it was saved: {_few(changed)}" if changed else None

    def _put_aside(self, step: int, damage: str) -> None:
        directory, done = self.directory / str(step), "passed over"
        if jax.process_index() == 0:
            if self._manager is not None:
                names = itertools.chain([f"{step}.bad"], (f"{step}.bad.{number}" for number in itertools.count(1)))
                bad = next(self.directory / name for name in names if not (self.directory / name).exists())
                directory.rename(bad)
                done = f"renamed to {bad.name}"
            print(f"checkpoint {directory} is damaged and {done}: {damage}", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"put aside checkpoint {step}")
        if self._manager is not None:
            self._manager.reload()

    def _nothing_left(self) -> None:
        bad = sorted(p.name for p in self.directory.iterdir() if ".bad" in p.name) if self.directory.exists() else []
        damaged = bad or self.steps()  # steps are still there where nothing is renamed
        if damaged:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged ({_few(damaged)}); move them away to begin at step 0"
            )

    def _save_error(self, error: Exception) -> Exception:
        assert self._manager is not None
        self._manager.reload()
        reason = _one_line(error)
        storage = any(problem in _chain(error) for problem in STORAGE_PROBLEMS)
        return (UserError if storage else RuntimeError)(
            f"checkpoint of step {self._saving} could not be saved in {self.directory} ({reason}); "
            f"earlier ones are intact: {self.steps() or 'none'}; free space or mend the storage, and start again"
        )


def _attempt(read, *arguments) -> tuple[object, str | None]:
    """(what it read, None) if all processes could read, else (None, the reason in one line). An error that does not
    speak against the checkpoint is raised."""
    result, damage = None, None
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None  # Orbax drops the other reads under way, and each would print a page
    try:
        result = read(*arguments)
    except Exception as error:
        if isinstance(error, MemoryError) or any(text in _chain(error) for text in NOT_DAMAGE):
            raise
        damage = _one_line(error)
    finally:
        if damage:
            gc.collect()  # now, while nobody listens
        sys.unraisablehook = hook
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(damage is not None))
        if damage is None and failed.any():
            damage = f"process {int(np.argmax(failed))} cannot read it"
    return (None, damage) if damage else (result, None)


def _read_meta(directory: epath.Path) -> dict:
    meta = ocp.JsonCheckpointHandler().restore(directory)
    if _checksum(meta) != meta["checksum"]:
        raise ValueError(f"{directory} does not have its checksum")
    return meta


def _read_items(directory: epath.Path, wanted: dict[str, dict]) -> dict[str, dict[str, jax.Array]]:
    arrays = {}
    for item, leaves in wanted.items():
        targets = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_concrete(leaf.sharding))
            for name, leaf in leaves.items()
        }
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        arguments = ocp.args.PyTreeRestore(item=targets, restore_args=restore_args)
        arrays[item] = ocp.PyTreeCheckpointHandler().restore(directory / item, args=arguments) if targets else {}
    return arrays


def _concrete(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding:
    """With devices: what has none, or an abstract mesh, goes to the current mesh; without one, to the first device."""
    mesh = jax.sharding.get_mesh()
    if sharding is None and mesh.empty:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if sharding is None:  # jax.eval_shape leaves it open for constants, such as a counter that begins at 0
        return NamedSharding(mesh, PartitionSpec())
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        return NamedSharding(mesh, sharding.spec)
    return sharding


def _require_same_shapes(directory: epath.Path, saved: dict[str, dict[str, str]], wanted: dict[str, dict]) -> None:
    problems = []
    for item, leaves in wanted.items():
        if item not in saved:
            raise UserError(f"checkpoint {directory} has no item {item!r}, only {sorted(saved)}")
        have, want = saved[item], {name: _shape(leaf) for name, leaf in leaves.items()}
        lines = collections.defaultdict(list)
        for name in sorted(have | want):
            if name not in have:
                lines["missing from the checkpoint"].append(f"{name} {want[name]}")
            elif name not in want:
                lines["unknown to this model"].append(f"{name} {have[name]}")
            elif have[name] != want[name]:
                lines["of another shape or type"].append(f"{name} is {have[name]}, not {want[name]}")
        problems += [f"{item} {kind}: {_few(names)}" for kind, names in lines.items()]
    if problems:
        raise UserError(f"checkpoint {directory} is of another model or optimizer; " + "; ".join(problems))


def _shape(array) -> str:
    return f"{np.dtype(array.dtype).name}[{','.join(map(str, array.shape))}]"


def _structs(shapes: dict[str, str]) -> dict[str, jax.ShapeDtypeStruct]:
    """The inverse of _shape, for all arrays of an item."""

    def struct(shape: str) -> jax.ShapeDtypeStruct:
        dtype, _, sizes = shape.rstrip("]").partition("[")
        return jax.ShapeDtypeStruct(tuple(map(int, sizes.split(",") if sizes else ())), jnp.dtype(dtype))

    return {name: struct(shape) for name, shape in shapes.items()}


def _checksum(record: dict) -> str:
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _chain(error: BaseException | None) -> str:
    """The names and texts of an error and its causes."""
    return f"{type(error).__name__}: {error} {_chain(error.__cause__)}" if error is not None else ""


def _one_line(error: BaseException) -> str:
    """The first cause; the beginning and the end of it, where TensorStore puts what failed and why."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-190:]}"


def _few(names: list) -> str:
    return ", ".join(map(str, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
