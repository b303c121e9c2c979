"""Reading Wikipedia dumps: small wikitext by hand, a genuine dump against mwparserfromhell and against tfds's
articles."""

import bz2
import gzip
import pathlib
import re
import statistics
import xml.etree.ElementTree as ET

import mwparserfromhell
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from llm_jax.corpus import wikipedia, wikitext
from llm_jax.corpus.document import Document, Skipped

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"
DUMP = DATA / "dumps" / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
ARTICLES = DATA / "tfds" / "wikipedia" / "20230601.en" / "1.0.0"
real = pytest.mark.skipif(not DUMP.exists(), reason="needs dumps/ of the shared data")
HIDDEN = {"file", "image", "category", "datei"}


@pytest.mark.parametrize(
    "source, text",
    [
        ("'''Bold''' and ''italic'' [[link]]s to [[some page|a page]].", "Bold and italic links to a page."),
        ("One.{{cite|a={{b|[[c]]}}}}\n\nTwo.", "One.\n\nTwo."),
        ("Born ({{IPA|x}}; 1809) in {{x}}, there.", "Born (1809) in, there."),
        ('A<ref name="a">not [[this</ref> B<ref name=b /> C<REF>d</ref >.', "A B C."),
        ("Before\n{| class=x\n|-\n| a || {{b\n|}}\n{|\n| nested\n|}\n|}\nAfter", "Before\n\nAfter"),
        ("[[File:A.jpg|thumb|300px|A [[link]] in a ''caption'']]Text", "Text"),
        ("[[Datei:B.svg|mini]][[Fichier:C.png|vignette]][[Category:X]]Text[[de:Titel]][[zh-min-nan:X]]", "Text"),
        (
            "See [[:Category:X]], [[:de:T|here]] and [[Star Trek: Picard]].",
            "See Category:X, here and Star Trek: Picard.",
        ),
        ("[http://a.org A site] and https://c.org [http://b.org].", "A site and https://c.org."),
        ("<!-- {{ --> A <!-- [[ -->B", "A B"),
        ("A <nowiki>[[not a link]] {{x}} '''</nowiki> B", "A [[not a link]] {{x}} ''' B"),
        ("<math>\\frac{a}{{b}}</math>x<sup>2</sup> &lt; &pi;&nbsp;r &amp; 5&nbsp;km", "x2 < π r & 5 km"),
        ("Line<br />break<div style='a'>in</div> __NOTOC__", "Line\n\nbreak\n\nin"),
        ("* one\n** two\n# three\n: indented", "- one\n- two\n- three\n\nindented"),
        ("In {{lang|de|Wörtern}} {{nowrap|a [[b|c]]}}{{mdash}}5", "In Wörtern a c—5"),
        ("at {{convert|5|km|mi|abbr=on}}, {{convert|2|to|3|m}}", "at 5 km, 2 to 3 m"),
        ("Unclosed {{template and [[link\n\nNext", "Unclosed template and link\n\nNext"),
        ("Stray }} and ]]", "Stray and"),
        ("{{a}}", ""),
        ("", ""),
    ],
)
def test_wikitext(source, text):
    assert wikitext.to_text(source, HIDDEN) == text


def test_sections_are_lines_and_empty_ones_go():
    source = """Intro.
== History ==
=== Early ===
Text.
=== Late ===
{{main}}
== References ==
{{reflist}}
== See also ==
* [[A]]
== End =="""
    assert wikitext.to_text(source, HIDDEN) == "Intro.\n\nHistory\n\nEarly\nText.\n\nSee also\n- A"


NESTS = {"[[a|": "]]", "{{a|": "}}", "{{nowrap|": "}}", "\n{|": "\n|}", "<table>": "</table>"}


@pytest.mark.parametrize("opening", NESTS)
def test_what_nests_too_deep_is_refused(opening):
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        wikitext.to_text(opening * 101 + NESTS[opening] * 101, HIDDEN)
    wikitext.to_text("text" + opening * 100 + NESTS[opening] * 100, HIDDEN)


UNITS = (
    "{{a}} [[a]] <ref> <ref/> <!-- http://a [http://a <nowiki> <poem> }} ]] |} ( , ;) [[de:. '' = * & &nbsp; <b __A \n"
)


@pytest.mark.parametrize("unit", UNITS.split(" "))
def test_broken_wikitext_takes_linear_time(unit):
    """With anything quadratic it would not end."""
    source = unit * (400_000 // len(unit))
    wikitext.templates(source)
    if unit == "[[de:.":
        with pytest.raises(ValueError, match="deep"):
            wikitext.to_text(source, HIDDEN)
    else:
        wikitext.to_text(source, HIDDEN)


HEADER = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="{text_language}">
  <siteinfo><sitename>Wikipedia</sitename><dbname>{language}wiki</dbname>
    <base>https://{language}.wikipedia.org/wiki/Main_Page</base>
    <namespaces><namespace key="0" /><namespace key="1">Diskussion</namespace><namespace key="6">Datei</namespace>
      <namespace key="14">Kategorie</namespace></namespaces></siteinfo>
"""


def page(title: str, text: str, number: int = 1, ns: str = "<ns>0</ns>", more: str = "") -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"""  <page><title>{title}</title>{ns}<id>{number}</id>{more}<revision><id>9{number}</id>
    <timestamp>2020-01-02T03:04:05Z</timestamp><model>wikitext</model><text xml:space="preserve">{text}</text>
    </revision></page>\n"""


def dump(*pages: str, language: str = "de", text_language: str = "de") -> bytes:
    header = HEADER.format(language=language, text_language=text_language)
    return (header + "".join(pages) + "</mediawiki>\n").encode()


@pytest.fixture
def read(tmp_path):
    def read(data: bytes, **options) -> tuple[list[Document], list[Skipped]]:
        (tmp_path / "dump.xml").write_bytes(data)
        items = list(wikipedia.read(str(tmp_path / "dump.xml"), **options))
        return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Skipped)]

    return read


PAGES = [page(f"Seite {i}", f"Text der Seite {i}. " * 20, i) for i in range(1, 9)]


@pytest.mark.parametrize("compress", [bytes, bz2.compress, gzip.compress], ids=["plain", "bz2", "gz"])
def test_documents(read, compress):
    documents, skipped = read(compress(dump(page("Größe & ?".replace("&", "&amp;"), "Ein [[Text]].", 17))))
    assert not skipped
    assert documents == [
        Document(
            key="wikipedia:de:17",
            text="Ein Text.",
            url="https://de.wikipedia.org/wiki/Gr%C3%B6%C3%9Fe_%26_%3F",
            title="Größe & ?",
            timestamp="2020-01-02T03:04:05Z",
            language="de",
            origin="dump.xml:page 1",
            extra={"id": "17", "revision": "917", "licence": "CC BY-SA"},
        )
    ]


def test_multistream(read):
    whole = dump(*PAGES)
    cuts = [0, *(m.start() for m in re.finditer(b"  <page>", whole))][::3] + [len(whole)]
    documents, skipped = read(b"".join(bz2.compress(whole[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)))
    assert len(documents) == 8 and not skipped


def test_simple_english_is_english(read):
    (document,), _ = read(dump(PAGES[0], language="simple", text_language="en"))
    assert (document.key, document.language) == ("wikipedia:simple:1", "en")


@pytest.mark.parametrize(
    "language, text",
    [
        ("en", "'''A''' may refer to:\n{{disambiguation|geo}}"),
        ("en", "* [[X]]\n{{Hndis}}"),
        ("en", "* [[X]]\n{{Place name_disambiguation}}"),
        ("simple", "* [[X]]\n{{disambig}}"),
        ("de", "* [[X]]\n{{Begriffsklärung}}"),
        ("fr", "* [[X]]\n{{Homonymie}}"),
        ("fr", "* [[X]]\n{{ Homonymie de  personnes }}"),
        ("sw", "* [[X]]\n__DISAMBIG__"),
    ],
)
def test_disambiguation_pages_go(read, language, text):
    documents, skipped = read(dump(page("A", text), language=language))
    assert not documents and [s.reason for s in skipped] == ["not an article: disambiguation"]


@pytest.mark.parametrize(
    "language, text",
    [
        ("en", "{{disambiguation needed}} {{other uses|A (disambiguation)}} Text."),
        ("de", "{{Begriffsklärungshinweis}} Text."),
        ("fr", "{{Voir homonymes|A}} Text."),
        ("fr", "{{dp}} Text."),
    ],
)
def test_hatnotes_make_no_disambiguation(read, language, text):
    documents, skipped = read(dump(page("A", text), language=language))
    assert len(documents) == 1 and not skipped


@pytest.mark.parametrize(
    "made, reason",
    [
        (page("A", "x", more='<redirect title="B" />'), "not an article: redirect"),
        (page("A", "#WEITERLEITUNG [[B]]"), "not an article: redirect"),
        (page("Diskussion:A", "x", ns="<ns>1</ns>"), "not an article: other namespace"),
        (page("Diskussion:A", "x", ns=""), "not an article: other namespace"),
        (page("A (Begriffsklärung)", "x"), "not an article: disambiguation"),
        (page("A", "{}").replace("wikitext", "json"), "not an article: no wikitext"),
        (page("A", "{{leer}}"), "no text"),
        (page("A", "{{a|" * 200), "broken wikitext"),
        ("  <page><title>A</title><ns>0</ns><id>1</id></page>\n", "page without a revision"),
        ("  <page><title>A</title><ns>0</id></page>\n", "broken XML"),
        (page("A", "bad \x01 character"), "broken XML"),
        (page("A", "&").replace("&amp;", "&undefined;"), "broken XML"),
        (page("A", "x" * 9_000_000), f"page of more than {wikipedia.MAX_BYTES} bytes"),
    ],
)
def test_what_is_no_article_costs_itself_alone(read, made, reason):
    documents, skipped = read(dump(*PAGES[:3], made, *PAGES[3:]))
    assert [d.title for d in documents] == [f"Seite {i}" for i in range(1, 9)]
    assert [s.reason for s in skipped] == [reason]
    assert "A" in skipped[0].detail or reason == "broken XML"


def test_a_colon_in_a_title_is_no_namespace(read):
    documents, _ = read(dump(page("Star Trek: Picard", "x", ns="")))
    assert [d.title for d in documents] == ["Star Trek: Picard"]


@pytest.mark.parametrize("compress", [bytes, bz2.compress, gzip.compress], ids=["plain", "bz2", "gz"])
def test_a_cut_dump_gives_its_whole_pages(read, compress):
    whole = dump(*PAGES)
    cut = compress(whole[: whole.index(b"<title>Seite 6")])
    documents, skipped = read(cut)
    assert [d.title for d in documents] == [f"Seite {i}" for i in range(1, 6)]
    assert [s.reason for s in skipped] == ["dump is cut off"]


@pytest.mark.parametrize("data", [b"", b"hello " * 9, b"<mediawiki><page></page></mediawiki>", b"x" * 20_000_000])
def test_what_is_no_dump(read, data):
    documents, skipped = read(data)
    assert not documents and [s.reason for s in skipped] == ["not a Wikipedia dump" if data else "empty file"]


@real
def test_a_real_dump_cut_in_its_compressed_bytes(read):
    data = DUMP.read_bytes()
    documents, skipped = read(data[: len(data) // 2])
    assert 20 < len(documents) < 98
    assert [s for s in skipped if not s.reason.startswith("not an article")][0].reason == "dump is cut off"


@pytest.fixture(scope="module")
def items() -> list[Document | Skipped]:
    return list(wikipedia.read(str(DUMP)))


@pytest.fixture(scope="module")
def articles(items) -> dict[str, Document]:
    return {item.title: item for item in items if isinstance(item, Document)}


@real
def test_a_real_dump(items):
    by_reason = {}
    for item in items:
        if isinstance(item, Skipped):
            by_reason.setdefault(item.reason.removeprefix("not an article: "), []).append(item.detail)
    assert {reason: len(titles) for reason, titles in by_reason.items() if reason != "disambiguation"} == {
        "redirect": 99,
        "other namespace": 1,
    }
    assert set(by_reason["disambiguation"]) == {  # all whose first sentence says "may refer to" but set index pages
        "Alien", "Austin (disambiguation)", "Ada", "Aberdeen (disambiguation)", "Argument (disambiguation)",
        "Animal (disambiguation)", "Asia Minor (disambiguation)", "Aa River",
    }  # fmt: skip


MARKUP = re.compile(
    r"\{\{|\}\}|\[\[|\]\]|\{\||^\|| \|\||<ref|</|<!--|<[a-z]+ ?/?>|&[a-z]{2,6};|''|\bthumb\||\[https?:|__[A-Z]+__"
    r"|^[*#:;]|^=.*=$|\(\)|\( ?[,;]",
    re.MULTILINE,
)


@real
def test_no_markup_is_left(articles):
    assert len(articles) == 98
    assert {a.title: MARKUP.search(a.text) for a in articles.values() if MARKUP.search(a.text)} == {}


def word_grams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@real
def test_prose_is_what_mwparserfromhell_finds(articles):
    """Of the runs of five words that its paragraphs hold, nearly all are ours."""
    with bz2.open(DUMP) as file:
        pages = ET.parse(file).getroot().iterfind("{*}page")
        sources = {p.findtext("{*}title"): p.findtext("{*}revision/{*}text") for p in pages}
    for title in ("Albedo", "Actrius", "Animalia (book)", "Ampere", "Ayn Rand"):
        code = mwparserfromhell.parse(sources[title])
        for node in code.filter_tags(matches=lambda n: str(n.tag) in ("ref", "table", "gallery", "math")):
            try:
                code.remove(node)
            except ValueError:  # went with what held it
                pass
        for link in code.filter_wikilinks(matches=lambda n: re.match("(?i)(file|image|category):", str(n.title))):
            try:
                code.remove(link)
            except ValueError:
                pass
        paragraphs = [line for line in code.strip_code().split("\n") if len(line) > 200]
        expected = set().union(*map(word_grams, paragraphs))
        assert len(expected) > 150
        assert len(expected & word_grams(articles[title].text)) > 0.97 * len(expected), title


@real
@pytest.mark.skipif(not ARTICLES.exists(), reason="needs tfds/wikipedia of the shared data")
def test_text_resembles_the_same_articles_in_tfds(articles):
    """Other revisions, months apart, by WikiExtractor, which drops lists; nearly all of its prose must be ours."""
    shares = {}
    for path in sorted(ARTICLES.glob("*.array_record-*")):
        for record in ArrayRecordReader(str(path)).read_all():
            feature = tf_example_pb2.Example.FromString(record).features.feature
            title = feature["title"].bytes_list.value[0].decode("utf-8")
            if title not in articles:
                continue
            grams = word_grams(feature["text"].bytes_list.value[0].decode("utf-8"))
            if len(grams) > 100:  # the others were stubs
                shares[title] = len(grams & word_grams(articles[title].text)) / len(grams)
    assert len(shares) >= 30
    assert statistics.median(shares.values()) > 0.9
    assert sum(share > 0.8 for share in shares.values()) >= 0.8 * len(shares)
