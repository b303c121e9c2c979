"""Reading WET and WARC: against warcio on real pages, and every kind of damage against what was written."""

import gzip
import pathlib
import re
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import pytest
import warcio

from llm_jax.corpus import common_crawl
from llm_jax.corpus.document import Document, Skipped

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
WET = sorted(DATA.glob("wet/*.warc.wet.gz"))
WARC = sorted(DATA.glob("warc/*.warc.gz"))
real = pytest.mark.skipif(not (WET and WARC), reason="needs wet/ and warc/ of the shared data")


def record(url: str, body: bytes, kind: str = "conversion", length: int | None = None, headers: str = "") -> bytes:
    content_type = "text/plain" if kind == "conversion" else "application/http; msgtype=response"
    return (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2018-10-20T02:51:25Z\r\n"
        f"WARC-Record-ID: <urn:uuid:d4958f5b-d5af-4b15-b480-6b5cd0059638>\r\n{headers}"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode() + body + b"\r\n\r\n"  # fmt: skip


def answer(url: str, html: bytes, status: str = "200 OK", kind: str = "text/html", headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{headers}\r\n".encode()
    return record(url, head + html, "response")


PAGES = [(f"http://site/{i}", f"Page {i} says: " + "äöü line\n" * (7 + 50 * i)) for i in range(8)]
RECORDS = [record(url, text.encode()) for url, text in PAGES]


@pytest.fixture
def read(tmp_path):
    def read(data: bytes, **options) -> tuple[list[Document], list[Skipped]]:
        path = tmp_path / "some.warc.gz"
        path.write_bytes(data)
        items = list(common_crawl.read(str(path), **options))
        return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Skipped)]

    return read


def members(records) -> bytes:
    return b"".join(map(gzip.compress, records))


def urls(documents: list[Document]) -> list[int]:
    return [int(document.url.rpartition("/")[2]) for document in documents]


@pytest.mark.parametrize("wrap", [b"".join, members, lambda r: gzip.compress(b"".join(r))], ids=["plain", "gz", "one"])
def test_whole_files(read, wrap):
    info = record("", b"software: x\r\n").replace(b"conversion", b"warcinfo")
    documents, skipped = read(wrap([info, *RECORDS]))
    assert not skipped
    assert [(d.key, d.url, d.text) for d in documents] == [(url, url, text) for url, text in PAGES]
    assert documents[0].origin == "some.warc.gz:record 2"
    assert documents[0].timestamp == "2018-10-20T02:51:25Z"


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


def bad_sum(data: bytes) -> bytes:
    return data[:-8] + b"\0\0\0\1" + data[-4:]


@pytest.mark.parametrize(
    "damage",
    [lambda m: m[: len(m) // 2], lambda m: m[:12], lambda m: b"junk" * 999, lambda m: m[:-8] + m[-4:], flipped],
    ids=["cut off", "cut after its header", "junk", "no checksum", "a byte flipped"],
)
@pytest.mark.parametrize("where", [0, 3, 7])
def test_a_damaged_member_costs_itself_alone(read, damage, where):
    parts = [gzip.compress(r) for r in RECORDS]
    parts[where] = damage(parts[where])
    documents, skipped = read(b"".join(parts))
    if parts[0].startswith(b"junk"):  # then it is no gzip file
        assert not documents and [s.reason for s in skipped] == ["not a WARC file"]
        return
    # A member that decompressed to its end before its checksum failed is a whole record.
    assert set(urls(documents)) | {where} == set(range(8))
    assert [s.reason for s in skipped] == ["damaged compression"]
    assert len(skipped[0].detail) > 10


def test_empty_members_and_padding_cost_nothing(read):
    data = members(RECORDS[:3]) + gzip.compress(b"") + members(RECORDS[3:5]) + b"\0" * 600_000 + members(RECORDS[5:])
    documents, skipped = read(data)
    assert (urls(documents), skipped) == (list(range(8)), [])


@pytest.mark.parametrize("wrap", [b"".join, members])
@pytest.mark.parametrize("wrong", [5, -5, 300, 10_000, 2_000_000, 0, "abc", "-1", "9" * 30])
def test_a_record_with_a_wrong_length_costs_itself_alone(read, wrap, wrong):
    length = len(PAGES[3][1].encode()) + wrong if isinstance(wrong, int) and wrong else wrong
    records = [*RECORDS[:3], record("http://site/3", PAGES[3][1].encode(), length=length), *RECORDS[4:]]
    documents, skipped = read(wrap(records))
    assert urls(documents) == [0, 1, 2, 4, 5, 6, 7]
    assert len(skipped) == 1 and skipped[0].reason.startswith("record with") and "site/3" in skipped[0].detail
    assert skipped[0].origin == "some.warc.gz:record 4"


def test_a_file_cut_off(read):
    for data in (members(RECORDS)[:-200], b"".join(RECORDS)[:-200]):
        documents, skipped = read(data)
        assert urls(documents) == list(range(7))
        assert len(skipped) == 1


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty file"),
        (b"hello world\n" * 100_000, "not a WARC file"),
        (gzip.compress(b"hello world\n" * 100_000, mtime=0), "not a WARC file"),
        (b"\x1f\x8b\x08junk" * 1000, "damaged compression"),
    ],
)
def test_what_is_no_warc_file(read, data, reason):
    documents, skipped = read(data)
    assert not documents and [s.reason for s in skipped] == [reason]


def test_a_page_of_100_mb_is_passed_over(read):
    big = record("http://site/big", b"much text " * 10_000_000)
    documents, skipped = read(members([RECORDS[0], big, RECORDS[1]]))
    assert urls(documents) == [0, 1]
    assert [s.reason for s in skipped] == [f"record of more than {common_crawl.MAX_BYTES} bytes"]
    assert "http://site/big" in skipped[0].detail


def test_broken_encodings(read):
    latin = record("http://site/latin", "Übermaß".encode("latin-1"))
    documents, skipped = read(members([latin, RECORDS[0]]))
    assert urls(documents) == [0]
    assert skipped[0].reason == "broken encoding" and "http://site/latin" in skipped[0].detail


HTML = "<html><head><title>Über uns</title></head><body><div><h1>Größe</h1>%s</div></body></html>"
PROSE = "<p>" + "Ein längerer Absatz über die Größe von Straßen in Österreich und anderswo. " * 6 + "</p>"


@pytest.mark.parametrize(
    "charset, kind, head",
    [
        ("utf-8", "text/html; charset=utf-8", ""),
        ("latin-1", "text/html; charset=ISO-8859-1", ""),
        ("latin-1", "text/html", '<meta charset="iso-8859-1">'),
        ("utf-8", "text/html; charset=nonsense", ""),
        ("utf-8", "application/xhtml+xml", ""),
        ("utf-16", "text/html", ""),
    ],
)
def test_html_in_any_charset(read, charset, kind, head):
    html = (HTML % PROSE).replace("<head>", "<head>" + head)
    documents, skipped = read(answer("http://site/1", html.encode(charset), kind=kind))
    assert not skipped
    assert documents[0].title == "Über uns"
    assert "über die Größe von Straßen in Österreich" in documents[0].text and "<" not in documents[0].text


def test_chunked_and_compressed_answers(read):
    body = gzip.compress((HTML % PROSE).encode())
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in (body[:100], body[100:], b""))
    headers = "Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"
    documents, skipped = read(answer("http://site/1", chunks, kind="text/html; charset=utf-8", headers=headers))
    assert not skipped and "Ein längerer Absatz" in documents[0].text


def test_a_compressed_answer_that_explodes(read):
    headers = "Content-Encoding: gzip\r\n"
    bomb = answer("http://site/bomb", gzip.compress(b"<p>" * 10_000_000), headers=headers)
    documents, skipped = read(members([bomb, RECORDS[0]]))
    assert urls(documents) == [0] and skipped[0].reason == f"page of more than {common_crawl.MAX_BYTES} bytes"


@pytest.mark.parametrize(
    "page, reason",
    [
        (answer("u", b"gone", status="404 Not Found"), "HTTP status other than 200"),
        (answer("u", b"%PDF", kind="application/pdf"), "not an answer with HTML"),
        (record("u", b"no header at all", "response"), ""),
        (answer("u", b"<p>\xfc\xff\xfe\xf8</p>" * 99, kind="text/html; charset=utf-8"), ""),
        (answer("u", b"<html><body></body></html>"), "no text"),
        (record("", b"text"), "record without an address"),
    ],
)
def test_what_is_no_page(read, page, reason):
    documents, skipped = read(members([page, RECORDS[0]]))
    assert urls(documents[-1:]) == [0]
    assert not reason or [s.reason for s in skipped] == [reason]


BOMBS = {  # unbounded, most of them take minutes to hours, or tens of gigabytes
    "deep": "<div>" * 30_000,
    "deep and closed": "<div>" * 15_000 + "x" + "</div>" * 15_000,
    "deep in capitals": "<DIV class=x>" * 30_000,
    "deep articles": "<a><article>" * 15_000,
    "deep formatting": "".join(f"<b id={i}>" for i in range(15_000)) + "<p>x" * 15_000,
    "many tags": "<form><span>" * 600_000,
    "many kinds of tags": "<b><i><u><a>" * 400_000 + "<p>" * 600_000,
    "many tags side by side": "<p>x" * 300_000,
    "attributes": "<p " + " ".join(f"a{i}" for i in range(200_000)) + ">x",
    "attributes with values": "<p " + "".join(f"a{i}='>'" for i in range(200_000)) + ">x",
    "long attribute": "<p a='" + "x" * 4_000_000 + "'>x",
    "unclosed quotes": '<a b="' * 30_000,
    "unclosed tags": "<a" * 30_000,
    "spans": "<span>" * 39_000,
    "tables": "<table><tr><td>" * 13_000,
    "one comment": "<!--" + "x" * 4_000_000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_html_bombs_end_soon(read, kind):
    documents, skipped = read(members([answer("http://site/bomb", BOMBS[kind].encode()), RECORDS[0]]))
    assert urls(documents[-1:]) == [0]
    words = {"deep": "HTML nests too deep", "many": "HTML with too many tags"}
    words["attributes"] = "HTML tag with too many attributes"
    if expected := words.get(kind.split()[0]):
        assert [s.reason for s in skipped] == [expected]


@real
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
def test_any_damage_costs_only_the_members_it_hits(tmp_path_factory, changes):
    data = WET[0].read_bytes()
    starts = [m.start() for m in re.finditer(rb"\x1f\x8b\x08", data)]  # of members, and by chance elsewhere
    data = data[: starts[100]]
    broken = bytearray(data)
    for where, byte in changes:
        broken[int(where * len(data))] = byte
    path = tmp_path_factory.mktemp("damage") / "wet.gz"
    path.write_bytes(data)
    whole = {item.key: item for item in common_crawl.read(str(path))}
    path.write_bytes(broken)
    if broken[:3] != data[:3]:
        return
    items = list(common_crawl.read(str(path)))
    hit = sum(a != b for a, b in zip(data, broken, strict=True))
    survived = {item.key for item in items if isinstance(item, Document) and whole.get(item.key)}
    assert len(whole.keys() - survived) <= hit
    assert len([item for item in items if isinstance(item, Skipped)]) <= 2 * hit


@real
def test_real_wet_files_are_read_as_warcio_reads_them():
    for path in WET:
        expected = []
        with open(path, "rb") as file:
            for record in warcio.ArchiveIterator(file):
                headers = record.rec_headers
                if record.rec_type == "conversion":
                    text = record.content_stream().read().decode("utf-8")
                    expected.append((headers["WARC-Target-URI"], headers["WARC-Date"], text))
        items = list(common_crawl.read(str(path)))
        assert [(d.url.replace(" ", "%20"), d.timestamp, d.text) for d in items] == expected and len(expected) == 300


@real
def test_real_html_pages():
    items = list(common_crawl.read(str(WARC[0])))
    documents = {item.url: item for item in items if isinstance(item, Document)}
    assert Counter(item.reason for item in items if isinstance(item, Skipped)) == {"no text": 5}
    assert len(documents) == 95
    page = documents["http://www.skiarealdomasov.cz/en/photos/domasov-18.unor-2012-225.html"]
    assert page.title.startswith("The Ski resort Domašov nad Bystřicí")
    assert not any(re.search(r"</?(?:div|span|script|p)\b", document.text) for document in documents.values())
