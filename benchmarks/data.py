"""What it takes to clean Common Crawl: each stage, the whole build by one and two processes, and its peak memory.

Command:  python benchmarks/data.py --input='DIR/*.warc.wet.gz' [--copies=8] [--json=FILE]
Time:     4 minutes for 13 MB of text, 8 copies of it, on 2 busy cores

Seconds are those of the CPU, which other work on the machine hardly changes; megabytes are 10^6 bytes of text in UTF-8
that enter a stage. For the builds, each copy of the input has other addresses and other first words in each line, so
that it is no duplicate; their scaling is wall time, and meaningless on a busy machine.
"""

import argparse
import gzip
import json
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

from llm_jax.corpus import common_crawl, inputs, pipeline
from llm_jax.corpus.document import Document
from llm_jax.corpus.duplicates import MinHash
from llm_jax.corpus.hashed_words import word_hashes
from llm_jax.corpus.rules import Dropped
from llm_jax.corpus.rules.language import identify
from llm_jax.corpus.stats import Stats
from llm_jax.jobs.build import make_rules

RULES = ["language", "c4", "gopher_quality", "gopher_repetition", "fineweb", "personal"]
REPETITIONS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", action="append", required=True, help="WET files, as for `llm-jax build`")
    parser.add_argument("--copies", type=int, default=8, help="of the input, for the builds")
    parser.add_argument("--json", help="file to which the figures are written")
    arguments = parser.parse_args()
    paths = inputs.expand(arguments.input)
    results = {"MB per CPU-second": stages(paths)}
    with tempfile.TemporaryDirectory(prefix="data-") as folder:
        results["builds"] = builds(paths, arguments.copies, pathlib.Path(folder))
    for title, figures in results.items():
        print(title)
        for name, value in figures.items():
            print(f"  {name:50}{value:12.2f}")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")


def stages(paths: list[str]) -> dict[str, float]:
    """MB of entering text per CPU-second, the best of some repetitions."""
    found: dict[str, float] = {}

    def timed(name: str, call, documents: list[Document]):
        begin = time.process_time()
        result = call()
        size = sum(len(document.text.encode()) for document in documents)
        found[name] = max(found.get(name, 0), size / 1e6 / (time.process_time() - begin))
        return result

    rules = dict(zip(RULES, make_rules(RULES, [], ["en"], None), strict=True))
    clean = pipeline.Clean(common_crawl.read, (), tuple(rules.values()), by_address=True)
    documents = read(paths)
    for document in documents:  # loads what is loaded at first use
        for rule in rules.values():
            rule(document.text)
    for _ in range(REPETITIONS):
        timed("read", lambda: read(paths), documents)
        timed("language identification", lambda: [identify(document.text) for document in documents], documents)
        left = documents
        for name, rule in rules.items():
            results = timed(name, lambda left=left, rule=rule: [rule(document.text) for document in left], left)
            left = [
                Document(document.key, result)
                for document, result in zip(left, results, strict=True)
                if not isinstance(result, Dropped)
            ]
        timed("read and clean, as a whole", lambda: [list(clean(path, Stats())) for path in paths], documents)
        timed("hash of the words", lambda left=left: [word_hashes(d.text) for d in left], left)
        timed("MinHash", lambda left=left: [MinHash().signature(d.text) for d in left], left)
    return found


def read(paths: list[str]) -> list[Document]:
    return [item for path in paths for item in common_crawl.read(path) if isinstance(item, Document)]


def builds(paths: list[str], copies: int, folder: pathlib.Path) -> dict[str, float]:
    copied = folder / "input"
    copied.mkdir()
    size = 0
    for path in paths:
        with inputs.open_input(path) as file:
            content = file.read()
        for number in range(copies):
            data = changed(content, number)
            size += len(data)
            (copied / f"{number}-{inputs.name(path).removesuffix('.gz')}.gz").write_bytes(gzip.compress(data, 1))
    figures = {"input, MB": size / 1e6}
    for workers in (1, 2):
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "llm_jax", "build", "common_crawl", f"--input={copied}/*"]
        subprocess.run(
            [*command, f"--data_dir={folder / str(workers)}", f"--workers={workers}"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        name = f"{workers} process{'es' * (workers > 1)}"
        figures[f"{name}: MB per CPU-second"] = size / 1e6 / cpu
        figures[f"{name}: MB per second of wall time"] = size / 1e6 / (time.perf_counter() - begin)
    figures["2 processes / 1, wall time"] = (
        figures["2 processes: MB per second of wall time"] / figures["1 process: MB per second of wall time"]
    )
    figures["largest process, MB"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    return figures


def changed(wet: bytes, number: int) -> bytes:
    """Each record with another address and a number in its lines, and the length that it then has."""
    records = []
    for record in re.split(rb"(?=^WARC/1\.0\r\n)", wet, flags=re.MULTILINE):
        head, end, body = record.partition(b"\r\n\r\n")
        if b"WARC-Type: conversion" not in head:
            records.append(record)
            continue
        length = int(re.search(rb"Content-Length: (\d+)", head)[1])
        body = re.sub(rb"(?m)^(\w+)", rb"\1 %d" % number, body[:length])
        head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
        head = re.sub(rb"(WARC-Target-URI: \S+)", rb"\1?copy=%d" % number, head)
        records.append(head + end + body + b"\r\n\r\n")
    return b"".join(records)


if __name__ == "__main__":
    main()
