"""`llm-jax prepare`: from the documents of every source to a tokenizer and token stores. Does only what is missing.

It needs no accelerator and never touches one; `train` runs it by itself.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable

from llm_jax import config
from llm_jax.config import Config, UserError
from llm_jax.data import sources, store_writer
from llm_jax.data.sources import Documents
from llm_jax.data.store import TokenStore
from llm_jax.data.tokenizer import SETTINGS, Tokenizer, load_tokenizer, sample_texts, train_tokenizer

SAMPLED_BYTES = 1_000_000  # of text, tokenized to estimate how long the rest takes
SAMPLE_SEED = 0  # of the text the tokenizer is trained on: the same tokenizer whatever train.seed


@dataclasses.dataclass
class Prepared:
    """What training and evaluation read; the keys are the sources' names, with the split where a name comes twice."""

    tokenizer: Tokenizer
    train: dict[str, TokenStore]
    held_out: dict[str, TokenStore]
    weights: dict[str, float]  # as in the config, for training


def prepare(config: Config, *, say: Callable[[str], None] = print) -> Prepared:
    """Opens the sources, trains or loads the tokenizer and writes the token stores, as far as they are not there.

    Args:
      config: the sections tokenizer and data
      say: gets a line for each stage that takes time

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
        tokenizer = make_tokenizer(config, train, cache, say)
        stores = {}
        for name in names:
            announce(train[name], held_out[name], tokenizer, config.data, cache, say)
            stores[name] = store_writer.prepare_store(
                train[name],
                held_out[name],
                tokenizer,
                cache_dir=cache,
                num_workers=config.data.num_workers,
                skip_bad_documents=config.data.skip_bad_documents,
                say=say,
            )
    return Prepared(
        tokenizer=tokenizer,
        train={name: pair[0] for name, pair in stores.items()},
        held_out={name: pair[1] for name, pair in stores.items()},
        weights={name: source.weight for name, source in names.items()},
    )


def run(config: Config, workdir: str | None = None, as_json: bool = False) -> None:
    """The verb: prepares and prints a table or JSON. A workdir is not needed and not touched."""
    del workdir
    say = functools.partial(print, file=sys.stderr) if as_json else print
    result = summary(prepare(config, say=say))
    print(json.dumps(result, indent=2) if as_json else table(result))


def cache_dir(data: config.Data) -> str:
    """Where tokenizers, token stores and built corpora lie."""
    return os.path.abspath(
        os.path.expanduser(data.cache_dir or os.environ.get("LLM_JAX_CACHE") or os.path.join("~", ".cache", "llm_jax"))
    )


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


def make_tokenizer(config: Config, train: dict[str, Documents], cache: str, say: Callable[[str], None]) -> Tokenizer:
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
) -> None:
    """Says how long the tokenizing of a source will take, from a small sample; nothing if it is done."""
    fingerprint = store_writer.store_fingerprint(train, held_out, tokenizer, data.skip_bad_documents)
    if store_writer.is_complete(store_writer.store_folder(train, fingerprint, cache)):
        return
    sample = list(sample_texts([train], [1.0], SAMPLED_BYTES, SAMPLE_SEED, data.skip_bad_documents))
    if not any(sample):
        return  # nothing to measure; whether there is nothing to tokenize is found out soon
    begin = time.monotonic()
    tokenizer.encode(sample)
    bytes_per_second = sum(len(text.encode()) for text in sample) / max(time.monotonic() - begin, 1e-6)
    workers = data.num_workers or store_writer.num_cores()
    num_bytes = train.num_bytes + held_out.num_bytes
    seconds = num_bytes / bytes_per_second / min(workers, store_writer.num_cores())
    say(
        f"tokenizing {train.name}: {len(train) + len(held_out):,} documents, {num_bytes / 1e6:,.1f} MB, "
        f"{workers} worker{'s' if workers > 1 else ''}, about {duration(seconds)}"
    )


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def summary(prepared: Prepared) -> dict:
    """Counts for each source and split, and the tokenizer's."""
    return {
        "tokenizer": {
            "kind": prepared.tokenizer.kind,
            "vocab_size": prepared.tokenizer.vocab_size,
            "sha256": prepared.tokenizer.sha256,
        },
        "sources": {
            name: {
                split: {
                    "documents": part.num_documents,
                    "tokens": part.num_tokens,
                    "bytes": part.num_bytes,
                    "words": part.num_words,
                    "bytes_per_token": part.num_bytes / part.num_tokens,
                    "empty_documents": part.num_empty,
                    "bad_documents": part.num_bad,
                    "folder": part.folder,
                }
                for split, part in (("train", prepared.train[name]), ("held_out", prepared.held_out[name]))
            }
            for name in prepared.train
        },
    }


def table(result: dict) -> str:
    rows: list[tuple[str, ...]] = [("source", "split", "documents", "tokens", "bytes", "bytes/token", "empty", "bad")]
    for name, splits in result["sources"].items():
        for split, n in splits.items():
            counts = [n["documents"], n["tokens"], n["bytes"]]
            rows.append(
                (name, split, *(f"{c:,}" for c in counts), f"{n['bytes_per_token']:.3f}",
                 str(n["empty_documents"]), str(n["bad_documents"]))
            )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(row[c].ljust(width) if c < 2 else row[c].rjust(width) for c, width in enumerate(widths))
        for row in rows
    ]
    t = result["tokenizer"]
    return "\n".join([f"tokenizer: {t['kind']}, {t['vocab_size']:,} pieces, sha256 {t['sha256'][:16]}", *lines])
