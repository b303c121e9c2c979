"""Runs the steps of a build by processes of this machine, and on from where an interrupted run stopped.

MapReduce (Dean and Ghemawat, OSDI 2004) on one disk: a group's sources are sorted into runs by shard, and each shard
merges its runs. A process holds a block of each file it reads, the pairs it sorts, and the values of one key.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import heapq
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import fsspec
import tqdm

import llm_jax
from llm_jax.config import UserError
from llm_jax.corpus.pairs import Collection, Run
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Read, Step, check, describe
from llm_jax.corpus.tasks import LOCK, UNFINISHED, Place, Plan, Record, Task, perform, require_same_build

MEMORY_BYTES = 256_000_000
ATTEMPTS = 3  # at a task whose process is killed
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build has made.

    Attributes:
      collections: of the steps that no other step reads; the others are gone
      stats: of each step
      peak_disk_bytes: the most that its files took up, as seen every second, in this run; None: not known
    """

    collections: dict[str, Collection]
    stats: dict[str, Stats]
    peak_disk_bytes: int | None

    @property
    def total(self) -> Stats:
        return Stats().merge(self.stats.values())


def run(
    steps: Sequence[Step],
    workdir: str,
    *,
    num_workers: int,
    num_shards: int,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[str], None] = print,
) -> Built:
    """Runs a build, or what is left of it.

    The files of the collections depend on the steps, the inputs and num_shards alone, byte for byte.

    Args:
      workdir: for the files of this build alone; it is made if need be
      num_workers: processes
      num_shards: files of a collection that a group makes
      memory_bytes: of pairs that a worker holds to sort them; up to 50 MB of blocks when it merges them again. The
        values of one key, and what the functions hold, come on top
      progress: gets a line now and then if standard error is no terminal (there, a bar is shown)

    Raises:
      UserError: the workdir holds another build, or is in use; a full disk; a damaged file; a worker that is killed
        again and again; what a function raises as such. What is finished is kept.
      RuntimeError: another exception in a function, with its traceback.
    """
    check(steps)
    plan = Plan(tuple(steps), workdir, num_shards, memory_bytes)
    unfinished_files = os.path.join(workdir, UNFINISHED)
    with _full_disk(workdir), _locked(workdir):
        os.makedirs(unfinished_files, exist_ok=True)
        require_same_build(plan, _description(plan))
        shutil.rmtree(unfinished_files)  # of a run that was killed
        os.mkdir(unfinished_files)
        schedule = _Schedule(plan)
        with contextlib.closing(_Progress(schedule, progress)) as shown:
            _work_off(plan, schedule, num_workers, shown.update)
        shutil.rmtree(unfinished_files)  # of workers that were killed
    return Built(
        collections={name: _collection(plan, name) for name in plan.parts if name in plan.results},
        stats={name: Stats().merge(record.stats for record in _records(plan, name)) for name in plan.parts},
        peak_disk_bytes=schedule.peak_bytes,
    )


def _records(plan: Plan, step: str) -> Iterator[Record]:
    """One after the other: the examples of all tasks at once may be more than memory holds."""
    return (plan.record(Task(step, part)) for part in range(plan.parts[step]))


def _collection(plan: Plan, step: str) -> Collection:
    sizes = [(record.size, record.pairs) for record in _records(plan, step)]
    files = (Run(plan.path(Task(step, part), ".pairs"), 0, size) for part, (size, _) in enumerate(sizes))
    return Collection(tuple(files), sum(pairs for _, pairs in sizes))


def _description(plan: Plan) -> dict:
    """All that decides what a build makes, by name, as JSON."""
    inputs = [input for step in plan.steps if isinstance(step, Read) for input in step.inputs]
    with concurrent.futures.ThreadPoolExecutor(32) as threads:  # a request each, where they are not local
        versions = list(threads.map(_version, inputs))
    return {
        "llm_jax": llm_jax.__version__,
        "num_shards": plan.num_shards,
        "inputs": versions,
        "order of steps": [step.name for step in plan.steps],
        **{f"step {step.name!r}": describe(step) for step in plan.steps},
    }


def _version(input: str) -> list:
    """What changes when an input does: its size and its time of change, or what its store gives (an etag)."""
    if "://" in input:
        file_system, path = fsspec.core.url_to_fs(input)
        return [input, str(file_system.ukey(path))]
    status = os.stat(input)
    if input.endswith(".pairs"):  # of an earlier part, whose own description says what it holds; it may be made anew
        return [input, status.st_size]
    return [input, status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[None]:
    """One build at a time; the lock goes with the process, however it ends."""
    os.makedirs(workdir, exist_ok=True)
    with open(os.path.join(workdir, LOCK), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"workdir={workdir}: another build is running here; wait for it, or end it") from None
        yield


@contextlib.contextmanager
def _full_disk(workdir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"workdir={workdir}: {error.strerror}; free some space; the same command then goes on from what is finished"
        ) from error


class _Schedule:
    """What is left to do, in an order that keeps the disk empty, and the files that nobody needs any more.

    Attributes:
      done, total: tasks
      held_bytes: of finished files
      peak_bytes: the most that finished and unfinished files took up
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        unfinished = plan.unfinished()
        self._unfinished = set(unfinished)
        self._rank = {step.name: -i for i, step in enumerate(plan.steps)}
        self._waits = {task: sum(input in self._unfinished for input in plan.inputs(task)) for task in unfinished}
        self._ready = []
        for task in unfinished:
            if not self._waits[task]:
                self._push(task)
        self._readers = {}  # finished task -> unfinished ones that read it
        self.held_bytes = 0
        self.peak_bytes = 0
        self.total = self.done = 0
        for task in plan.tasks():
            self.total += 1
            if task not in self._unfinished:
                self.done += 1
                self._add(task)
        self.look()

    def next(self) -> Task | None:
        """A task to do now; None if there is none until others are finished."""
        return heapq.heappop(self._ready)[-1] if self._ready else None

    def again(self, task: Task) -> None:
        """A task that next() gave was not finished."""
        self._push(task)

    def finish(self, task: Task) -> None:
        self.done += 1
        self._unfinished.remove(task)
        self._add(task)
        self.look()  # before files are set free
        for reader in self._plan.outputs(task):
            if reader in self._waits:
                self._waits[reader] -= 1
                if not self._waits[reader]:
                    self._push(reader)
        for input in self._plan.inputs(task):
            self._readers[input] -= 1
            self._release(input)

    def look(self) -> None:
        """Keeps peak_bytes up to date."""
        held = self.held_bytes
        for folder, _, names in os.walk(os.path.join(self._plan.workdir, UNFINISHED)):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # finished just now
                    held += os.path.getsize(os.path.join(folder, name))
        self.peak_bytes = max(self.peak_bytes, held)

    @property
    def unfinished(self) -> bool:
        return bool(self._unfinished)

    def _push(self, task: Task) -> None:
        # Later steps first: they set files free.
        heapq.heappush(self._ready, (self._rank[task.step], task.sorts is not None, task.part, task.sorts or "", task))

    def _add(self, task: Task) -> None:
        """A finished task."""
        if self._plan.has_file(task):
            self.held_bytes += os.path.getsize(self._plan.path(task, ".pairs"))
        self._readers[task] = sum(reader in self._unfinished for reader in self._plan.outputs(task))
        self._release(task)

    def _release(self, task: Task) -> None:
        """Deletes the file of a finished task if all that read it are finished."""
        is_result = task.sorts is None and task.step in self._plan.results
        if not self._readers[task] and not is_result and self._plan.has_file(task):
            path = self._plan.path(task, ".pairs")
            self.held_bytes -= os.path.getsize(path)
            os.unlink(path)


class _Worker:
    """A process that does one task after the other, and ends with this one, however this one ends."""

    def __init__(self, plan: Plan):
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and locks
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, plan), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        with contextlib.suppress(BrokenPipeError):  # of a dead process: its end of file is seen next
            self.pipe.send(task)


def _work_off(plan: Plan, schedule: _Schedule, num_workers: int, show: Callable[[], None]) -> None:
    """Does all tasks of the schedule. The first error stops the workers and is raised here."""
    workers: list[_Worker] = []
    attempts = collections.Counter()
    try:
        while schedule.unfinished:
            idle = collections.deque(worker for worker in workers if worker.task is None)
            while (idle or len(workers) < num_workers) and (task := schedule.next()):
                if not idle:
                    workers.append(_Worker(plan))
                    idle.append(workers[-1])
                idle.popleft().give(task)
            ready = multiprocessing.connection.wait([worker.pipe for worker in workers], SECONDS_BETWEEN_LOOKS)
            schedule.look()
            for worker in [worker for worker in workers if worker.pipe in ready]:
                task, worker.task = worker.task, None
                assert task is not None
                try:
                    error = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    workers.remove(worker)
                    attempts[task] += 1
                    if attempts[task] == ATTEMPTS:
                        raise UserError(_killed(plan.place(task), worker.process.exitcode)) from None
                    schedule.again(task)
                    continue
                if error:
                    raise error
                schedule.finish(task)
            show()
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()


def _killed(place: str, exitcode: int | None) -> str:
    assert exitcode is not None
    how = f"was killed by signal {-exitcode}" if exitcode < 0 else f"ended with exit code {exitcode}"
    return (
        f"{place}: the process {how}, {ATTEMPTS} times, perhaps for lack of memory; use fewer workers and run the same "
        "command again: what is finished is kept"
    )


def _work(pipe: multiprocessing.connection.Connection, plan: Plan) -> None:
    """A worker: does the tasks it is sent; answers each with None or an exception."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group, and is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        while True:
            task = pipe.recv()
            place = Place(plan.place(task))
            try:
                with _full_disk(plan.workdir):
                    perform(plan, task, place)
            except UserError as error:
                pipe.send(error)
            except Exception as error:
                trace = traceback.format_exc()
                pipe.send(RuntimeError(f"{place}: {type(error).__name__}: {error}\n\nIn the worker:\n{trace}"))
            else:
                pipe.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


class _Progress:
    """Counts tasks: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, schedule: _Schedule, say: Callable[[str], None]):
        self._schedule = schedule
        self._say = say
        self._said = time.monotonic()
        self._bar = tqdm.tqdm(
            total=schedule.total, initial=schedule.done, desc="building", unit=" tasks", disable=not sys.stderr.isatty()
        )

    def update(self) -> None:
        done, disk = self._schedule.done, f"{self._schedule.held_bytes / 1e9:.1f} GB on disk"
        self._bar.set_postfix_str(disk, refresh=False)
        self._bar.update(done - self._bar.n)
        if self._bar.disable and time.monotonic() > self._said + SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._say(f"building: {done:,} of {self._schedule.total:,} tasks, {disk}")

    def close(self) -> None:
        self._bar.close()
