"""The tasks that the steps of a build fall into, and the files they leave in its workdir.

A task makes one file of pairs, STEP/PART.pairs, or STEP/from-SOURCE/PART.pairs: part of a source, sorted for the group
that reads it. Its record, the .json beside it, is put in place last: with it, the task is finished.
"""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from llm_jax.config import UserError
from llm_jax.corpus import pairs
from llm_jax.corpus.pairs import PairWriter, Run, Sorter
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Group, Pair, Read, Step, readers, results

LOCK = "lock"
UNFINISHED = "unfinished"  # folder of the workdir for files not yet complete; emptied when a build starts


class Task(NamedTuple):
    step: str
    part: int
    sorts: str | None = None  # the source that is sorted for the step; None: the step itself is done


class Record(NamedTuple):
    """Of a finished task."""

    pairs: int
    size: int  # of its file, in bytes
    runs: list[tuple[int, int, int]]  # [shard, start, end] of each, where a source is sorted
    stats: Stats


@dataclasses.dataclass
class Place:
    """Where a task is, for messages."""

    text: str
    key: bytes | None = None

    def __str__(self) -> str:
        return self.text if self.key is None else f"{self.text}, at the key {self.key[:200]!r}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A build in a workdir. Which tasks there are follows from the steps and num_shards alone."""

    steps: tuple[Step, ...]
    workdir: str
    num_shards: int  # of the collections that groups make
    memory_bytes: int  # of pairs that a task holds to sort them

    @functools.cached_property
    def by_name(self) -> dict[str, Step]:
        return {step.name: step for step in self.steps}

    @functools.cached_property
    def results(self) -> set[str]:
        return set(results(self.steps))

    @functools.cached_property
    def parts(self) -> dict[str, int]:
        """The number of files of each collection."""
        parts = {}
        for step in self.steps:
            if isinstance(step, Read):
                parts[step.name] = len(step.inputs)
            else:
                parts[step.name] = self.num_shards if isinstance(step, Group) else parts[step.source]
        return parts

    @functools.cached_property
    def _readers(self) -> dict[str, list[Step]]:
        return readers(self.steps)

    def tasks(self) -> Iterator[Task]:
        """All tasks, each after those that it reads."""
        for step in self.steps:
            if isinstance(step, Group):
                yield from (Task(step.name, i, source) for source in step.sources for i in range(self.parts[source]))
            yield from (Task(step.name, part) for part in range(self.parts[step.name]))

    def inputs(self, task: Task) -> list[Task]:
        """The tasks whose files a task reads."""
        step = self.by_name[task.step]
        if task.sorts is not None:
            return [Task(task.sorts, task.part)]
        if isinstance(step, Group):
            return [Task(step.name, i, source) for source in step.sources for i in range(self.parts[source])]
        return [Task(source, task.part) for source in step.sources]

    def outputs(self, task: Task) -> list[Task]:
        """The tasks that read a task's file."""
        if task.sorts is not None:
            return [Task(task.step, part) for part in range(self.num_shards)]
        return [
            Task(step.name, task.part, task.step if isinstance(step, Group) else None)
            for step in self._readers.get(task.step, [])
        ]

    def place(self, task: Task) -> str:
        step = self.by_name[task.step]
        if task.sorts is not None:
            return f"step {step.name!r}, sorting {self.path(Task(task.sorts, task.part), '.pairs')}"
        if isinstance(step, Read):
            return f"step {step.name!r}, input {step.inputs[task.part]}"
        if isinstance(step, Group):
            return f"step {step.name!r}, shard {task.part} of {self.num_shards}"
        return f"step {step.name!r}, reading {self.path(Task(step.source, task.part), '.pairs')}"

    def path(self, task: Task, suffix: str) -> str:
        folder = [task.step] if task.sorts is None else [task.step, f"from-{task.sorts}"]
        return os.path.join(self.workdir, *folder, f"{task.part:05d}{suffix}")

    def record(self, task: Task) -> Record:
        """Of a finished task."""
        path = self.path(task, ".json")
        with open(path, encoding="utf-8") as file:
            try:
                saved = json.load(file)
            except ValueError as error:
                raise UserError(f"{path}: {error}; delete it and run the same command again") from error
        return Record(saved["pairs"], saved["size"], saved["runs"], Stats.from_json(json.dumps(saved["stats"])))

    def has_file(self, task: Task) -> bool:
        return os.path.exists(self.path(task, ".pairs"))

    def read(self, task: Task) -> Iterator[Pair]:
        """The pairs that a finished task has made."""
        return pairs.read_pairs(Run(self.path(task, ".pairs"), 0, self.record(task).size))

    def unfinished(self) -> list[Task]:
        """What is left to do, each task after those that it reads. A finished task counts as unfinished if an
        unfinished one needs its file and the file is gone."""
        found = set()
        tasks = list(self.tasks())
        for task in reversed(tasks):
            wanted = task.step in self.results and task.sorts is None or not found.isdisjoint(self.outputs(task))
            if not os.path.exists(self.path(task, ".json")) or (wanted and not self.has_file(task)):
                found.add(task)
        return [task for task in tasks if task in found]


def perform(plan: Plan, task: Task, place: Place) -> None:
    """Does a task: its file and its record are there afterwards, the same whoever does it and how often.

    place: is kept up to date for messages
    """
    step = plan.by_name[task.step]
    stats = Stats()
    # Folders and files of this task alone: another process may be doing it too, when it has outlived its build.
    with tempfile.TemporaryDirectory(dir=os.path.join(plan.workdir, UNFINISHED)) as folder:
        data = os.path.join(folder, "pairs")
        scratch = os.path.join(folder, "scratch")
        os.mkdir(scratch)
        with open(data, "wb") as file:
            if task.sorts is not None:
                writer, runs = _sort(plan, task, file)
            else:
                writer, runs = PairWriter(file), []
                for key, value in _pairs(plan, task, step, scratch, stats, place):
                    writer.write(key, value)
                writer.flush()
            _save(file)
        record = {"pairs": writer.pairs, "size": writer.position, "runs": runs, "stats": json.loads(stats.to_json())}
        with open(os.path.join(folder, "json"), "w", encoding="utf-8") as file:
            json.dump(record, file)
            _save(file)
        target, finished = plan.path(task, ".pairs"), plan.path(task, ".json")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # of a file that was lost: it may have had other runs
            os.unlink(finished)
        os.replace(data, target)
        os.replace(file.name, finished)


def _sort(plan: Plan, task: Task, file: BinaryIO) -> tuple[PairWriter, list[tuple[int, int, int]]]:
    sorter = Sorter(file, plan.num_shards, plan.memory_bytes)
    for key, value in plan.read(plan.inputs(task)[0]):
        sorter.add(key, value)
    sorter.flush()
    return sorter.writer, sorter.runs


def _pairs(plan: Plan, task: Task, step: Step, scratch: str, stats: Stats, place: Place) -> Iterator[Pair]:
    if isinstance(step, Read):
        yield from step.function(step.inputs[task.part], stats)
    elif isinstance(step, Group):
        sources = [_merged(plan, task, source, os.path.join(scratch, source)) for source in step.sources]
        for key, values in pairs.group(sources):
            place.key = key
            given = values if step.streams else map(list, values)
            yield from step.function(key, *given, stats=stats)
    else:
        for key, value in plan.read(plan.inputs(task)[0]):
            place.key = key
            yield from step.function(key, value, stats)


def _merged(plan: Plan, task: Task, source: str, folder: str) -> Iterator[Pair]:
    """The pairs of one source for one shard of a group."""
    os.mkdir(folder)
    runs = []
    for part in range(plan.parts[source]):
        made = Task(task.step, part, source)
        path = plan.path(made, ".pairs")
        runs += [Run(path, start, end) for shard, start, end in plan.record(made).runs if shard == task.part]
    return pairs.merge(runs, folder, max(2, pairs.FAN_IN // len(plan.by_name[task.step].sources)))


def _save(file) -> None:
    """Onto the disk, so that a name never stands for less than the whole, even after a power cut."""
    file.flush()
    os.fsync(file.fileno())


def require_same_build(plan: Plan, description: dict) -> None:
    """That the workdir is new or holds this very build; the description is written into a new one."""
    path = os.path.join(plan.workdir, "build.json")
    text = json.dumps(description, indent=1)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            saved = file.read()
        if saved != text:
            differs = _differences(json.loads(saved), json.loads(text))
            raise UserError(
                f"workdir={plan.workdir}: another build was begun here, with other {', '.join(differs)}; delete it, or "
                "give another place"
            )
        return
    if set(os.listdir(plan.workdir)) - {LOCK, UNFINISHED}:
        raise UserError(f"workdir={plan.workdir}: it is not empty and holds no build; give another place")
    temporary = os.path.join(plan.workdir, UNFINISHED, "build.json")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        _save(file)
    os.replace(temporary, path)


def _differences(old: dict, new: dict) -> Sequence[str]:
    """The names of what is different in two flat descriptions."""
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]
