"""Checkpoints that can be trusted: saved beside the training, checked when read, never half restored.

DIRECTORY/STEP/ holds one Orbax item per saved tree, a flat dictionary of arrays under their names
("blocks/attention/wq"), and the item `meta`, a JSON record: what the caller gave, a digest and the shape of every
array, and a checksum of itself. Orbax writes into STEP.orbax-checkpoint-tmp and renames it when complete, so a step is
there as a whole or not at all, however the process ends. TensorStore syncs the files with numbers, Orbax neither the
small ones nor the rename: what a power failure does to a step is found like any other damage, and the step before it
is used. A thread reads what was saved back from the disk and compares its digests; only then may older steps go.

At gs:// nothing can be renamed at once: there Orbax writes into STEP itself, last of all a file that says that it is
whole, and a step without that is none. What is deleted loses that file first.

This is the only file that imports Orbax. Uncompressed, since that saves 4-5 times faster for 8 % more bytes.
"""

import errno
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Collection

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from llm_jax.config import RunFailed, UserError
from llm_jax.safety.digest import digests, examine
from llm_jax.safety.remote import Unreachable, is_url, of_network, told
from llm_jax.safety.structure import concrete, named_leaves, require_same_shapes, shape, structs
from llm_jax.safety.verification import DAMAGED, INTACT, Verifier, changed_arrays, few, is_damage, kept, one_line

VERSION = 1  # of the layout described above
META = "meta"
WHOLE = "commit_success.txt"  # Orbax's name of the file that is written last
OWN_KEYS = ("step", "version", "held_out_loss", "digests", "shapes", "checksum")
SPACE = 1.05  # times the bytes of the arrays must be free before a save: some are left for the record of the run


# Orbax also logs each failure, with pages of traceback; here every failure is raised or reported once, in one line.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def _report_unraisable(unraisable, report=sys.unraisablehook) -> None:
    # When one write fails, Orbax closes the event loop that the other writes under way report to, a page for each.
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


sys.unraisablehook = _report_unraisable


class SaveFailed(RunFailed):
    """A checkpoint could not be saved: in one line, why, and the way out. Those before it are intact, what was written
    of it is removed, and a later save is as good as any: the run may go on."""


class Checkpoints:
    """The checkpoints of one run. Every process of the run makes the same calls; all see the same directory.

    keep: the newest ones that stay; keep_every: and those of every so many steps; keep_best: and so many of the lowest
    held-out loss. The rule counts verified steps only: a thread reads each save back from the disk, in each process its
    share of the arrays, and until that is done, everything older stays. It is applied by every save, to what is
    verified by then, and by close, so that one more than `keep` lies there while a run saves. keep=None opens for
    reading only, which may be done beside a training that writes: nothing is then saved, verified, renamed or removed.
    before_save: is called by each save to a store, and may raise an error of the network: then that save has failed.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        keep_best: int | None = None,
        before_save: Callable[[], None] = lambda: None,
    ):
        self.directory = epath.Path(directory) if is_url(directory) else epath.Path(directory).absolute()
        self.failures = 0  # failed saves since the last complete one
        self._before_save = before_save
        self._unsure = False  # what a failed save has left
        self._manager = None
        if keep is None:
            return
        self._rule = {"newest": keep, "every": keep_every, "best": keep_best}
        self._losses: dict[int, float | None] = {}
        self._saving = None  # the step of the save under way
        self._verifier = Verifier(self._damage_of)
        self._policy = _AllButDoomed()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
        registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            # Else, where none can be made, threads wait 10 minutes for them, with a copy of the arrays in hand.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            with told(self.directory):
                self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)
            # It would count along in JAX's preemption service, by steps; parallel/hosts.py counts there, and otherwise.
            self._manager.reached_preemption = lambda step: False
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.directory}: {error.strerror or error}") from error

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, ascending."""
        with told(self.directory):
            if not self.directory.exists():
                return []
            return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory))

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, items: dict[str, object], meta: dict, held_out_loss: float | None = None) -> None:
        """Begins to save trees of arrays and a JSON-able record, and returns once the arrays may be overwritten.

        Waits for the save before, but not for its verification. A step that is saved already stays as it is; what a
        killed or failed save left is removed. A step that was found damaged is reported and renamed to STEP.bad. A
        held_out_loss that is NaN or infinite is recorded as unknown. SaveFailed if this save cannot begin, of which the
        free space is a part, or if the one before has failed: this one is then not begun. RunFailed if an array holds a
        number that is not finite.
        """
        assert self._manager is not None, "these checkpoints were opened for reading only"
        assert META not in items and not set(OWN_KEYS) & set(meta), (list(items), list(meta))
        self.wait()
        if is_url(self.directory):
            self._together(step, self._ready)
        for unverified in self._settle():
            self._verifier.begin(unverified)
        if step in self._manager.all_steps():  # not steps(): all processes must decide alike
            return
        named = {item: named_leaves(tree) for item, tree in items.items()}
        examined = {item: examine(arrays) for item, arrays in named.items()}
        if wrong := [f"{item}/{name}" for item, (_, names) in examined.items() for name in names]:
            raise RunFailed(f"step {step} made {few(wrong)} NaN or infinite; the checkpoints are from before")
        loss = float(held_out_loss) if held_out_loss is not None and math.isfinite(held_out_loss) else None
        record = json.loads(json.dumps(meta)) | {
            "step": step,
            "version": VERSION,
            "held_out_loss": loss,
            "digests": {item: found for item, (found, _) in examined.items()},
            "shapes": {item: {name: shape(a) for name, a in arrays.items()} for item, arrays in named.items()},
        }
        record["checksum"] = _checksum(record)
        arguments = {item: ocp.args.PyTreeSave(arrays) for item, arrays in named.items() if arrays}
        arguments[META] = ocp.args.JsonSave(record)
        size = sum(array.nbytes for arrays in named.values() for array in arrays.values())

        def begin() -> None:
            assert self._manager is not None
            self._make_room(size)
            self._manager.save(step, args=ocp.args.Composite(**arguments), force=True)

        if is_url(self.directory):
            self._together(step, lambda: self._take_apart(self._policy.doomed))
        self._together(step, begin)
        self._saving = step
        self._losses[step] = loss
        self._verifier.forget(step)

    def warm_up(self, items: dict[str, object]) -> None:
        """Compiles what a save of such trees computes: after a preemption notice there is no time for it."""
        for tree in items.values():
            examine(named_leaves(tree))

    def check(self) -> None:
        """Raises SaveFailed if the save under way has failed, and begins to verify it if it is complete. Does not wait;
        call it every step. On several processes, which must agree on it, the next save or close raises instead."""
        # Not CheckpointManager.check_for_errors: it takes the error away from the thread that then deletes old steps.
        if self._manager is None or self._saving is None or self._manager.is_saving_in_progress():
            return
        if jax.process_count() == 1:
            self.wait()
        else:
            self._verifier.begin(self._saving)  # if it has failed, what is found is never asked for

    def wait(self) -> None:
        """Returns when the save under way is complete, or raises SaveFailed."""
        if self._manager is None or self._saving is None:
            return
        failure, step = None, self._saving
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            failure = error
        failed = _gather([failure is not None])
        if failed.any():
            failure = failure or RuntimeError(f"process {int(np.argmax(failed))} could not save its part")
            raise self._failed(step, failure) from failure
        self._saving, self.failures = None, 0
        self._verifier.begin(step)

    def close(self, *, verify: bool = True) -> None:
        """Waits for the save and the verification, leaves what the rule says, and ends the threads; raises as wait
        does. verify=False: waits for the save alone, and deletes nothing; for when there is no time."""
        if self._manager is None:
            return
        try:
            self.wait()
            if verify:
                unverified, before = None, None
                while unverified is None or unverified and unverified != before:
                    for step in unverified or ():
                        self._verifier.begin(step)
                    self._verifier.wait()
                    unverified, before = self._settle(), unverified
                self._delete_doomed()
                self._remove_leftovers()
        finally:
            self._verifier.close()
            self._manager.close()

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of all later steps: the run has gone back to this one. All processes call it."""
        assert self._manager is not None, "these checkpoints were opened for reading only"
        self.wait()
        later_steps = [saved for saved in self._manager.all_steps() if saved > step]
        self._take_apart(later_steps)
        for later in later_steps:
            self._verifier.forget(later)
            self._manager.delete(later)

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
            if damage:  # once more: what has failed may have been the storage, or one process's way to it
                meta, arrays, damage = self._read(found, wanted)
            if damage is None:
                if self._manager is not None and wanted.keys() == meta["shapes"].keys():
                    self._verifier.intact.add(found)
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
        return self._read(step, {item: structs(shapes) for item, shapes in meta["shapes"].items()})[2]

    def read(self, item: str, step: int) -> dict[str, jax.Array]:
        """The arrays of one item by name, whatever model they are of."""
        shapes = self.record(step)["shapes"]
        found = self.restore({item: structs(shapes[item])}, step=step)
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
        require_same_shapes(directory, meta["shapes"], wanted)
        arrays, damage = _attempt(_read_items, directory, wanted)
        if damage:
            return meta, {}, damage
        changed = []
        for item, leaves in arrays.items():
            found = digests(leaves)
            changed += [f"{item}/{name}" for name in leaves if found[name] != meta["digests"][item][name]]
        return meta, arrays, _changed(changed) if changed else None

    def _put_aside(self, step: int, damage: str) -> None:
        directory, done = self.directory / str(step), "passed over"
        if jax.process_index() == 0:
            if self._manager is not None:
                names = itertools.chain([f"{step}.bad"], (f"{step}.bad.{number}" for number in itertools.count(1)))
                bad = next(self.directory / name for name in names if not (self.directory / name).exists())
                try:
                    directory.rename(bad)
                    done = f"renamed to {bad.name}"
                except Exception as error:
                    if not isinstance(error, OSError) and not of_network(error):
                        raise
                    done = f"passed over, since it cannot be renamed ({getattr(error, 'strerror', None) or error})"
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
                f"every checkpoint in {self.directory} is damaged ({few(damaged)}); move them away to begin at step 0"
            )

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        assert self._manager is not None
        self._saving = None
        self.failures += 1
        self._remove_leftovers()
        try:
            with told(self.directory):
                self._manager.reload()
            intact = self.steps() or "none"
        except Unreachable:  # which is why the save has failed
            self._unsure, intact = True, "all there were"
        return SaveFailed(
            f"checkpoint of step {step} could not be saved in {self.directory} ({one_line(error)}); "
            f"earlier ones are intact: {intact}; free some space or mend the storage"
        )

    def _together(self, step: int, begin: Callable[[], None]) -> None:
        """SaveFailed in all processes if it fails in one, or their next collectives would not fit together."""
        failure = None
        try:
            begin()
        except Exception as error:
            failure = error
        if _gather([failure is not None]).any():
            raise self._failed(step, failure or RuntimeError("another process could not begin")) from failure

    def _ready(self) -> None:
        """Raises an error if nothing can be saved in the store at the moment."""
        assert self._manager is not None
        self._before_save()
        if self._unsure:
            self._manager.reload()
            self._unsure = False

    def _take_apart(self, steps: Collection[int]) -> None:
        """Steps about to be deleted. In a store their objects go one by one: if the process dies on the way, what is
        left must not pass for a checkpoint."""
        if is_url(self.directory) and jax.process_index() == 0:
            for step in steps:
                (self.directory / str(step) / WHOLE).unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """What killed and failed saves have left, if it can be removed. Not while a save is under way."""
        if jax.process_index() == 0:
            try:
                for path in ocp.utils.tmp_checkpoints(self.directory):
                    if ".bad" not in path.get().name:  # in a store, that may lack the last file, too
                        path.get().rmtree(missing_ok=True)
            except Exception as error:  # as on a disk that has become read-only: the next save tries again
                if not isinstance(error, OSError) and not of_network(error):
                    raise
                print(f"what a save has left in {self.directory} stays there: {error}", file=sys.stderr, flush=True)

    def _make_room(self, size: int) -> None:
        """OSError if arrays of so many bytes do not fit, even without what may be deleted."""
        self._remove_leftovers()
        needed = int(SPACE * size)
        if _gather([_free(self.directory) < needed]).any():
            self._delete_doomed()
        if _gather([(free := _free(self.directory)) < needed]).any():
            raise OSError(errno.ENOSPC, f"{needed:,} bytes of space are needed, {free:,} are free")

    def _delete_doomed(self) -> None:
        assert self._manager is not None
        self._take_apart(self._policy.doomed)
        for step in sorted(self._policy.doomed):
            self._manager.delete(step)
        self._policy.doomed = set()

    def _settle(self) -> list[int]:
        """Puts aside what was found damaged, decides what may be deleted, and returns the steps that must be verified
        before more may be. All processes get the same."""
        assert self._manager is not None
        steps = list(self._manager.all_steps())
        found = _gather([self._verifier.finding(step) for step in steps])
        for step, findings in zip(steps, found.T, strict=True):
            if (findings == DAMAGED).any():
                number = int(np.argmax(findings == DAMAGED))
                self._put_aside(step, self._verifier.damage(step) or f"as process {number} has found")
            elif (findings == INTACT).all():
                self._verifier.intact.add(step)
        steps = list(self._manager.all_steps())
        losses = {step: self._loss(step) for step in steps}
        stay = kept(steps, self._verifier.intact, losses, **self._rule)
        needed = set()
        if kept(steps, set(steps), losses, **self._rule) < set(steps):
            needed = kept(steps, set(steps), losses, **self._rule | {"every": None}) - self._verifier.intact
        flags = _gather([flag for step in steps for flag in (step in stay, step in needed)])[0].reshape(-1, 2)
        self._policy.doomed = {step for step, (stays, _) in zip(steps, flags, strict=True) if not stays}
        return [step for step, (_, is_needed) in zip(steps, flags, strict=True) if is_needed]

    def _loss(self, step: int) -> float | None:
        if self._rule["best"] is None:
            return None
        if step not in self._losses:
            try:
                record = _read_meta(self.directory / str(step) / META)
                self._losses[step] = record.get("held_out_loss")  # not in the records of before this rule
            except (FileNotFoundError, ValueError, KeyError):  # damaged: told when the step is verified or restored
                self._losses[step] = None
        return self._losses[step]

    def _damage_of(self, step: int, stop: threading.Event) -> str | None:
        """What is damaged in this process's share of a step. For a thread: uses no device and waits for nobody."""
        directory = self.directory / str(step)
        try:
            record = _read_meta(directory / META)
            changed = changed_arrays(directory, record, stop, part=jax.process_index(), parts=jax.process_count())
        except Exception as error:
            if not is_damage(error):
                raise
            return one_line(error)
        return _changed(changed) if changed else None


class _AllButDoomed:
    """Orbax's PreservationPolicy: every process decides by what all have agreed on."""

    def __init__(self):
        self.doomed: set[int] = set()

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [checkpoint.step not in self.doomed for checkpoint in checkpoints]


def _gather(values: list) -> np.ndarray:
    """int32[processes, values]: a collective, for small non-negative numbers."""
    mine = np.array(values, np.int32)
    several = jax.process_count() > 1 and values
    return multihost_utils.process_allgather(mine) if several else mine[None]


def _free(directory: epath.Path) -> float:
    """Bytes; 0 where that cannot be told. Of a store that is not a file system of this machine there is no end."""
    if is_url(directory):
        return math.inf
    try:
        disk = os.statvfs(directory)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize


def _changed(names: list[str]) -> str:
    return f"changed since it was saved: {few(names)}"


def _attempt(read, *arguments) -> tuple[object, str | None]:
    """(what it read, None) if all processes could read, else (None, the reason in one line). An error that does not
    speak against the checkpoint is raised."""
    result, damage = None, None
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None  # Orbax drops the other reads under way, and each would print a page
    try:
        result = read(*arguments)
    except Exception as error:
        if not is_damage(error):
            with told(arguments[0]):
                raise
        damage = one_line(error)
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
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=concrete(leaf.sharding))
            for name, leaf in leaves.items()
        }
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        arguments = ocp.args.PyTreeRestore(item=targets, restore_args=restore_args)
        arrays[item] = ocp.PyTreeCheckpointHandler().restore(directory / item, args=arguments) if targets else {}
    return arrays


def _checksum(record: dict) -> str:
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
