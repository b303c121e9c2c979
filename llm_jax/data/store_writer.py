"""Writing a token store: once, by parallel processes, and on from where an interrupted one stopped."""

import collections
import contextlib
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter

from llm_jax.config import UserError
from llm_jax.data import sources
from llm_jax.data.sources import Documents
from llm_jax.data.store import DATASET, SPLITS, Shard, TokenStore, is_complete, make_record, require_tokenizer
from llm_jax.data.tokenizer import BOS, EOS, Tokenizer

FORMAT = 1  # of the folder; part of the fingerprint
READ_AT_ONCE = 64  # documents
SMALLEST_SHARD = 4_000_000  # bytes of text: a second of work
LARGEST_SHARD = 256_000_000  # bytes of text: at most a few minutes of work are lost with the process
SHARDS = 256  # wanted, between those sizes
SECONDS_BETWEEN_LINES = 10


def prepare_store(
    train: Documents,
    held_out: Documents,
    tokenizer: Tokenizer,
    *,
    cache_dir: str,
    num_workers: int | None,
    skip_bad_documents: bool,
    say: Callable[[str], None] = print,
) -> tuple[TokenStore, TokenStore]:
    """Tokenizes what is not yet tokenized of a source and opens its store; does nothing if the store is complete.

    The files depend on the documents and the tokenizer alone, not on the number of workers or on interruptions.

    Args:
      train, held_out: the two splits of the source
      tokenizer: is sent to the workers
      cache_dir: the store goes into tokens/NAME-FINGERPRINT below it
      num_workers: processes; None: one per core
      skip_bad_documents: leave out documents that are not UTF-8, instead of stopping at the first
      say: gets a line of progress now and then if standard error is no terminal (there, a bar is shown)

    Raises:
      UserError: bad documents, damaged files, a full disk, a worker that was killed. What is finished is kept.
    """
    fingerprint = store_fingerprint(train, held_out, tokenizer, skip_bad_documents)
    folder = store_folder(train, fingerprint, cache_dir)
    if not is_complete(folder):
        with sources.disk_errors(folder), sources.locked(f"{folder}.lock"):
            if not is_complete(folder):  # another process may have written it while this one waited
                documents = {"train": train, "held_out": held_out}
                _write_store(folder, fingerprint, documents, tokenizer, num_workers, skip_bad_documents, say)
    train_store, held_out_store = (TokenStore(folder, split) for split in SPLITS)
    require_tokenizer(train_store, tokenizer)
    return train_store, held_out_store


def store_fingerprint(train: Documents, held_out: Documents, tokenizer: Tokenizer, skip_bad_documents: bool) -> str:
    identity = [FORMAT, train.fingerprint, held_out.fingerprint, tokenizer.sha256, skip_bad_documents]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def store_folder(train: Documents, fingerprint: str, cache_dir: str) -> str:
    return os.path.join(cache_dir, "tokens", f"{re.sub(r'[^A-Za-z0-9.]+', '_', train.name)}-{fingerprint[:16]}")


def _write_store(
    folder: str,
    fingerprint: str,
    documents: dict[str, Documents],
    tokenizer: Tokenizer,
    num_workers: int | None,
    skip_bad_documents: bool,
    say: Callable[[str], None],
) -> None:
    partial = os.path.join(folder, "partial")
    os.makedirs(partial, exist_ok=True)
    for file in os.listdir(partial):
        if not file.endswith(".npz"):
            os.unlink(os.path.join(partial, file))  # the beginnings of a process that was killed
    plan = {split: plan_shards(split, documents[split]) for split in SPLITS}
    missing = [shard for split in SPLITS for shard in plan[split] if not os.path.exists(shard.index_path(folder))]
    write = functools.partial(
        write_shard, documents=documents, tokenizer=tokenizer, folder=folder, skip_bad_documents=skip_bad_documents
    )
    total = sum(len(d) for d in documents.values())
    with Progress(documents["train"].name, total, say) as progress:
        progress.add(total - sum(shard.last - shard.first for shard in missing))
        num_workers = min(num_workers or num_cores(), len(missing))
        if num_workers > 1:
            _write_in_processes(missing, write, num_workers, progress.add)
        else:
            for shard in missing:
                write(shard, report=progress.add)

    description = {
        "format": FORMAT,
        "name": documents["train"].name,
        "fingerprint": fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": token_dtype(tokenizer).str,
        "splits": {split: _merge_index(folder, plan[split], documents[split]) for split in SPLITS},
    }
    _write_tfds_metadata(folder, description)
    with open(os.path.join(partial, "store.json"), "w") as file:
        json.dump(description, file, indent=2)
    os.replace(file.name, os.path.join(folder, "store.json"))
    shutil.rmtree(partial)


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
    temporary = os.path.join(folder, "partial", f"{shard.split}-{shard.number:05d}.{os.getpid()}")
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
                tokens = np.concatenate([[BOS], ids, [EOS]]).astype(dtype)
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


def _merge_index(folder: str, shards: Sequence[Shard], documents: Documents) -> dict:
    """Joins the shards' parts of the index; returns the counts of the split."""
    parts = []
    for shard in shards:
        with np.load(shard.index_path(folder)) as part:
            parts.append({name: part[name] for name in part.files})
    tokens, num_bytes, words = np.concatenate([part["index"] for part in parts]).T
    if not len(tokens):
        raise UserError(
            f"data.sources: split {documents.split!r} of {documents.name!r} has only empty or bad documents; "
            "give another one"
        )
    split = shards[0].split
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
