"""Articles of a Wikipedia dump (pages-articles.xml, any date, any language) as plain text.

The dump is cut at <page> and </page> (its text has every < escaped), and each page is parsed alone: memory is bounded
by one page, and one that is broken costs no other.
"""

import re
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import NamedTuple

from llm_jax.corpus import inputs, wikitext
from llm_jax.corpus.document import Document, Skipped

# MediaWiki allows 2 MB of wikitext; escaped, and with what surrounds it, a page stays below this.
MAX_BYTES = 8 << 20
_BLOCK = 1 << 18

# The templates that make a page a disambiguation page, by language (mostly as wtf_wikipedia lists them; shortcuts of
# the English wiki and a few others added), and the ends of titles that do. Elsewhere only __DISAMBIG__ tells.
_ENGLISH = (
    "disambig", "disambiguation", "dab", "disamb", "disambiguation cleanup", "hndis", "hndis-cleanup", "geodis",
    "mil-unit-dis", "mathdab", "numberdis", "roaddis", "schooldis", "hospitaldis", "callsigndis", "letter disambig",
    "church disambig", "letter-numbercombdisambig", "bio-dab", "split dab", "wp disambig",
)  # fmt: skip
DISAMBIGUATION = {
    "ar": ("توضيح",),
    "ca": ("desambiguació",),
    "cs": ("rozcestník",),
    "da": ("flertydig",),
    "de": ("begriffsklärung",),
    "el": ("αποσαφήνιση",),
    "en": _ENGLISH,
    "es": ("desambiguación",),
    "fa": ("ابهام‌زدایی", "ابهامزدایی"),
    "fi": ("täsmennyssivu",),
    "fr": ("homonymie", "paronymie", "homonymie de personnes", "homonymie de localités"),
    "he": ("פירושונים",),
    "hu": ("egyért",),
    "id": ("disambiguasi",),
    "it": ("disambigua",),
    "ja": ("aimai", "曖昧さ回避"),
    "ko": ("동음이의",),
    "nl": ("dp", "doorverwijspagina"),
    "no": ("peker",),
    "pl": ("ujednoznacznienie",),
    "pt": ("desambiguação",),
    "ro": ("dezambiguizare",),
    "ru": ("неоднозначность", "многозначность"),
    "simple": _ENGLISH,
    "sv": ("förgrening", "gren"),
    "tr": ("anlam ayrımı",),
    "vi": ("trang định hướng",),
    "zh": ("disambig", "disambiguation", "消歧义", "消歧義"),
}
_DISAMBIGUATION_TITLE = re.compile(
    r" \((?:disambiguation|begriffsklärung|homonymie|desambiguación|desambiguació|desambiguação|disambigua|argipena|"
    r"ujednoznacznienie|значения|αποσαφήνιση|동음이의|曖昧さ回避|消歧义|消歧義|توضيح)\)$",
    re.IGNORECASE,
)
# Old dumps do not mark redirects: "#REDIRECT [[Target]]", with the word in the wiki's own language too.
_REDIRECT = re.compile(r"\s*#\s*\w+\s*:?\s*\[\[")


class _Site(NamedTuple):
    language: str  # as in the address of the wiki: "en", "simple", "zh-min-nan"
    text_language: str  # of the text: "en" for "simple"
    base: str  # what the addresses of articles begin with
    namespaces: frozenset[str]  # lower-case names, of those that hold no articles
    hidden: frozenset[str]  # lower-case names, of files and categories


def read(path: str, *, max_bytes: int = MAX_BYTES) -> Iterator[Document | Skipped]:
    """Each page of a dump: an article, or why it is none or could not be read.

    A document has its key "wikipedia:LANGUAGE:ID", its title, its address, the time of its revision and, in extra,
    "id", "revision" and "licence". Redirects, disambiguation pages and pages of other namespaces come as Skipped with
    the reason. Pages of more than max_bytes of XML, or whose brackets nest too deep, are skipped.
    """
    name = inputs.name(path)
    site = None
    number = 0
    for part in _parts(path, max_bytes):
        if isinstance(part, Skipped):
            yield part
        elif site is None:
            try:
                site = _site(part)
            except (ET.ParseError, ValueError) as error:
                yield Skipped("not a Wikipedia dump", name, str(error))
                return
        else:
            number += 1
            origin = f"{name}:page {number}"
            try:
                page = ET.fromstring(part)
            except ET.ParseError as error:
                yield Skipped("broken XML", origin, str(error))
                continue
            yield _document(page, site, origin)


def _parts(path: str, max_bytes: int) -> Iterator[bytes | Skipped]:
    """What stands before the first page, then each page from <page> to </page>."""
    name = inputs.name(path)
    data = bytearray()
    begun = False  # whether data begins with a page, after the first part with <page>
    first = True
    damage = ""
    with inputs.open_input(path) as stream:
        while True:
            try:
                block = stream.read1(_BLOCK)
            except inputs.Damaged as error:
                block, damage = b"", str(error)
            if not block:
                break
            searched = max(0, len(data) - len(b"</page>"))
            data += block
            while True:
                tag = b"</page>" if begun else b"<page>"
                at = data.find(tag, searched)
                searched = 0
                if at < 0:
                    break
                if begun:
                    yield bytes(data[: at + len(tag)])
                    del data[: at + len(tag)]
                else:
                    if first:
                        yield bytes(data[:at])
                    del data[:at]
                begun, first = not begun, False
            if len(data) > max_bytes:
                if first:
                    break
                if begun:
                    title = re.search(rb"<title>([^<]{1,300})", data)
                    yield Skipped(
                        f"page of more than {max_bytes} bytes",
                        name,
                        title[1].decode("utf-8", "replace") if title else "",
                    )
                begun = False
                del data[: -len(b"<page>")]
    if first:
        yield Skipped(
            "not a Wikipedia dump" if data else "empty file", name, damage or data[:100].decode("utf-8", "replace")
        )
    elif begun or damage or b"</mediawiki>" not in data:
        yield Skipped("dump is cut off", name, damage or data[:100].decode("utf-8", "replace"))


def _site(header: bytes) -> _Site:
    root = ET.fromstring(header + b"</mediawiki>")
    base = root.findtext("{*}siteinfo/{*}base") or ""
    address, wiki, _ = base.partition("/wiki/")
    if not wiki:
        raise ValueError(f"siteinfo gives no address of the wiki: {base!r}")
    language = address.rpartition("//")[2].partition(".")[0]
    names = {
        int(n.get("key", 0)): (n.text or "").lower() for n in root.iterfind("{*}siteinfo/{*}namespaces/{*}namespace")
    }
    return _Site(
        language,
        root.get("{http://www.w3.org/XML/1998/namespace}lang") or language,
        address + wiki,
        frozenset(name for key, name in names.items() if key != 0),
        frozenset({"file", "image", "category", names.get(6, "file"), names.get(14, "category")}),
    )


def _document(page: ET.Element, site: _Site, origin: str) -> Document | Skipped:
    title = page.findtext("title") or ""
    revisions = page.findall("revision")
    if not revisions:
        return Skipped("page without a revision", origin, title)
    revision = revisions[-1]
    text = revision.findtext("text") or ""
    namespace = page.findtext("ns")
    if namespace is None:  # an old dump
        namespace = "1" if title.partition(":")[0].lower() in site.namespaces and ":" in title else "0"
    if namespace != "0":
        return Skipped("not an article: other namespace", origin, title)
    if page.find("redirect") is not None or _REDIRECT.match(text):
        return Skipped("not an article: redirect", origin, title)
    if (revision.findtext("model") or "wikitext") != "wikitext":
        return Skipped("not an article: no wikitext", origin, title)
    if _is_disambiguation(title, text, site.language):
        return Skipped("not an article: disambiguation", origin, title)
    try:
        text = wikitext.to_text(text, site.hidden)
    except ValueError as error:
        return Skipped("broken wikitext", origin, f"{title}: {error}")
    if not text:
        return Skipped("no text", origin, title)
    identity = page.findtext("id") or ""
    return Document(
        key=f"wikipedia:{site.language}:{identity}",
        text=text,
        url=site.base + urllib.parse.quote(title.replace(" ", "_"), safe=";@$!*(),/~:"),
        title=title,
        timestamp=revision.findtext("timestamp") or "",
        language=site.text_language,
        origin=origin,
        extra={"id": identity, "revision": revision.findtext("id") or "", "licence": "CC BY-SA"},
    )


def _is_disambiguation(title: str, text: str, language: str) -> bool:
    if "__DISAMBIG__" in text or _DISAMBIGUATION_TITLE.search(title):
        return True
    english = language in ("en", "simple")
    names = DISAMBIGUATION.get(language, ())
    return any(name in names or english and name.endswith(" disambiguation") for name in wikitext.templates(text))
