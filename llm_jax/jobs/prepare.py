"""`llm-jax prepare`: from the documents of every source to a tokenizer and token stores. Does only what is missing.

It needs no accelerator and never touches one; `train` runs it by itself.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable

import numpy as np

from llm_jax import config
from llm_jax.config import Config, UserError
from llm_jax.data import sources, store_writer
from llm_jax.data.sources import Documents
from llm_jax.data.store import TokenStore
from llm_jax.data.store_writer import ALL, Part
from llm_jax.data.tokenizer import SETTINGS, Tokenizer, load_tokenizer, sample_texts, train_tokenizer

SAMPLED_BYTES = 1_000_000  # of text, tokenized to estimate how long the rest takes
INDEX_AT_ONCE = 1 << 20  # documents whose lengths are looked at
SAMPLE_SEED = 0  # of the text the tokenizer is trained on: the same tokenizer whatever train.seed


@dataclasses.dataclass
class Prepared:
    """What training and evaluation read; the keys are the sources' names, with the split where a name comes twice."""

    tokenizer: Tokenizer
    train: dict[str, TokenStore]
    held_out: dict[str, TokenStore]
    weights: dict[str, float]  # as in the config, for training


def prepare(config: Config, *, say: Callable[[str], None] = print, part: Part = ALL) -> Prepared:
    """Opens the sources, trains or loads the tokenizer and writes the token stores, as far as they are not there.

    Args:
      config: the sections tokenizer and data
      say: gets a line for each stage that takes time, and whenever other processes are waited for
      part: of several hosts, each tokenizes its part; the first trains the tokenizer and completes the stores

    Raises:
      UserError: bad input, or a disk that cannot be written
    """
    cache = cache_dir(config.data)
    with sources.disk_errors(cache):
        os.makedirs(cache, exist_ok=True)
        names = source_names(config.data)
        train, held_out = {}, {}
        for name, source in names.items():
            train[name], held_out[name] = open_splits(source, config.data.data_dir, cache, say)
        tokenizer = make_tokenizer(config, train, cache, say, part)

        def each(function: Callable) -> dict:
            results = {}
            for name in names:
                announce(train[name], held_out[name], tokenizer, config.data, cache, say, part)
                results[name] = function(
                    train[name],
                    held_out[name],
                    tokenizer,
                    cache_dir=cache,
                    num_workers=config.data.num_workers,
                    skip_bad_documents=config.data.skip_bad_documents,
                    say=say,
                    part=part,
                )
            return results

        if part.count > 1:
            each(store_writer.write_part)  # of all stores, before the first wait for the other hosts
        stores = each(store_writer.prepare_store)
    return Prepared(
        tokenizer=tokenizer,
        train={name: pair[0] for name, pair in stores.items()},
        held_out={name: pair[1] for name, pair in stores.items()},
        weights={name: source.weight for name, source in names.items()},
    )


def run(
    config: Config,
    workdir: str | None = None,
    as_json: bool = False,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """The verb: prepares and prints a table or JSON. A workdir is not needed and not touched."""
    del workdir
    part = part_of(num_processes, process_id)
    say = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    result = summary(prepare(config, say=say, part=part), config.train)
    print(json.dumps(result, indent=2) if as_json else table(result))


def part_of(num_processes: int | None, process_id: int | None) -> Part:
    """The part of this host, from its flags."""
    if num_processes is None and process_id is None:
        return ALL
    if num_processes is None or process_id is None:
        missing = "--num_processes" if num_processes is None else "--process_id"
        raise UserError(f"--num_processes and --process_id belong together; give {missing}, too")
    if process_id >= num_processes:
        raise UserError(f"--process_id={process_id} must be less than --num_processes={num_processes}")
    return Part(process_id, num_processes)


def cache_dir(data: config.Data) -> str:
    """Where tokenizers, token stores and built corpora lie."""
    path = data.cache_dir or os.environ.get("LLM_JAX_CACHE") or os.path.join("~", ".cache", "llm_jax")
    if "://" in path:  # of data.cache_dir, the config says so
        raise UserError(f"LLM_JAX_CACHE={path} must be a folder: mount the bucket, and give the path of that")
    return os.path.abspath(os.path.expanduser(path))


def source_names(data: config.Data) -> dict[str, config.Source]:
    """The sources by name, or by "name split" where a dataset is used with several splits."""
    count = [source.name for source in data.sources].count
    return {s.name if count(s.name) == 1 else f"{s.name} {s.split}": s for s in data.sources}


def open_splits(
    source: config.Source, data_dir: str | None, cache: str, say: Callable[[str], None]
) -> tuple[Documents, Documents]:
    """The training and held-out documents of a source, which must not overlap."""
    train = sources.open_documents(source, source.split, data_dir=data_dir, cache_dir=cache, say=say)
    held_out = sources.open_documents(source, source.held_out, data_dir=data_dir, cache_dir=cache, say=say)
    if key := train.overlap(held_out):
        split = key.partition(":")[0]
        raise UserError(
            f"data.sources: split={source.split!r} and held_out={source.held_out!r} of {source.name!r} share "
            f"documents, {key} for one; try split='{split}[:98%]', held_out='{split}[98%:]'"
        )
    return train, held_out


def make_tokenizer(
    config: Config, train: dict[str, Documents], cache: str, say: Callable[[str], None], part: Part
) -> Tokenizer:
    """The given tokenizer, or one trained on a sample of the sources, or that one as it was trained before."""
    settings = config.tokenizer
    if settings.model_file is not None:
        return load_tokenizer(os.path.expanduser(settings.model_file))
    skip_bad = config.data.skip_bad_documents
    weights = [source.weight for source in config.data.sources]
    total = sum(weights)
    sampled = [
        [documents.fingerprint, weight / total] for documents, weight in zip(train.values(), weights, strict=True)
    ]
    identity = [settings.kind, settings.vocab_size, settings.train_bytes, SAMPLE_SEED, SETTINGS, skip_bad, sampled]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    path = os.path.join(cache, "tokenizers", f"{fingerprint[:16]}.model")
    if part.number > 0:
        reason = f"process 0 has to train the tokenizer {path}"
        store_writer.wait_while(lambda: "" if os.path.exists(path) else reason, say)
    if os.path.exists(path):
        return load_tokenizer(path)
    with sources.locked(os.path.join(cache, "tokenizers.lock")):
        if os.path.exists(path):  # another process has trained it while this one waited
            return load_tokenizer(path)
        shares = [settings.train_bytes * weight / sum(weights) for weight in weights]
        size = sum(min(share, documents.num_bytes) for share, documents in zip(shares, train.values(), strict=True))
        say(f"training a {settings.kind} tokenizer of {settings.vocab_size:,} pieces on {size / 1e6:.1f} MB of text")
        begin = time.monotonic()
        sample = sample_texts(list(train.values()), weights, settings.train_bytes, SAMPLE_SEED, skip_bad)
        tokenizer = train_tokenizer(sample, kind=settings.kind, vocab_size=settings.vocab_size)
        tokenizer.save(path)
        say(f"trained the tokenizer in {time.monotonic() - begin:.0f} s: {path}")
    return tokenizer


def announce(
    train: Documents,
    held_out: Documents,
    tokenizer: Tokenizer,
    data: config.Data,
    cache: str,
    say: Callable[[str], None],
    part: Part,
) -> None:
    """Says how long the tokenizing of a source will take here, from a small sample; nothing if it is done."""
    fingerprint = store_writer.store_fingerprint(train, held_out, tokenizer, data.skip_bad_documents)
    folder = store_writer.store_folder(train, fingerprint, cache)
    missing = store_writer.missing_shards(folder, {"train": train, "held_out": held_out}, part)
    if not missing:
        return
    sample = list(sample_texts([train], [1.0], SAMPLED_BYTES, SAMPLE_SEED, data.skip_bad_documents))
    if not any(sample):
        return  # nothing to measure; whether there is nothing to tokenize is found out soon
    begin = time.monotonic()
    tokenizer.encode(sample)
    bytes_per_second = sum(len(text.encode()) for text in sample) / max(time.monotonic() - begin, 1e-6)
    workers = data.num_workers or store_writer.num_cores()
    documents = store_writer.num_documents(missing)
    num_bytes = (train.num_bytes + held_out.num_bytes) * documents / (len(train) + len(held_out))
    seconds = num_bytes / bytes_per_second / min(workers, store_writer.num_cores())
    say(
        f"tokenizing {train.name}: {documents:,} documents, {num_bytes / 1e6:,.1f} MB, "
        f"{workers} worker{'s' if workers > 1 else ''}, about {duration(seconds)}"
    )


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def summary(prepared: Prepared, train: config.Train | None = None) -> dict:
    """Counts for each source and split, and the tokenizer's.

    Args:
      train: adds the lengths of the documents, in tokens with bos and eos, the share of those shorter than
        train.sequence_length, and how often train.steps updates go through each source (epochs)
    """
    shares = {name: weight / sum(prepared.weights.values()) for name, weight in prepared.weights.items()}
    result = {
        "tokenizer": {
            "kind": prepared.tokenizer.kind,
            "vocab_size": prepared.tokenizer.vocab_size,
            "sha256": prepared.tokenizer.sha256,
        },
        "sources": {
            name: {"train": counts(prepared.train[name]), "held_out": counts(prepared.held_out[name])}
            for name in prepared.train
        },
    }
    if train is not None:
        for name, splits in result["sources"].items():
            for part, split in ((prepared.train[name], "train"), (prepared.held_out[name], "held_out")):
                splits[split] |= lengths(part, train.sequence_length)
            rows = train.steps * train.batch_size * shares[name]
            windows = math.ceil((prepared.train[name].num_tokens - 1) / train.sequence_length)  # see data/stream.py
            splits["train"]["epochs"] = rows / windows
    return result


def counts(part: TokenStore) -> dict:
    return {
        "documents": part.num_documents,
        "tokens": part.num_tokens,
        "bytes": part.num_bytes,
        "words": part.num_words,
        "bytes_per_token": part.num_bytes / part.num_tokens,
        "empty_documents": part.num_empty,
        "bad_documents": part.num_bad,
        "folder": part.folder,
    }


def lengths(part: TokenStore, sequence_length: int) -> dict:
    """How long the documents are, in tokens. Percentiles are those between two documents, as numpy's."""
    num_of_length = np.zeros(1, np.int64)  # documents with 0, 1, 2, ... tokens
    for first in range(0, part.num_documents, INDEX_AT_ONCE):
        begin = part.ends[first - 1] if first else 0
        tokens = np.diff(part.ends[first : first + INDEX_AT_ONCE], prepend=begin)
        counted = np.bincount(tokens, minlength=len(num_of_length))
        counted[: len(num_of_length)] += num_of_length
        num_of_length = counted
    num_up_to = np.cumsum(num_of_length)

    def percentile(percent: float) -> float:
        place = percent / 100 * (part.num_documents - 1)
        below, above = np.searchsorted(num_up_to, [math.floor(place), math.ceil(place)], side="right")
        return float(below + (above - below) * (place % 1))

    return {
        "tokens_per_document": {
            "mean": part.num_tokens / part.num_documents,
            "median": percentile(50),
            "percentile_95": percentile(95),
            "longest": len(num_of_length) - 1,
        },
        "shorter_than_sequence": int(num_of_length[:sequence_length].sum()) / part.num_documents,
    }


def table(result: dict) -> str:
    """The summary as text: counts, and below them the lengths and epochs if it has them."""
    t = result["tokenizer"]
    heading = f"tokenizer: {t['kind']}, {t['vocab_size']:,} pieces, sha256 {t['sha256'][:16]}"
    counted = [("source", "split", "documents", "tokens", "bytes", "bytes/token", "empty", "bad")]
    measured = [("source", "split", "tokens/document", "median", "95%", "longest", "below a sequence", "epochs")]
    for name, splits in result["sources"].items():
        for split, n in splits.items():
            numbers = (f"{n[key]:,}" for key in ("documents", "tokens", "bytes"))
            left_out = (f"{n[key]:,}" for key in ("empty_documents", "bad_documents"))
            counted.append((name, split, *numbers, f"{n['bytes_per_token']:.3f}", *left_out))
            if length := n.get("tokens_per_document"):
                numbers = (f"{length[key]:,.0f}" for key in ("mean", "median", "percentile_95", "longest"))
                epochs = f"{n['epochs']:,.3f}" if "epochs" in n else ""
                measured.append((name, split, *numbers, f"{n['shorter_than_sequence']:.1%}", epochs))
    return "\n".join([heading, aligned(counted), *(["", aligned(measured)] if len(measured) > 1 else [])])


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if c < 2 else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
