"""Documents from text files (one each), JSON lines and Parquet tables (one a line or row)."""

import json
import re
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet

from llm_jax.config import UserError
from llm_jax.corpus import inputs
from llm_jax.corpus.document import Document, Skipped

MAX_BYTES = 16 << 20  # of one document
_ROWS = 16  # of a Parquet table held at a time
_COMPRESSED = (".gz", ".bz2", ".zst")
_FIELDS = ("url", "title", "timestamp", "language")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_]\w{2,8})*")
_LICENCE_LENGTH = 100  # characters


def read(path: str, *, text_key: str = "text", max_bytes: int = MAX_BYTES) -> Iterator[Document | Skipped]:
    """The documents of a .txt, .jsonl (or .ndjson) or .parquet file; the first two may be compressed.

    Keys are "FILE", "FILE:LINE" and "FILE:ROW", both counted from 1. The fields url, title, timestamp and language of
    a line or row are the document's, where they are strings (and the language a code), and so is the licence. Lines end
    in "\\n", whatever they ended in. What is not UTF-8, not JSON,
    has no string text_key, is empty or has more than max_bytes comes as Skipped. Raises UserError for a file of
    another kind.
    """
    name, kind = inputs.name(path), kind_of(path)
    if kind == "txt":
        yield _file(path, name, max_bytes)
    elif kind == "parquet":
        yield from _rows(path, name, text_key, max_bytes)
    else:
        yield from _lines(path, name, text_key, max_bytes)


def kind_of(path: str) -> str:
    """txt, jsonl, ndjson or parquet, by the name; UserError for another kind."""
    name = inputs.name(path).lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    kind = name.rpartition(".")[2]
    if kind not in ("txt", "jsonl", "ndjson", "parquet"):
        raise UserError(
            f"input={path}: its kind is unknown; files end in .txt, .jsonl, .ndjson or .parquet (and .gz, .zst)"
        )
    return kind


def _file(path: str, name: str, max_bytes: int) -> Document | Skipped:
    with inputs.open_input(path) as file:
        try:
            data = file.read(max_bytes + 1)
        except inputs.Damaged as error:
            return Skipped("damaged compression", name, str(error))
    if len(data) > max_bytes:
        return Skipped(f"document of more than {max_bytes} bytes", name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Skipped("broken encoding", name, str(error))
    return Document(name, _unix(text), origin=name) if text.strip() else Skipped("no text", name)


def _lines(path: str, name: str, text_key: str, max_bytes: int) -> Iterator[Document | Skipped]:
    number = 0
    with inputs.open_input(path) as file:
        while True:
            origin = f"{name}:line {number + 1}"
            try:
                line = file.readline(max_bytes + 1)
                too_long = len(line) > max_bytes
                while too_long and line and not line.endswith(b"\n"):
                    line = file.readline(max_bytes)
            except inputs.Damaged as error:
                yield Skipped("damaged compression", origin, str(error))
                return
            if not line and not too_long:
                break
            number += 1
            if too_long:
                yield Skipped(f"document of more than {max_bytes} bytes", origin)
            elif line.strip():
                yield _line(line, text_key, f"{name}:{number}", origin)
    if not number:
        yield Skipped("empty file", name)


def _line(line: bytes, text_key: str, key: str, origin: str) -> Document | Skipped:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:  # half a surrogate pair is JSON, and no text
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        return Skipped("broken encoding", origin, str(error))
    except (ValueError, RecursionError) as error:
        return Skipped("not JSON", origin, f"{error}: {line[:100].decode('utf-8', 'replace')}")
    if not isinstance(fields, dict):
        return Skipped("no text", origin, f"a line must hold an object with the field {text_key!r}")
    return _document(fields, text_key, key, origin)


def _rows(path: str, name: str, text_key: str, max_bytes: int) -> Iterator[Document | Skipped]:
    number = 0
    with inputs.open_raw(path) as file:
        try:
            table = pa.parquet.ParquetFile(file)
            strings = [
                field.name
                for field in table.schema_arrow
                if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            ]
            if text_key not in strings:
                yield Skipped("no text", name, f"there is no column of strings {text_key!r} among {strings}")
                return
            for batch in table.iter_batches(_ROWS, columns=strings):
                for row in range(batch.num_rows):
                    number += 1
                    origin = f"{name}:row {number}"
                    try:
                        fields = {column: batch[column][row].as_py() for column in strings}
                    except UnicodeDecodeError as error:
                        yield Skipped("broken encoding", origin, str(error))
                        continue
                    if len(fields[text_key] or "") > max_bytes:
                        yield Skipped(f"document of more than {max_bytes} bytes", origin)
                    else:
                        yield _document(fields, text_key, f"{name}:{number}", origin)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the file system; others are pyarrow's
                raise
            yield Skipped("damaged Parquet file", f"{name}:row {number + 1}", str(error))
            return
    if not number:
        yield Skipped("empty file", name)


def _document(fields: Mapping[str, object], text_key: str, key: str, origin: str) -> Document | Skipped:
    text = fields.get(text_key)
    if not isinstance(text, str) or not text.strip():
        return Skipped(f"no text in the field {text_key!r}", origin, f"of {', '.join(map(repr, fields))}")
    strings = {name: value for name, value in fields.items() if isinstance(value, str) and name != text_key}
    known = {name: strings[name] for name in _FIELDS if name in strings}
    if not _LANGUAGE.fullmatch(known.get("language", "")):
        known.pop("language", None)
    extra = {"licence": strings["licence"][:_LICENCE_LENGTH]} if "licence" in strings else {}
    return Document(key, _unix(text), origin=origin, extra=extra, **known)


def _unix(text: str) -> str:
    """With the line ends that the rules know."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
