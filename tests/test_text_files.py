"""Reading .txt, .jsonl and .parquet: good documents back as they were written, bad ones named."""

import bz2
import gzip
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from llm_jax.config import UserError
from llm_jax.corpus import text
from llm_jax.corpus.document import Document, Skipped

ROWS = [
    {
        "text": f"Document {i}: déjà vu 漢字 \u2028 🙂\nwith two lines",
        "url": f"http://site/{i}",
        "source": "crawl",
        "score": i,
    }
    for i in range(600)
]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": pa.Codec("zstd").compress}


@pytest.fixture
def read(tmp_path):
    def read(name: str, data: bytes, **options) -> tuple[list[Document], list[Skipped]]:
        (tmp_path / name).write_bytes(data)
        items = list(text.read(str(tmp_path / name), **options))
        for item in items:
            if isinstance(item, Document):
                assert Document.from_bytes(item.to_bytes()) == item
        return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Skipped)]

    return read


def jsonl(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(tmp_path, columns: dict) -> bytes:
    pa.parquet.write_table(pa.table(columns), tmp_path / "written", row_group_size=100)
    return (tmp_path / "written").read_bytes()


def check_rows(documents: list[Document], name: str, unit: str) -> None:
    assert [d.text for d in documents] == [row["text"] for row in ROWS]
    last = documents[-1]
    assert (last.key, last.origin, last.url) == (f"{name}:600", f"{name}:{unit} 600", "http://site/599")
    assert last.extra == {}
    assert len({d.key for d in documents}) == 600


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(read, suffix):
    name = f"part.jsonl{suffix}"
    documents, skipped = read(name, bytes(COMPRESS[suffix](jsonl(ROWS))))
    check_rows(documents, name, "line")
    assert not skipped


def test_parquet(read, tmp_path):
    data = parquet(tmp_path, {key: [row[key] for row in ROWS] for key in ROWS[0]})
    documents, skipped = read("part.parquet", data)
    check_rows(documents, "part.parquet", "row")
    assert not skipped


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_files(read, suffix):
    name = f"a story.txt{suffix}"
    documents, skipped = read(name, bytes(COMPRESS[suffix]("\ufeffOnce upon a time…\r\n".encode())))
    assert documents == [Document(name, "Once upon a time…\n", origin=name)] and not skipped


def test_known_fields_and_another_text_field(read):
    row = {"content": "body", "text": "not this", "title": "T", "timestamp": "2020-01-01T00:00:00Z", "language": "de"}
    row |= {"url": None, "id": 7, "licence": "CC0"}
    (document,), _ = read("a.jsonl", jsonl([row]), text_key="content")
    assert document == Document(
        "a.jsonl:1",
        "body",
        title="T",
        timestamp="2020-01-01T00:00:00Z",
        language="de",
        origin="a.jsonl:line 1",
        extra={"licence": "CC0"},
    )


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "cut', "not JSON"),
        (b"<html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": NaN}', "no text in the field 'text'"),
        (b'{"text": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b'["text"]', "no text"),
        (b'{"text": ["a"]}', "no text in the field 'text'"),
        (b'{"text": " \\n"}', "no text in the field 'text'"),
        (b'{"body": "a"}', "no text in the field 'text'"),
        (b'{"text": "\xfc"}', "broken encoding"),
        (b'{"text": "half \\ud83d of a pair"}', "broken encoding"),
        (b'{"text": "good", "title": "\\udc00"}', "broken encoding"),
        (b'{"text": "' + b"long" * 1000 + b'"}', "document of more than 2000 bytes"),
    ],
)
def test_a_bad_line_costs_itself_alone(read, line, reason):
    good = jsonl([{"text": "before"}]), jsonl([{"text": "after"}])
    limit = {"max_bytes": 2000} if "2000" in reason else {}
    documents, skipped = read("a.jsonl", good[0] + line + b"\n\n" + good[1], **limit)
    assert [(d.text, d.key) for d in documents] == [("before", "a.jsonl:1"), ("after", "a.jsonl:4")]
    assert [(s.reason, s.origin) for s in skipped] == [(reason, "a.jsonl:line 2")]


def test_a_cut_file_gives_its_whole_lines(read):
    documents, skipped = read("a.jsonl.gz", gzip.compress(jsonl(ROWS), 0)[:-10_000])
    assert 400 < len(documents) < 600 and [d.text for d in documents] == [r["text"] for r in ROWS[: len(documents)]]
    assert [s.reason for s in skipped] == ["damaged compression"]
    documents, skipped = read("b.jsonl", jsonl(ROWS)[:-10])
    assert len(documents) == 599 and [s.reason for s in skipped] == ["not JSON"]


def test_a_last_line_needs_no_newline(read):
    documents, skipped = read("a.jsonl", b'{"text": "one"}\n{"text": "two"}')
    assert [d.text for d in documents] == ["one", "two"] and not skipped


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"\xff\xfe\x00", "broken encoding"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-20], "damaged compression"),
        ("a.jsonl", b"", "empty file"),
        ("a.parquet", b"", "damaged Parquet file"),
        ("a.parquet", b"PAR1 and nothing more", "damaged Parquet file"),
    ],
)
def test_bad_files(read, name, data, reason):
    documents, skipped = read(name, data)
    assert not documents and [s.reason for s in skipped] == [reason]


def test_a_text_file_of_more_than_the_limit(read):
    documents, skipped = read("a.txt", b"x" * 2001, max_bytes=2000)
    assert not documents and [s.reason for s in skipped] == ["document of more than 2000 bytes"]


def test_bad_parquet_rows(read, tmp_path):
    broken = pa.array([b"good", b"\xff\xfe", b"also good", b"", None]).cast(pa.binary()).view(pa.string())
    documents, skipped = read("a.parquet", parquet(tmp_path, {"text": broken}))
    assert [(d.text, d.key) for d in documents] == [("good", "a.parquet:1"), ("also good", "a.parquet:3")]
    assert [s.reason for s in skipped] == ["broken encoding"] + 2 * ["no text in the field 'text'"]
    documents, skipped = read("b.parquet", parquet(tmp_path, {"body": ["a"], "n": [1]}))
    assert not documents and "body" in skipped[0].detail


def test_parquet_with_a_damaged_row_group_gives_those_before(read, tmp_path):
    data = bytearray(parquet(tmp_path, {"text": [f"{i} " * 50 for i in range(1000)]}))
    middle = len(data) // 2
    data[middle : middle + 500] = b"\xff" * 500
    documents, skipped = read("a.parquet", bytes(data))
    assert [d.text for d in documents[:256]] == [f"{i} " * 50 for i in range(256)]
    assert [s.reason for s in skipped] == ["damaged Parquet file"]


def test_other_kinds_of_file(tmp_path):
    with pytest.raises(UserError, match=r"its kind is unknown.*\.jsonl"):
        list(text.read(str(tmp_path / "a.docx")))


def test_parquet_over_a_remote_file_system(tmp_path):
    data = parquet(tmp_path, {"text": ["one", "two"]})
    fsspec.filesystem("memory").pipe("/remote-text/a.parquet", data)
    assert [d.text for d in text.read("memory://remote-text/a.parquet")] == ["one", "two"]
