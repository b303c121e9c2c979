"""Runs at gs://BUCKET/PATH: the objects there, and a local copy of the small ones.

Checkpoints are not copied: Orbax and TensorStore write and read them there. What is small and grows (the record, the
ledger) or is read by path (tokenizer, config) lies in a folder of this process alone, and is uploaded as a whole when
it has changed. Object stores cannot append, but replace an object at once or not at all.
"""

import base64
import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from llm_jax.config import RunFailed, UserError

SECONDS_TO_TRY = 60.0  # again, where the store does not answer or says that it is busy
SECONDS_BETWEEN_PUSHES = 60.0
PROBES = 8  # requests
LIBRARIES = ("aiohttp", "gcsfs", "google", "requests")  # what they raise, but for FileNotFoundError, is of the network
UNFINISHED = (".new", ".tmp")  # names end so until what they hold is whole
PULLED = ("config.json", "tokenizer.model", "metrics.jsonl", "ledger.jsonl", "rewinds.json", "evaluate.json")
SHARED = ("evaluate.json",)  # `evaluate` writes it beside a training; all else only the one that has the lock


def is_url(path: str | os.PathLike) -> bool:
    """gs:/ is one, too: pathlib makes that of gs://, and a folder of this machine."""
    return "://" in str(path) or str(path).startswith("gs:/")


class Taken(Exception):
    """Somebody else has written an object that is ours alone."""


class Unreachable(RunFailed):
    """The store did not answer for long; what was asked of it may have been done or not."""


class Store:
    """The objects below gs://BUCKET/PATH, by their names from there on.

    A request is repeated for up to SECONDS_TO_TRY, then Unreachable is raised. UserError where the URL, the
    credentials, the bucket or a permission is wrong.
    """

    def __init__(self, url: str):
        self.bucket, _, path = url.removeprefix("gs://").partition("/")
        if not url.startswith("gs://") or not self.bucket:
            raise UserError(
                f"--workdir={url} is neither a folder nor gs://BUCKET/PATH; of another store, mount the bucket and "
                "give its folder"
            )
        if not _is_installed("gcsfs") or not _is_installed("google.cloud.storage"):
            raise UserError(f"--workdir={url} needs gcsfs; install it with: pip install 'llm-jax[gcs]'")
        import fsspec
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY

        # For Orbax, by epath: other processes write here, too. And each failure is raised or told, once.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        self.prefix = path.strip("/") + "/" if path.strip("/") else ""
        self.url = f"gs://{self.bucket}/{self.prefix}".rstrip("/")
        self._retry = DEFAULT_RETRY.with_timeout(SECONDS_TO_TRY)
        self._tried: dict[str, set[str]] = {}  # checksums of what may have been written, though no answer came
        with self._told("opened"):
            self._objects = storage.Client().get_bucket(self.bucket, retry=self._retry)

    @contextlib.contextmanager
    def _told(self, done: str) -> Iterator[None]:
        """Errors in one line. done: what could not be done to the URL."""
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError, TransportError

        try:
            yield
        except exceptions.Forbidden as error:
            raise UserError(
                f"{self.url} cannot be {done}: {_line(error)}; grant the roles storage.objectUser and "
                f"storage.bucketViewer on gs://{self.bucket}"
            ) from error
        except exceptions.NotFound as error:
            raise UserError(
                f"{self.url} cannot be {done}: there is no such bucket; check the name, or make it by "
                f"`gcloud storage buckets create gs://{self.bucket}`"
            ) from error
        except Exception as error:
            if not of_network(error):
                raise
            unknown = isinstance(error, GoogleAuthError | exceptions.Unauthorized)
            if done == "opened" and unknown and not isinstance(error, TransportError):
                raise UserError(
                    f"{self.url} cannot be opened: {_line(error)}; run `gcloud auth application-default login`, or "
                    "give the VM a service account with the scope cloud-platform"
                ) from error
            raise Unreachable(f"{self.url} cannot be {done} for now: {_line(error)}") from error

    def list(self, folder: str = "") -> tuple[dict[str, int], list[str]]:
        """What lies in a folder: the generation of each object, and the folders, with a slash at the end."""
        prefix = self.prefix + folder
        with self._told("listed"):
            listed = self._objects.list_blobs(prefix=prefix, delimiter="/", retry=self._retry)
            blobs = {blob.name.removeprefix(self.prefix): blob.generation for blob in listed if blob.name != prefix}
        return blobs, sorted(name.removeprefix(self.prefix) for name in listed.prefixes)

    def read(self, name: str) -> tuple[bytes, int] | None:
        """(content, generation)"""
        from google.api_core.exceptions import NotFound

        blob = self._objects.blob(self.prefix + name)
        with self._told("read"):
            try:
                data = blob.download_as_bytes(retry=self._retry)
            except NotFound:
                return None
        return data, blob.generation

    def write(self, name: str, data: bytes, generation: int | None, *, seconds: float = SECONDS_TO_TRY) -> int:
        """Replaces the object of that generation, 0: makes one that is not there, None: whatever there is. The new
        generation; Taken if it is another one that is there."""
        import google_crc32c
        from google.api_core.exceptions import NotFound, PreconditionFailed

        blob = self._objects.blob(self.prefix + name)
        checksum = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
        tried = self._tried.setdefault(name, set())
        tried.add(checksum)
        while True:
            with self._told("written"):
                try:
                    blob.upload_from_string(
                        data,
                        "application/octet-stream",
                        if_generation_match=generation,
                        retry=self._retry.with_timeout(seconds),
                        timeout=seconds,
                    )
                    break
                except PreconditionFailed as error:
                    # The answer to an upload of ours may have been lost: then it is we who wrote what is there.
                    try:
                        blob.reload(retry=self._retry)
                    except NotFound:
                        raise Taken(name) from error
                    if blob.crc32c not in tried:
                        raise Taken(name) from error
                    if blob.crc32c == checksum:
                        break
                    generation = blob.generation
        tried.clear()
        return blob.generation

    def delete(self, name: str, generation: int | None = None) -> None:
        """Does nothing where it is not there, or is of another generation."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with self._told("written"), contextlib.suppress(NotFound, PreconditionFailed):
            self._objects.blob(self.prefix + name).delete(if_generation_match=generation, retry=self._retry)

    def probe(self, folder: str, sample: bytes) -> float:
        """Seconds to write a sample as checkpoints are written, by several requests at once. OSError if it cannot."""
        import tensorstore

        size = max(1, -(-len(sample) // PROBES))
        parts = {f"{folder}/{at}": sample[at : at + size] for at in range(0, len(sample), size)}
        try:
            store = tensorstore.KvStore.open(f"{self.url}/").result()
            begin = time.monotonic()
            for written in [store.write(name, part) for name, part in parts.items()]:
                written.result()
            return time.monotonic() - begin
        except ValueError as error:  # whatever TensorStore says
            raise OSError(errno.EIO, _line(error)) from error
        finally:
            for name in parts:
                self.delete(name)


@contextlib.contextmanager
def told(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the network, of whatever library, in one line."""
    try:
        yield
    except Exception as error:
        if not of_network(error) or isinstance(error, Unreachable):
            raise
        raise Unreachable(f"{path} does not answer ({type(error).__name__}: {_line(error)})") from error


class Mirror:
    """A folder with the small files of a run, for this process alone.

    It begins empty, so that nothing of an earlier start can win over what is in the store. It is removed when the
    process ends; if that was killed, by the next one on this host.
    """

    def __init__(self, store: Store):
        self.store = store
        self._known: dict[str, tuple[tuple, int]] = {}  # what the file was like when it was equal to that generation
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = None
        place, self._prefix = pathlib.Path(tempfile.gettempdir()), f"llm_jax-{_digest(store.url)}-"
        new = pathlib.Path(tempfile.mkdtemp(prefix="llm_jax-new-", dir=place))
        # While it is locked, it is in use; systemd-tmpfiles respects that, too.
        self._held = os.open(new, os.O_RDONLY)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        self.folder = place / f"{self._prefix}{new.name.rpartition('-')[2]}"
        new.rename(self.folder)
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def pull(self) -> None:
        """Makes the folder equal to the store, whatever it holds: the files of a run and its incidents. Checkpoints
        are read where they are, and the rest is only written."""
        there = {name: at for name, at in self.store.list()[0].items() if name in PULLED}
        for folder in self.store.list("incidents/")[1]:
            there |= self.store.list(folder)[0]
        for name in self._known.keys() - there.keys():
            (self.folder / name).unlink(missing_ok=True)
            del self._known[name]
        changed = [name for name, at in there.items() if name not in self._known or self._known[name][1] != at]
        with concurrent.futures.ThreadPoolExecutor(8, "pull") as threads:
            for name, found in zip(changed, threads.map(self.store.read, changed), strict=True):
                if found is not None:
                    path = self.folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(found[0])
                    self._known[name] = (_state(path), found[1])

    def push(self, *names: str) -> None:
        """Uploads what has changed, of these files or of all. Taken if somebody else has written one of them."""
        for name in names or [path.relative_to(self.folder).as_posix() for path in _files(self.folder)]:
            with self._lock:
                self._push(name)

    def _push(self, name: str) -> None:
        path = self.folder / name
        known, generation = self._known.get(name, (None, 0))
        try:
            state = _state(path)
            if state == known:
                return
            data = path.read_bytes()  # after its state: it may grow meanwhile
        except FileNotFoundError:  # not written yet, or under another name now
            return
        self._known[name] = (state, self.store.write(name, data, None if name in SHARED else generation))

    def keep_pushing(self, lost: Callable[[Taken], None]) -> None:
        """From now on, every minute, in a thread. lost: what to do when a file was written by somebody else."""

        def push() -> None:
            pause = SECONDS_BETWEEN_PUSHES
            while not self._closed.wait(pause):
                begin = time.monotonic()
                try:
                    self.push()
                except Taken as taken:
                    lost(taken)
                except Unreachable as error:
                    print(f"WARNING: {error}", file=sys.stderr, flush=True)
                pause = max(SECONDS_BETWEEN_PUSHES, 10 * (time.monotonic() - begin))  # a long record takes long

        self._thread = threading.Thread(target=push, daemon=True, name="push")
        self._thread.start()

    def salvage(self) -> None:
        """Uploads what killed processes of this host have left that tells why, and removes the rest of it."""
        for left in self.folder.parent.glob(f"{self._prefix}*"):
            if left == self.folder:
                continue
            with contextlib.suppress(FileNotFoundError, PermissionError):
                descriptor = os.open(left, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for path in _files(left):
                        name = path.relative_to(left).as_posix()
                        if name.startswith(("stacks/", "incidents/")):
                            with contextlib.suppress(Taken):  # it is there already
                                self.store.write(name, path.read_bytes(), 0)
                    shutil.rmtree(left)
                except BlockingIOError:
                    pass  # its process is alive
                finally:
                    os.close(descriptor)

    def close(self) -> None:
        """Ends the thread, and removes the folder."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self._remove()
        os.close(self._held)


def of_network(error: BaseException | None) -> bool:
    """Whether it says that a store could not be reached or asked, not what it holds."""
    while error is not None and not isinstance(error, Taken | UserError):
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, Unreachable | ConnectionError | TimeoutError) or library in LIBRARIES:
            return True
        error = error.__cause__
    return False


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.endswith(UNFINISHED) for part in path.relative_to(folder).parts)
    )


def _state(path: pathlib.Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _digest(url: str) -> str:
    return hashlib.sha256(f"{os.getuid()} {url}".encode()).hexdigest()[:12]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
