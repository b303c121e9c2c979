"""Writing a token store: once, by processes of one host or several, and on from where an interrupted one stopped."""

import collections
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter

from llm_jax.config import UserError
from llm_jax.data import sources
from llm_jax.data.sources import Documents
from llm_jax.data.store import DATASET, SPLITS, Shard, TokenStore, is_complete, make_record, require_tokenizer
from llm_jax.data.tokenizer import Tokenizer

FORMAT = 1  # of the folder; part of the fingerprint
READ_AT_ONCE = 64  # documents
SMALLEST_SHARD = 4_000_000  # bytes of text: a second of work
LARGEST_SHARD = 256_000_000  # bytes of text: at most a few minutes of work are lost with the process
SHARDS = 256  # wanted, between those sizes
SECONDS_BETWEEN_LINES = 10
SECONDS_BETWEEN_LOOKS = 1  # at what others have finished
SECONDS_BETWEEN_REASONS = 60


class Part(NamedTuple):
    """What one of several hosts writes of each store: every count-th shard from number on."""

    number: int
    count: int


ALL = Part(0, 1)


def prepare_store(
    train: Documents,
    held_out: Documents,
    tokenizer: Tokenizer,
    *,
    cache_dir: str,
    num_workers: int | None,
    skip_bad_documents: bool,
    say: Callable[[str], None] = print,
    part: Part = ALL,
) -> tuple[TokenStore, TokenStore]:
    """Tokenizes what is not yet tokenized of a source and opens its store; does nothing if the store is complete.

    The files depend on the documents and the tokenizer alone, not on the number of workers, hosts or interruptions.

    Args:
      train, held_out: the two splits of the source
      tokenizer: is sent to the workers
      cache_dir: the store goes into tokens/NAME-FINGERPRINT below it
      num_workers: processes; None: one per core
      skip_bad_documents: leave out documents that are not UTF-8, instead of stopping at the first
      say: gets a line of progress now and then if standard error is no terminal (there, a bar is shown), and whenever
        others are waited for
      part: of several hosts that see the same cache_dir, each writes its own part and waits for the others; the first
        then writes the index and the metadata

    Raises:
      UserError: bad documents, damaged files, a full disk, a worker that was killed. What is finished is kept.
    """
    fingerprint = store_fingerprint(train, held_out, tokenizer, skip_bad_documents)
    folder = store_folder(train, fingerprint, cache_dir)
    documents = {"train": train, "held_out": held_out}
    if not is_complete(folder):
        with sources.disk_errors(folder), _locked(folder, part, say):
            if not is_complete(folder):  # another process may have written it while this one waited
                _write_shards(folder, documents, tokenizer, num_workers, skip_bad_documents, say, part)
                wait_while(lambda: _waits_for(folder, documents, part), say)
                if part.number == 0:
                    _complete(folder, fingerprint, documents, tokenizer)
    train_store, held_out_store = (TokenStore(folder, split) for split in SPLITS)
    require_tokenizer(train_store, tokenizer)
    return train_store, held_out_store


def write_part(
    train: Documents,
    held_out: Documents,
    tokenizer: Tokenizer,
    *,
    cache_dir: str,
    num_workers: int | None,
    skip_bad_documents: bool,
    say: Callable[[str], None],
    part: Part,
) -> None:
    """The part of prepare_store that waits for nobody: it tokenizes the shards of this host that are missing."""
    fingerprint = store_fingerprint(train, held_out, tokenizer, skip_bad_documents)
    folder = store_folder(train, fingerprint, cache_dir)
    documents = {"train": train, "held_out": held_out}
    if not is_complete(folder):
        with sources.disk_errors(folder), _locked(folder, part, say):
            _write_shards(folder, documents, tokenizer, num_workers, skip_bad_documents, say, part)


def store_fingerprint(train: Documents, held_out: Documents, tokenizer: Tokenizer, skip_bad_documents: bool) -> str:
    identity = [FORMAT, train.fingerprint, held_out.fingerprint, tokenizer.sha256, skip_bad_documents]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def store_folder(train: Documents, fingerprint: str, cache_dir: str) -> str:
    return os.path.join(cache_dir, "tokens", f"{re.sub(r'[^A-Za-z0-9.]+', '_', train.name)}-{fingerprint[:16]}")


def missing_shards(folder: str, documents: dict[str, Documents], part: Part) -> list[Shard]:
    """Those of a part that have still to be written."""
    missing = [shard for shard in part_shards(documents, part) if not os.path.exists(shard.index_path(folder))]
    # Asked last: when the store is complete, the marks of the finished shards are removed.
    return [] if is_complete(folder) else missing


def part_shards(documents: dict[str, Documents], part: Part) -> list[Shard]:
    shards = [shard for split in SPLITS for shard in plan_shards(split, documents[split])]
    return shards[part.number :: part.count]


def wait_while(reason: Callable[[], str], say: Callable[[str], None]) -> None:
    """Returns when there is no reason to wait any more; says it at once and then every minute."""
    said = -math.inf
    while text := reason():
        if time.monotonic() > said + SECONDS_BETWEEN_REASONS:
            said = time.monotonic()
            say(f"waiting: {text}")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _waits_for(folder: str, documents: dict[str, Documents], part: Part) -> str:
    """Whom a part waits for when its own shards are there; process 0 for all shards, the others for the whole store."""
    shards = part_shards(documents, ALL)
    missing = set(missing_shards(folder, documents, ALL))
    todo = collections.Counter(i % part.count for i, shard in enumerate(shards) if shard in missing)
    if todo:
        whose = ", ".join(f"process {number} has {todo[number]} to write" for number in sorted(todo))
        return f"of the {len(shards)} shards of {documents['train'].name}, {whose}: {folder}"
    return "" if part.number == 0 or is_complete(folder) else f"process 0 has to write the index of {folder}"


@contextlib.contextmanager
def _locked(folder: str, part: Part, say: Callable[[str], None]) -> Iterator[None]:
    """Alone on the store; or, as one of several hosts, alone on its part. The lock goes with the process.

    A host locks one byte of the file, a process that does all of it the whole file. Where locks do not reach over
    hosts, the shards are right all the same: they appear by rename, and whoever writes one writes the same bytes.
    """
    path = f"{folder}.lock"  # beside the folder: NFS keeps a file that is open, and so would the folder "partial"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    length, start = (0, 0) if part.count == 1 else (1, part.number)
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except (BlockingIOError, PermissionError):  # either may mean that it is taken: fcntl(2)
            say(f"waiting: another process is writing {folder}; if its host is gone, delete {path} and start again")
            fcntl.lockf(file, fcntl.LOCK_EX, length, start)
        yield


def _write_shards(
    folder: str,
    documents: dict[str, Documents],
    tokenizer: Tokenizer,
    num_workers: int | None,
    skip_bad_documents: bool,
    say: Callable[[str], None],
    part: Part,
) -> None:
    """Writes the shards of a part that are missing."""
    missing = missing_shards(folder, documents, part)
    if not missing:
        return
    partial = os.path.join(folder, "partial")
    os.makedirs(partial, exist_ok=True)
    mine = {f"{shard.split}-{shard.number:05d}" for shard in missing}
    for file in os.listdir(partial):
        if file.partition(".")[0] in mine:
            os.unlink(os.path.join(partial, file))  # the beginnings of a process that was killed
    write = functools.partial(
        write_shard, documents=documents, tokenizer=tokenizer, folder=folder, skip_bad_documents=skip_bad_documents
    )
    name = documents["train"].name + (f", process {part.number} of {part.count}" if part.count > 1 else "")
    total = num_documents(part_shards(documents, part))
    with Progress(name, total, say) as progress:
        progress.add(total - num_documents(missing))
        num_workers = min(num_workers or num_cores(), len(missing))
        if num_workers > 1:
            _write_in_processes(missing, write, num_workers, progress.add)
        else:
            for shard in missing:
                write(shard, report=progress.add)


def _complete(folder: str, fingerprint: str, documents: dict[str, Documents], tokenizer: Tokenizer) -> None:
    """Writes the index and the metadata of a store all of whose shards are there."""
    description = {
        "format": FORMAT,
        "name": documents["train"].name,
        "fingerprint": fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": token_dtype(tokenizer).str,
        "splits": {split: _merge_index(folder, split, documents[split]) for split in SPLITS},
    }
    _write_tfds_metadata(folder, description)
    partial = os.path.join(folder, "partial")
    with open(os.path.join(partial, "store.json"), "w") as file:
        json.dump(description, file, indent=2)
    os.replace(file.name, os.path.join(folder, "store.json"))
    shutil.rmtree(partial)


def num_documents(shards: Sequence[Shard]) -> int:
    return sum(shard.last - shard.first for shard in shards)


def plan_shards(split: str, documents: Documents) -> list[Shard]:
    """Cuts a split into files by its size alone, so that any number of workers writes the same ones."""
    size = min(max(documents.num_bytes / SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    count = min(max(1, round(documents.num_bytes / size)), len(documents))
    bounds = [len(documents) * number // count for number in range(count + 1)]
    return [Shard(split, number, count, *bounds[number : number + 2]) for number in range(count)]


def num_cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def write_shard(
    shard: Shard,
    *,
    documents: dict[str, Documents],
    tokenizer: Tokenizer,
    folder: str,
    skip_bad_documents: bool,
    report: Callable[[int], None],
) -> None:
    """Tokenizes the documents of one shard into its file and its part of the index; reports how many as it goes."""
    source = documents[shard.split]
    dtype = token_dtype(tokenizer)
    index = []
    empty = bad = 0
    temporary = os.path.join(folder, "partial", f"{shard.split}-{shard.number:05d}.{uuid.uuid4().hex}")
    with sources.disk_errors(folder):
        # A record is a chunk of its own, so that reading one decompresses one.
        writer = ArrayRecordWriter(temporary, "group_size:1")
        for first in range(shard.first, shard.last, READ_AT_ONCE):
            indices = range(first, min(first + READ_AT_ONCE, shard.last))
            texts = source.read_strings(indices, skip_bad_documents)
            bad += sum(text is None for text in texts)
            empty += sum(text is not None and not text.strip() for text in texts)
            good = [(i, text) for i, text in zip(indices, texts, strict=True) if text and text.strip()]
            for (i, text), ids in zip(good, tokenizer.encode([text for _, text in good]), strict=True):
                tokens = np.concatenate([[tokenizer.bos], ids, [tokenizer.eos]]).astype(dtype)
                writer.write(make_record(tokens.tobytes(), source.key(i)))
                index.append((len(tokens), len(text.encode()), len(text.split())))
            report(len(indices))
        writer.close()
        with open(f"{temporary}.index", "wb") as file:
            np.savez(file, index=np.array(index, np.int64).reshape(-1, 3), empty=empty, bad=bad)
        os.replace(temporary, shard.path(folder))
        os.replace(f"{temporary}.index", shard.index_path(folder))  # last: with it, the shard is finished


def _write_in_processes(
    shards: Sequence[Shard], write: Callable, num_workers: int, report: Callable[[int], None]
) -> None:
    """Hands the shards out to processes one by one. The first error stops them all and is raised here.

    Pipes of our own, not an executor: a worker that is killed is noticed at once, and workers end with this process.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads and locks of JAX
    todo = collections.deque(shards)
    workers = {}

    def hand_out(pipe: multiprocessing.connection.Connection) -> None:
        with contextlib.suppress(BrokenPipeError):  # of a dead worker: its end of file is seen next
            pipe.send(todo.popleft() if todo else None)

    try:
        for _ in range(num_workers):
            pipe, theirs = context.Pipe()
            workers[pipe] = context.Process(target=_work, args=(theirs, write), daemon=True)
            workers[pipe].start()
            theirs.close()
            hand_out(pipe)
        while workers:
            ready = multiprocessing.connection.wait(list(workers))
            for pipe in [pipe for pipe in workers if pipe in ready]:
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process = workers.pop(pipe)
                    process.join()
                    if process.exitcode > 0:
                        raise RuntimeError("a tokenizing process failed; its traceback is above") from None
                    if process.exitcode < 0:
                        raise UserError(
                            f"a tokenizing process was killed by signal {-process.exitcode}, perhaps for lack of "
                            "memory; lower data.num_workers and run the same command again: what is finished is kept"
                        ) from None
                    continue
                if isinstance(message, UserError):
                    raise message
                if message == "done":
                    hand_out(pipe)
                else:
                    report(message)
    finally:
        for process in workers.values():
            process.kill()
        for process in workers.values():
            process.join()


def _work(pipe: multiprocessing.connection.Connection, write: Callable) -> None:
    """A worker: writes the shards it is sent until it is sent None. It never imports JAX."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and notices to the whole group are the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        while (shard := pipe.recv()) is not None:
            try:
                write(shard, report=pipe.send)
            except UserError as error:
                pipe.send(error)
                return
            pipe.send("done")


def _merge_index(folder: str, split: str, documents: Documents) -> dict:
    """Joins the shards' parts of the index; returns the counts of the split."""
    parts = []
    for shard in plan_shards(split, documents):
        with np.load(shard.index_path(folder)) as part:
            parts.append({name: part[name] for name in part.files})
    tokens, num_bytes, words = np.concatenate([part["index"] for part in parts]).T
    if not len(tokens):
        raise UserError(
            f"data.sources: split {documents.split!r} of {documents.name!r} has only empty or bad documents; "
            "give another one"
        )
    np.save(os.path.join(folder, f"{split}.ends.npy"), np.cumsum(tokens))
    np.save(os.path.join(folder, f"{split}.bytes.npy"), num_bytes.astype(np.uint32))
    np.save(os.path.join(folder, f"{split}.words.npy"), words.astype(np.uint32))
    return {
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
        "bytes": int(num_bytes.sum()),
        "words": int(words.sum()),
        "empty": int(sum(part["empty"] for part in parts)),
        "bad": int(sum(part["bad"] for part in parts)),
        "shard_lengths": [len(part["index"]) for part in parts],
    }


def _write_tfds_metadata(folder: str, description: dict) -> None:
    template = tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(folder),
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name=DATASET,
        filetype_suffix="array_record",
    )
    itemsize = np.dtype(description["dtype"]).itemsize
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict(
            {"tokens": tfds.features.Tensor(shape=(), dtype=np.object_), "key": tfds.features.Text()}
        ),
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=counts["shard_lengths"],
                num_bytes=counts["tokens"] * itemsize,
                filename_template=template.replace(split=split),
            )
            for split, counts in description["splits"].items()
        ],
        filename_template=template,
        check_data=False,  # it would need TensorFlow
        description=f"{description['name']} as token ids of type {description['dtype']}, one document a record.",
    )


class Progress:
    """Counts documents: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, name: str, total: int, say: Callable[[str], None]):
        self.name = name
        self.total = total
        self.say = say
        self.done = 0
        self.said = time.monotonic()
        self.bar = tqdm.tqdm(total=total, desc=f"tokenizing {name}", unit=" documents", disable=not sys.stderr.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def add(self, documents: int) -> None:
        self.done += documents
        self.bar.update(documents)
        if self.bar.disable and time.monotonic() > self.said + SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            self.say(f"tokenizing {self.name}: {self.done:,} of {self.total:,} documents")
