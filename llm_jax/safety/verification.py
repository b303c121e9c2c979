"""The proof that a checkpoint lies on the disk as it was saved, and the rule of what may then be deleted.

The arrays are read by TensorStore and digested in numpy: no JAX device takes part, so that a thread may do it beside
the training, and an error in the digest on the devices or in Orbax's restore would be seen too.
"""

import collections
import concurrent.futures
import errno
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import tensorstore
from etils import epath

from llm_jax.safety.digest import block_sums, hexadecimal
from llm_jax.safety.remote import is_url, of_network

UNKNOWN, INTACT, DAMAGED = range(3)  # findings

READ_AHEAD = 64_000_000  # bytes
MOST_AT_ONCE = 16  # requests

# What the storage or the machine says although the checkpoint may be sound: not a reason to put a checkpoint aside.
NOT_DAMAGE = (
    "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED",
    "Permission denied", "Forbidden", "Too many open files", "Cannot allocate memory",
    *map(os.strerror, (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.EREMOTEIO)),
)  # fmt: skip


def changed_arrays(
    directory: epath.Path, record: dict, stop: threading.Event, *, part: int = 0, parts: int = 1
) -> list[str]:
    """The arrays ("item/name") of the checkpoint at `directory` that are not what its record says, in the part-th of
    as many parts. What cannot be read raises an error of TensorStore's, or OSError.

    Reads one stored chunk (what one device held of an array) at a time, from the disk itself where the file system
    allows; of a store, where each request takes its time, small ones at once. Raises concurrent.futures.CancelledError
    soon after `stop` is set.
    """
    _forget_cached(directory)
    # Of its own, since nothing that was written may be known yet. It keeps the tables that tell where chunks lie.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": READ_AHEAD}})
    names = [(item, name) for item, digests in record["digests"].items() for name in digests]
    return [
        f"{item}/{name}"
        for item, name in names[part::parts]
        if _describe(directory / item, name, stop, context)
        != (record["shapes"][item][name], record["digests"][item][name])
    ]


def _describe(directory: epath.Path, name: str, stop: threading.Event, context: tensorstore.Context) -> tuple[str, str]:
    """The shape, as in a record, and the digest of an array of an item."""
    base = f"{directory}/" if is_url(directory) else {"driver": "file", "path": f"{directory}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": kvstore, "recheck_cached_data": "open"}
    array = tensorstore.open(spec, open=True, read=True, context=context).result()
    sums = np.zeros(2, np.uint32)
    chunk = array.chunk_layout.read_chunk.shape or ()
    cuts = [
        [slice(at, min(at + step, size)) for at in range(0, size, step)]
        for size, step in zip(array.shape, chunk, strict=True)
    ]
    chunk_bytes = int(np.prod(np.array(chunk, np.int64))) * array.dtype.numpy_dtype.itemsize
    at_once = min(MOST_AT_ONCE, READ_AHEAD // chunk_bytes) if is_url(directory) else 1
    places = itertools.product(*cuts)
    reading = collections.deque((place, array[place].read()) for place in itertools.islice(places, max(1, at_once)))
    while reading:
        place, read = reading.popleft()
        block = read.result()
        reading.extend((place, array[place].read()) for place in itertools.islice(places, 1))
        for add in block_sums(block, tuple(cut.start for cut in place), array.shape):
            if stop.is_set():
                raise concurrent.futures.CancelledError
            sums += add
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]", hexadecimal(sums)


def _forget_cached(directory: epath.Path) -> None:
    """Makes the kernel read the files anew: it would else answer from what has just been written."""
    if is_url(directory) or not hasattr(os, "posix_fadvise"):
        return
    for path in _files(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _files(directory: epath.Path) -> Iterator[str]:
    for folder, _, names in os.walk(directory):
        yield from (os.path.join(folder, name) for name in names)


class Verifier:
    """Verifies steps in one background thread, and keeps what this process has found.

    damage_of(step, stop) says what is damaged, or None; what it raises says nothing about the step.
    """

    def __init__(self, damage_of: Callable[[int, threading.Event], str | None]):
        self.intact: set[int] = set()  # what all processes found to be intact
        self._damage_of = damage_of
        self._stop = threading.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "verify")
        self._found: dict[int, concurrent.futures.Future[str | None]] = {}

    def begin(self, step: int) -> None:
        """Does nothing where the step is verified already, or is about to be."""
        if step not in self.intact and step not in self._found:
            self._found[step] = self._thread.submit(self._damage_of, step, self._stop)

    def finding(self, step: int) -> int:
        """UNKNOWN, INTACT or DAMAGED. A step that could not be read is reported, and may be begun again."""
        if step in self.intact:
            return INTACT
        future = self._found.get(step)
        if future is None or not future.done():
            return UNKNOWN
        if error := future.exception():
            del self._found[step]
            print(f"checkpoint of step {step} could not be verified: {one_line(error)}", file=sys.stderr, flush=True)
            return UNKNOWN
        return DAMAGED if future.result() else INTACT

    def damage(self, step: int) -> str | None:
        """Of a step whose finding is DAMAGED in this or another process."""
        return self._found[step].result() if self.finding(step) == DAMAGED else None

    def forget(self, step: int) -> None:
        """Another save will take the place of what was known of this step."""
        self.intact.discard(step)
        self._found.pop(step, None)

    def wait(self) -> None:
        concurrent.futures.wait(self._found.values())

    def close(self) -> None:
        """Ends what is under way, without a finding."""
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)


def kept(
    steps: list[int],
    verified: set[int],
    losses: dict[int, float | None],
    *,
    newest: int,
    every: int | None = None,
    best: int | None = None,
) -> set[int]:
    """The steps that stay: all since the newest-th newest verified one, those divisible by `every`, and those whose
    held-out loss is no higher than the best-th lowest among the verified. So nothing goes before as many as shall
    stay are verified, and what is not verified takes no place. A step without a loss is never among the best."""
    since = sorted(verified & set(steps))[-newest:]
    stay = {step for step in steps if len(since) < newest or step >= since[0]}
    if every is not None:
        stay |= {step for step in steps if step % every == 0}
    if best is not None:
        ranked = [(loss, step) for step in steps if (loss := losses[step]) is not None]
        lowest = sorted(pair for pair in ranked if pair[1] in verified)[:best]
        stay |= {pair[1] for pair in ranked if len(lowest) < best or pair <= lowest[-1]}
    return stay


def is_damage(error: Exception) -> bool:
    """Whether an error while reading speaks against the checkpoint, not against the storage or the machine."""
    passing = isinstance(error, MemoryError | concurrent.futures.CancelledError) or of_network(error)
    return not passing and not any(text in chain(error) for text in NOT_DAMAGE)


def chain(error: BaseException | None) -> str:
    """The names and texts of an error and its causes."""
    return f"{type(error).__name__}: {error} {chain(error.__cause__)}" if error is not None else ""


def one_line(error: BaseException) -> str:
    """The first cause; the beginning and the end of it, where TensorStore puts what failed and why."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-190:]}"


def few(names: list) -> str:
    return ", ".join(map(str, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
