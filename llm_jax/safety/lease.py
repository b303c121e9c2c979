"""The lock of a run in an object store, where there are no locks: an object that whoever trains keeps renewing.

No two clocks are compared. Who finds the object watches it: if it is not renewed for as long as it says, its owner is
dead, and it is replaced, on the condition that it is still the same. Who cannot renew it for that long writes nothing
until it has: the condition of that fails if another one has taken over.
"""

import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable

from llm_jax.config import UserError
from llm_jax.safety.remote import Store, Taken, Unreachable

NAME = "lock"
SECONDS = 60.0
SECONDS_TO_END = 10.0  # for an owner that may be about to end
SECONDS_BETWEEN_LOOKS = 1.0


class Lease:
    """seconds: how long a start waits after the owner was killed on another host. lost: is called in a thread when
    another one has taken over."""

    def __init__(self, store: Store, lost: Callable[[Taken], None], seconds: float = SECONDS):
        self._store = store
        self._lost = lost
        self._seconds = seconds
        self._record = {"host": socket.gethostname(), "process": this_process(), "seconds": seconds}
        self._record["id"] = uuid.uuid4().hex
        self._renewals = 0
        self._generation = 0
        self._renewed = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")

    def acquire(self) -> None:
        """UserError if another process trains."""
        seen, since, begin, told = None, 0.0, time.monotonic(), False
        is_free = True
        while True:
            if is_free:
                with contextlib.suppress(Taken):
                    self._write()
                    break
            found = self._store.read(NAME)
            if found is None:
                self._generation, is_free = 0, True
                continue
            data, generation = found
            owner = _read(data)
            now = time.monotonic()
            if generation != seen:
                if seen is not None and now - begin > SECONDS_TO_END:
                    raise UserError(
                        f"--workdir={self._store.url} is being trained by another process, on {owner['host']}; stop "
                        "that one, or take another --workdir"
                    )
                seen, since = generation, now
            is_free = is_dead(owner["process"]) or now - since > owner["seconds"]
            if is_free:
                self._generation = generation
                continue
            if not told and now - begin > SECONDS_BETWEEN_LOOKS:
                told = True
                print(
                    f"{self._store.url} is locked by a process on {owner['host']}: if that was killed, this one goes "
                    f"on in {owner['seconds']:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(min(SECONDS_BETWEEN_LOOKS, owner["seconds"] / 10))
        self._thread.start()

    def confirm(self) -> None:
        """Returns if nobody else can have taken over. Unreachable where that cannot be told."""
        with self._lock:
            if time.monotonic() - self._renewed > self._seconds / 2:
                self._renew()

    def release(self) -> None:
        """Does nothing if it has not been acquired, or is released already."""
        if self._thread.ident is not None and not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self._store.delete(NAME, self._generation)

    def _write(self) -> None:
        self._renewals += 1
        begin = time.monotonic()
        data = json.dumps(self._record | {"renewals": self._renewals}).encode()
        self._generation = self._store.write(NAME, data, self._generation, seconds=self._seconds / 4)
        self._renewed = begin

    def _renew(self) -> None:
        try:
            self._write()
        except Taken as taken:
            self._lost(taken)

    def _keep(self) -> None:
        failed = False
        while not self._closed.wait(self._seconds / 4):
            try:
                with self._lock:
                    self._renew()
            except Unreachable as error:
                if not failed:
                    print(f"WARNING: nothing is saved until the lock is renewed: {error}", file=sys.stderr, flush=True)
                failed = True
            else:
                failed = False


def this_process() -> str:
    """What no other process has, wherever and whenever it runs; "" where that cannot be told."""
    return _process(os.getpid())


def is_dead(process: str) -> bool:
    """Whether a process, as this_process says, has ended; False if it is not of this host and its namespace."""
    if not process or process.split()[:2] != this_process().split()[:2]:
        return False
    return _process(int(process.split()[2])) != process


def _process(number: int) -> str:
    """Boot of the host, namespace, number, time of birth in ticks."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    born = "killed" if fields[0] in "ZX" else fields[22 - 3]
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {number} {born}"


def _read(data: bytes) -> dict:
    try:
        owner = json.loads(data)
        return {"host": str(owner["host"]), "process": str(owner["process"]), "seconds": float(owner["seconds"])}
    except (ValueError, KeyError, TypeError):  # not written by us: nobody renews it
        return {"host": "an unknown host", "process": "", "seconds": SECONDS}
