"""WORKDIR/metrics.jsonl, the record of a run: one JSON object a line.

A training line has no `kind`: {"step": 7, "loss": 3.2, "tokens": 4096, "seconds": 0.5, ...}. Every other line says
what it is: {"kind": "evaluate", "step": 100, ...}. JSON has no NaN, so NaN and the infinities are written as the
strings "NaN", "Infinity" and "-Infinity", which read() turns back into numbers. One process writes.
"""

import json
import math
import os
import pathlib

from llm_jax.config import UserError

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends lines. What a killed process left of a line is removed when the file is opened."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                file.seek(0)
                content = file.read()
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    file.truncate(whole)
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --workdir") from error

    def append(self, line: dict) -> None:
        """Writes one line; it is in the file when this returns. Values: numbers (also of numpy or JAX, without
        dimensions), strings, None, and lists and dictionaries of them."""
        data = (json.dumps(encode(line), allow_nan=False) + "\n").encode()
        try:
            while data:  # a disk that becomes full takes a part of it, and says so when asked to take the rest
                data = data[self._file.write(data) :]
        except OSError as error:  # does not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def rewind(self, step: int) -> None:
        """Drops the lines of later steps, when a run goes on from the checkpoint of `step`: all of them or none."""
        kept = [line for line in read(self.path) if line.get("step", 0) <= step]
        new = self.path.with_name(self.path.name + ".new")
        with open(new, "wb") as file:
            file.writelines((json.dumps(encode(line), allow_nan=False) + "\n").encode() for line in kept)
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        os.replace(new, self.path)
        self._file = open(self.path, "ab", buffering=0)

    def close(self) -> None:
        self._file.close()


def read(path: str | os.PathLike) -> list[dict]:
    """All lines but a torn last one (without an end). UserError where another line is not JSON."""
    lines = pathlib.Path(path).read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_decode(json.loads(line)))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}); remove that line") from error
    return records


def encode(value):
    if isinstance(value, dict):
        return {key: encode(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [encode(child) for child in value]
    if hasattr(value, "item"):  # a scalar of numpy or JAX
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value):
    if isinstance(value, dict):
        return {key: _decode(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_decode(child) for child in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
