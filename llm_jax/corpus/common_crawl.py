"""Pages of Common Crawl's files: WET (text that was extracted already) and WARC (answers of web servers, with HTML).

FastWARC parses records, but its ArchiveIterator (2.0.1) ends at the first damaged gzip member or empty one, gives a
record that is cut off as if it were whole, and lets a record with too great a length swallow those that follow. So
the members of a file and the records in them are told apart here, each checked, and FastWARC sees one whole record at
a time.
"""

import io
import itertools
import re
import zlib
from collections.abc import Iterator

from fastwarc.warc import WarcRecord, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLTree

from llm_jax.corpus import inputs
from llm_jax.corpus.document import Document, Skipped

# Common Crawl itself cuts pages off after 1 MiB, and has announced 5 MiB.
MAX_BYTES = 8 << 20
# What HTML may have before it is called a bomb. resiliparse's time grows with the square of the depth and of a tag's
# attributes, and open formatting is repeated in every paragraph. Browsers stop at a depth of 512 (Blink).
MAX_TAGS = 40_000
MAX_DEPTH = 512
MAX_FORMATTING = 50  # of 100, 38,000 paragraphs make 1.5 GB
MAX_ATTRIBUTES = 4000
MAX_BROKEN = 0.01  # share of characters that could not be decoded

_GZIP = b"\x1f\x8b\x08"
_WARC = b"WARC/"
_NEXT = b"\r\n\r\n" + _WARC
_MAX_HEADER = 1 << 16
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)
_BLOCKS = "div|article|section|ul|ol"
_FORMATTING = "b|big|code|em|font|i|s|small|strike|strong|tt|u"  # not a, nobr: these do not nest
_NESTED = re.compile(rf"<(/?)(?:({_BLOCKS})|({_FORMATTING}))(?=[\s/>])", re.IGNORECASE)
# A whole tag, quotes heeded. It cannot fail once it began: time is linear.
_LONG_TAG = re.compile(r"""<[a-z](?:[^>"']++|"[^"]*+"?|'[^']*+'?)*+""", re.IGNORECASE)


class _Damage(str):
    """Stands between blocks where bytes are missing; says why."""


def read(path: str, *, max_bytes: int = MAX_BYTES) -> Iterator[Document | Skipped]:
    """Each page of a WET or WARC file, compressed or not, or why there is none.

    A document's key and url are the address as it was crawled; its timestamp is when. Records that are no pages
    (warcinfo, request, metadata, ...) are passed over. HTML becomes text by resiliparse's main content extraction.
    What is damaged, of more than max_bytes, not HTML, not an answer with status 200, or could not be decoded, comes
    as Skipped, and reading goes on with the next record that can be found.
    """
    name = inputs.name(path)
    number = 0
    with inputs.open_raw(path) as raw:
        for number, record in enumerate(_records(_blocks(raw), max_bytes), 1):
            origin = f"{name}:record {number}"
            if isinstance(record, Skipped):
                yield record._replace(origin=origin)
                continue
            try:
                page = _page(record, origin, max_bytes)
            except (OSError, ValueError, LookupError) as error:  # what the libraries cannot parse or decode
                page = Skipped("broken record", origin, str(error))
            if page:
                yield page
    if not number:
        yield Skipped("empty file", name)


def _blocks(raw: io.BufferedReader) -> Iterator[bytes | _Damage]:
    """The decompressed bytes, with a _Damage for each stretch that is lost."""
    if raw.peek(3)[:3] == _GZIP:
        yield from _members(raw)
        return
    with inputs.decompressed(raw) as stream:
        while True:
            try:
                block = stream.read1(inputs.BLOCK)
            except inputs.Damaged as error:
                yield _Damage(str(error))
                return
            if not block:
                return
            yield block


def _members(raw: io.BufferedReader) -> Iterator[bytes | _Damage]:
    """The gzip members of a file, decompressed; after a damaged one goes on with the next that begins a record."""
    data = raw.read(inputs.BLOCK)  # read, not yet decompressed
    while data:
        member = data  # what has been read since the member began, to look for the next one in; at most 8 blocks
        decompressor = zlib.decompressobj(wbits=31)
        try:
            while not decompressor.eof:
                block = decompressor.decompress(data, inputs.BLOCK)
                if block:
                    yield block
                data = decompressor.unconsumed_tail
                if not data and not decompressor.eof and len(block) < inputs.BLOCK:
                    data = raw.read(inputs.BLOCK)
                    if not data:
                        raise zlib.error("the file ends within it")
                    member = member[-7 * inputs.BLOCK :] + data
            data = decompressor.unused_data.lstrip(b"\0")  # zeros may follow a member
            while not data and (block := raw.read(inputs.BLOCK)):
                data = block.lstrip(b"\0")
        except zlib.error as error:
            yield _Damage(f"damaged gzip member: {error}")
            data = _next_member(member[1:], raw)


def _next_member(data: bytes, raw: io.BufferedReader) -> bytes:
    """What begins with the next gzip member that begins a record; b"" where there is none."""
    at = 0
    while True:
        at = data.find(_GZIP, at)
        if at < 0 or at + 1024 > len(data):  # none, or too little of it to try
            block = raw.read(inputs.BLOCK)
            data = data[at if at >= 0 else -2 :] + block
            at = data.find(_GZIP)
            if at < 0:
                if not block:
                    return b""
                continue
        try:
            if zlib.decompressobj(wbits=31).decompress(data[at : at + 1024], len(_WARC)) == _WARC:
                return data[at:]
        except zlib.error:
            pass  # these three bytes stand within a member
        at += 1


def _records(blocks: Iterator[bytes | _Damage], max_bytes: int) -> Iterator[bytes | Skipped]:
    """Each record that is whole: its header and as many bytes as it says, and after these the end or another record."""
    data = bytearray()
    damage = None  # "" at the end, the reason after damaged bytes, None while there is more to read

    def fill(size: int) -> bool:
        nonlocal damage
        while damage is None and len(data) < size:
            block = next(blocks, _Damage())
            if isinstance(block, _Damage):
                damage = block
            else:
                data.extend(block)
        return len(data) >= size

    def skip(reason: str, detail: str = "") -> Skipped:
        """Drops data up to where the next record begins, or to the end or the damage."""
        detail = detail or bytes(data[:200]).decode("utf-8", "replace")
        while (at := data.find(_NEXT, 1)) < 0:
            del data[: -len(_NEXT)]
            if not fill(inputs.BLOCK):
                if (at := data.find(_NEXT, 1)) < 0:
                    data.clear()
                    return Skipped(reason, "", detail)
                break
        del data[: at + 4]
        return Skipped(reason, "", detail)

    for number in itertools.count():
        if not fill(len(_WARC)) and not data.strip():
            data.clear()
            if not damage:
                return
            yield Skipped("damaged compression", "", damage)
            damage = None
            continue
        if not data.startswith(_WARC):
            yield skip("not a WARC record" if number else "not a WARC file")
            continue
        size = 1024
        while (end := data.find(b"\r\n\r\n", 0, _MAX_HEADER)) < 0 and len(data) < _MAX_HEADER and fill(size):
            size = len(data) + 1024
        length = _LENGTH.search(data, 0, end + 2) if end >= 0 else None
        if length is None:
            lost = end < 0 and bool(damage)
        else:
            total = end + 4 + int(length[1])
            if int(length[1]) > max_bytes:
                yield skip(f"record of more than {max_bytes} bytes")
                continue
            whole = fill(total + len(_NEXT))
            if data.startswith(_NEXT, total) or not whole and len(data) >= total and not data[total:].strip():
                with memoryview(data) as view:
                    record = bytes(view[:total])
                del data[: total + 4]
                yield record
                continue
            lost = bool(damage) and not whole
        if lost:  # it lies in the damage: one Skipped for both
            detail = f"{damage}: " + bytes(data[:200]).decode("utf-8", "replace")
            data.clear()
            damage = None
            yield Skipped("damaged compression", "", detail)
        else:
            yield skip("record without a length" if length is None else "record with a wrong length")


def _page(data: bytes, origin: str, max_bytes: int) -> Document | Skipped | None:
    record = WarcRecord.from_bytes(data)
    if record.record_type not in (WarcRecordType.conversion, WarcRecordType.response):
        return None
    url = (record.headers.get("WARC-Target-URI") or "").strip("<> ")
    if not url:
        return Skipped("record without an address", origin)
    title = ""
    if record.record_type == WarcRecordType.conversion:
        try:
            text = record.reader.read().decode("utf-8")
        except UnicodeDecodeError as error:
            return Skipped("broken encoding", origin, f"{url}: {error}")
    else:
        parsed = _html(record, origin, url, max_bytes)
        if isinstance(parsed, Skipped):
            return parsed
        title, text = parsed
    if not text.strip():
        return Skipped("no text", origin, url)
    date = record.record_date
    return Document(
        key=url,
        text=text,
        url=url,
        title=title,
        timestamp=date.strftime("%Y-%m-%dT%H:%M:%SZ") if date else "",
        origin=origin,
    )


def _html(record: WarcRecord, origin: str, url: str, max_bytes: int) -> tuple[str, str] | Skipped:
    """Title and text of an answer's page."""
    record.parse_http(auto_decode="all")
    if record.http_headers is None:
        return Skipped("not an answer with HTML", origin, url)
    if record.http_headers.status_code != 200:
        return Skipped("HTTP status other than 200", origin, f"{record.http_headers.status_code} {url}")
    kind = record.headers.get("WARC-Identified-Payload-Type") or record.http_content_type
    if kind not in ("text/html", "application/xhtml+xml"):
        return Skipped("not an answer with HTML", origin, f"{kind} {url}")
    body = record.reader.read(max_bytes + 1)
    if len(body) > max_bytes:
        return Skipped(f"page of more than {max_bytes} bytes", origin, url)
    charset = record.http_charset and map_encoding_to_html5(record.http_charset, fallback_utf8=False)
    html = bytes_to_str(body, charset or detect_encoding(body), errors="replace")
    if html.count("\N{REPLACEMENT CHARACTER}") > MAX_BROKEN * len(html):
        return Skipped("broken encoding", origin, url)
    if reason := _bomb(html):
        return Skipped(reason, origin, url)
    tree = HTMLTree.parse(html)
    return (tree.title or "").strip(), extract_plain_text(tree, main_content=True, alt_texts=False)


def _bomb(html: str) -> str:
    """What would make the parser slow, "" where nothing does."""
    if html.count("<") > MAX_TAGS:
        return "HTML with too many tags"
    tags = _NESTED.findall(html)
    if len(tags) > MAX_FORMATTING:
        blocks = formatting = 0
        for closing, block, _ in tags:
            if block:
                blocks = max(0, blocks - 1) if closing else blocks + 1
            else:
                formatting = max(0, formatting - 1) if closing else formatting + 1
            if blocks > MAX_DEPTH or formatting > MAX_FORMATTING:
                return "HTML nests too deep"
    for tag in _LONG_TAG.findall(html):
        if len(tag) > 2 * MAX_ATTRIBUTES and max(tag.count("="), len(tag.split())) > MAX_ATTRIBUTES:
            return "HTML tag with too many attributes"
    return ""
