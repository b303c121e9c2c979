"""From what a user gives as --input to a list of files, local or remote, and to their bytes."""

import bz2
import gzip
import io
import re
import zlib
from collections.abc import Iterable
from typing import BinaryIO

import fsspec
import pyarrow as pa

from llm_jax.config import UserError

BLOCK = 1 << 18  # bytes decompressed at a time
# How bz2 and pyarrow say that data is broken, with an OSError that has no number.
_BROKEN = ("Invalid data stream", "ZSTD decompress failed", "Truncated compressed stream")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_GLOB = re.compile(r"[*?\[]")


class Damaged(ValueError):
    """The compressed bytes end early or are not what was compressed."""


def expand(values: Iterable[str]) -> list[str]:
    """The files that the values name, sorted by name.

    A value is a path or a URL (gs://, s3://, https://, ... whatever fsspec opens), with `*`, `?`, `[ab]`, `**` for any
    number of folders, and `{a,b}` for either; or `@FILE`, a local or remote text file with one such value a line, where
    empty lines and lines that begin with # do not count. In https:// URLs only `*` is special.

    Raises UserError for a value that names nothing, for a file given twice, and for two files with one name: documents
    are known by the name of their file, so that a build does not depend on where its inputs lie.
    """
    found: dict[str, str] = {}  # name -> path
    for value in values:
        for pattern in _values(value):
            for path in _matches(pattern):
                other = found.setdefault(name(path), path)
                if other is path:
                    continue
                if other == path:
                    raise UserError(f"input={pattern}: {path} is given twice; narrow one of the patterns")
                raise UserError(
                    f"input={pattern}: {path} and {other} have one name, by which documents are known; rename one"
                )
    if not found:
        raise UserError("input=: no file is given; name at least one path, glob, URL or @FILE")
    return [found[key] for key in sorted(found)]


def name(path: str) -> str:
    """The last part of a path or URL: how a file is called in keys and origins."""
    return path.partition("?")[0].rstrip("/").rpartition("/")[2] if "://" in path else path.rpartition("/")[2]


def open_input(path: str) -> io.BufferedReader:
    """Its bytes, decompressed where they begin as gzip (any number of members), bzip2 (of streams) or zstd (of frames).

    What the bytes say counts, not the name. Reading raises Damaged where the compressed bytes are broken; read1 and
    readline give everything before that place.
    """
    return decompressed(open_raw(path))


def open_raw(path: str) -> io.BufferedReader:
    """Its bytes as they are."""
    if "://" not in path:
        return open(path, "rb")
    return io.BufferedReader(fsspec.open(path, "rb").open())


def decompressed(raw: io.BufferedReader) -> io.BufferedReader:
    magic = raw.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        return io.BufferedReader(_Decompressor(gzip.GzipFile(fileobj=raw), raw), BLOCK)
    if magic[:3] == b"BZh":
        return io.BufferedReader(_Decompressor(bz2.BZ2File(raw), raw), BLOCK)
    if magic == b"\x28\xb5\x2f\xfd":
        # Unlike zstandard's reader it says when the last frame is cut off.
        return io.BufferedReader(_Decompressor(pa.CompressedInputStream(raw, "zstd"), raw), BLOCK)
    return raw


class _Decompressor(io.RawIOBase):
    """Gives all errors of the decompressors one name, and tells them from those of the file below."""

    def __init__(self, stream, raw: BinaryIO):
        self.stream, self.raw = stream, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            block = self.stream.read1(len(buffer))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise Damaged(str(error)) from error
        except OSError as error:
            if error.errno is None and str(error).startswith(_BROKEN):
                raise Damaged(str(error)) from error
            raise
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
            self.raw.close()
        super().close()


def _values(value: str) -> list[str]:
    """The lines of @FILE."""
    if not value.startswith("@"):
        return [value]
    path = value[1:]
    try:
        with open_input(path) as file:
            lines = file.read().decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError, Damaged) as error:
        raise UserError(
            f"input={value}: {path} cannot be read ({error}); @FILE is a text with an input a line"
        ) from error
    lines = [line.strip() for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def _choices(pattern: str) -> list[str]:
    choice = _CHOICE.search(pattern)  # an innermost one
    if choice is None:
        return [pattern]
    before, after = pattern[: choice.start()], pattern[choice.end() :]
    return list(dict.fromkeys(p for option in choice[1].split(",") for p in _choices(before + option + after)))


def _matches(value: str) -> list[str]:
    """The files that a value names. Of the alternatives of {a,b}, globs may match nothing where another does."""
    found: dict[str, None] = {}
    reason = ""
    for pattern in _choices(value):
        try:
            files, path = fsspec.url_to_fs(pattern)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
            raise UserError(f"input={value}: {error}") from error
        http = pattern.startswith(("http://", "https://"))
        is_glob = "*" in path if http else bool(_GLOB.search(path))
        if is_glob:
            matches = [match for match, about in files.glob(path, detail=True).items() if about["type"] == "file"]
        elif not http and files.isdir(path):
            raise UserError(f"input={value}: {path} is a folder; name its files, as in {path}/*")
        else:
            matches = [path] if files.exists(path) else []
        if not matches:
            reason = _why_nothing(files, path)
            if not is_glob:
                raise UserError(f"input={value}: {reason}")
        if "://" in pattern:
            matches = [files.unstrip_protocol(match) for match in matches]
        found |= dict.fromkeys(matches)
    if not found:
        raise UserError(f"input={value}: {reason}")
    return list(found)


def _why_nothing(files: fsspec.AbstractFileSystem, path: str) -> str:
    parts = path.split("/")
    for end in range(1, len(parts)):
        folder = "/".join(parts[:end])
        if _GLOB.search(folder):
            break
        if folder and "://" not in path and not files.isdir(folder):
            return f"{path}: there is no folder {folder}; check the path"
    if _GLOB.search(path):
        return f"no file matches {path}; `*` stays within one folder, `**` does not"
    return f"{path}: there is no such file; check the path"
