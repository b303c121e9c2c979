"""Wikitext to plain text, in time linear in its length whatever it holds.

Parsers that follow nested markup exactly need more than linear time where it is broken: mwparserfromhell does not
finish 20 kB of "{{a|" in ten seconds. Here the page is cut once, left to right, at brackets and extension tags; what
they enclose is replaced when they close. The order of MediaWiki's own preprocessor is kept: comments first, then
extension tags, whose content is opaque up to the first closing tag, then templates, tables and links.

Kept: paragraphs, section titles as lines (of sections that are not empty), list items, labels of links. Removed:
templates but those of INLINE, tables, references, files, categories, links to other languages, formulas, comments,
style.
"""

import html
import re
from collections.abc import Callable, Container

# Templates whose text is part of the sentence they stand in: name -> the text of the positional arguments.
INLINE: dict[str, Callable[[list[str]], str]] = {
    **dict.fromkeys(("nowrap", "nobr", "j", "big", "small", "em", "strong", "abbr", "tooltip"), lambda a: a[0]),
    **dict.fromkeys(("lang", "langue", "transl", "transliteration"), lambda a: a[-1]),
    **dict.fromkeys(("convert", "cvt"), lambda a: " ".join(a[: 4 if a[1:2] == ["to"] or a[1:2] == ["-"] else 2])),
    **dict.fromkeys(("unité", "nombre", "val"), lambda a: " ".join(a[:2])),
    **dict.fromkeys(("spaced ndash", "snd", "spnd", "spaced en dash"), lambda a: " – "),
    **dict.fromkeys(("ndash", "en dash", "–"), lambda a: "–"),
    **dict.fromkeys(("mdash", "em dash", "—"), lambda a: "—"),
    **dict.fromkeys(("'", "apostrophe"), lambda a: "'"),
    **dict.fromkeys(("nbsp", "space"), lambda a: " "),
    **dict.fromkeys(("circa", "c.", "ca."), lambda a: " ".join(["c.", *a[:1]])),
    **dict.fromkeys(("as of",), lambda a: " ".join(["As of", *a[:1]])),
    "!": lambda a: "|",
    # French and German
    **dict.fromkeys(
        ("date", "date-", "date de naissance", "date de naissance-", "date de décès", "date de décès-"), " ".join
    ),
    **dict.fromkeys(("s", "s-", "siècle"), lambda a: f"{a[0]}e siècle"),
    **dict.fromkeys(("citation", "incise", "heure"), lambda a: a[0]),
    "en langue": lambda a: a[-1],
    "ier": lambda a: "Ier",
    "euro": lambda a: "€",
    '"': lambda a: f"„{a[0]}“",
}

MAX_DEPTH = 100  # of brackets, closed or not. MediaWiki stops at 40 templates; what is deeper is broken

# Extension tags of MediaWiki whose content is no prose, and those whose content is shown as it is.
_HIDDEN = (
    "ref|references|gallery|math|chem|ce|score|timeline|syntaxhighlight|source|imagemap|hiero|graph|mapframe|maplink|"
    "templatestyles|templatedata|inputbox|categorytree|includeonly|noinclude|indicator|section"
)
_SHOWN = "nowiki|pre|poem"
_TOKEN = re.compile(
    rf"<!--|<(?P<tag>{_HIDDEN}|{_SHOWN})\b(?P<attributes>[^<>]*)>|</?table\b[^<>]*>"
    r"|\{\{|\}\}|\[\[|\]\]|^[ \t:*#]*\{\||^[ \t]*\|\}(?!\}(?!\}))",
    re.IGNORECASE | re.MULTILINE,
)
_END = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in f"{_HIDDEN}|{_SHOWN}".split("|")}
_OPENED_BY = {"}}": "{{", "]]": "[[", "|}": "{|", "</table>": "<table>"}

_SCHEME = r"(?:(?:https?:|ftp:|irc:|news:)?//|mailto:)"
_REST = [  # in this order: what is left of markup, then the holes that templates leave
    (
        re.compile(
            r"<(?:br|hr|/?(?:p|div|li|ul|ol|dl|dd|dt|blockquote|center|h[1-6]|tr|td|th))\b[^<>]*>",
            re.IGNORECASE,
        ),
        "\n",
    ),
    (
        re.compile(
            r"</?(?:a|abbr|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|ins|kbd|mark|onlyinclude|q|rb|rp|rt|ruby|s|"
            rf"samp|small|span|strike|strong|sub|sup|time|tt|u|var|wbr|translate|{_HIDDEN}|{_SHOWN})\b[^<>]*>",
            re.IGNORECASE,
        ),
        "",
    ),
    (re.compile(rf"\[{_SCHEME}[^\s\[\]]*[ \t]*([^\[\]\n]*)\]?", re.IGNORECASE), r"\1"),
    (re.compile(r"__[A-Z]{3,}__"), ""),
    (re.compile("'{2,}"), ""),
    (re.compile(r"\([ ,;:]+"), "("),
    (re.compile(r"[,;:][ ,;:]{0,8}\)"), ")"),
    (re.compile(r"\( ?\)|\[ ?\]"), ""),
    (re.compile(r"[ \t]{2,}|\t"), " "),
    (re.compile(r" (?=[,.)](?:\s|$))"), ""),
]
_LANGUAGE = re.compile(r"(?:[a-z]{2,3}|simple|[a-z]{2,4}-[a-z-]{2,10}):\S", re.ASCII)
_MEDIA = frozenset(
    "jpg jpeg png svg gif tif tiff webp djvu pdf xcf ogg ogv oga ogx webm wav flac mp3 mid midi stl".split()
)
_NAMED = re.compile(r"[\w -]+=")
# Characters that mean markup, in text that does not: hidden as entities until all markup is gone.
_LITERAL = str.maketrans({c: f"&#{ord(c)};" for c in "&<>[]{}|='*#:;"})


def to_text(wikitext: str, hidden_namespaces: Container[str]) -> str:
    """The prose of a page; "" where there is none.

    Args:
      wikitext: source of the page.
      hidden_namespaces: lower-case names of the namespaces whose links show nothing: files and categories, in English
        and in the wiki's own language.

    Raises ValueError where brackets are nested more than MAX_DEPTH deep: joining them again costs the square of the
    depth.
    """
    text = _without_brackets(wikitext, hidden_namespaces).replace("&nbsp;", " ").replace("\xa0", " ")
    for pattern, replacement in _REST:
        text = pattern.sub(replacement, text)
    return html.unescape("\n".join(_lines(text))).strip()


def templates(wikitext: str) -> set[str]:
    """Names of the templates it uses, lower case, words separated by single spaces."""
    return {_name(name) for name in re.findall(r"\{\{([^{}|<>\[\]\n]*)", wikitext)}


def _name(text: str) -> str:
    return " ".join(text.replace("_", " ").split()).lower()


def _without_brackets(text: str, hidden_namespaces: Container[str]) -> str:
    pieces: list[str] = []
    opened: list[tuple[str, int]] = []  # what is open, and where its content begins in pieces
    depth = dict.fromkeys(_OPENED_BY.values(), 0)
    unclosed = set()  # tags that are not closed in the rest of the page
    position = 0
    while match := _TOKEN.search(text, position):
        pieces.append(text[position : match.start()])
        position = match.end()
        token = match[0].lower()
        if tag := match["tag"]:
            tag = tag.lower()
            if match["attributes"].endswith("/") or tag in unclosed:
                continue
            end = _END[tag].search(text, position)
            if end is None:
                unclosed.add(tag)
                continue
            if tag in _SHOWN.split("|"):
                content = text[position : end.start()]
                pieces.append(_without_brackets(content, ()) if tag == "poem" else content.translate(_LITERAL))
            position = end.end()
            continue
        if token == "<!--":
            end = text.find("-->", position)
            position = len(text) if end < 0 else end + 3
            continue
        if token.startswith("<"):
            token = "</table>" if token.startswith("</") else "<table>"
        elif "|" in token:
            token = token.strip(" \t:*#")
        if token in depth:
            if len(opened) == MAX_DEPTH:
                raise ValueError(f"brackets are nested more than {MAX_DEPTH} deep")
            opened.append((token, len(pieces)))
            depth[token] += 1
            continue
        opener = _OPENED_BY[token]
        if not depth[opener]:
            continue
        while True:  # what opened since and did not close is text without its bracket
            kind, start = opened.pop()
            depth[kind] -= 1
            if kind == opener:
                break
        if kind == "[[":
            pieces[start:] = [_link("".join(pieces[start:]), hidden_namespaces)]
        elif kind == "{{" and _name(pieces[start].partition("|")[0]) in INLINE:
            pieces[start:] = [_template("".join(pieces[start:]))]
        else:
            del pieces[start:]
    pieces.append(text[position:])
    return "".join(pieces)


def _link(content: str, hidden_namespaces: Container[str]) -> str:
    target, bar, label = content.partition("|")
    target = target.strip()
    namespace, colon, _ = target.partition(":")
    file = target.rpartition(".")[2].lower() in _MEDIA  # whatever this wiki calls the namespace of files
    if colon and (namespace.strip().lower() in hidden_namespaces or _LANGUAGE.match(target) or file):
        return ""
    return label if bar else target.removeprefix(":")


def _template(content: str) -> str:
    name, *arguments = content.split("|")
    arguments = [argument for argument in map(str.strip, arguments) if not _NAMED.match(argument)]
    try:
        return INLINE[_name(name)](arguments)
    except IndexError:  # called without its arguments
        return ""


def _lines(text: str) -> list[str]:
    """Lines that hold text; a section's title only if text follows before the next of its rank or a higher one."""
    lines: list[str] = []
    titles: list[tuple[int, str]] = []  # that wait for text: rank, title
    for line in text.split("\n"):
        line = line.strip()
        if line.startswith("=") and line.endswith("=") and (title := line.strip("= ")):
            rank = len(line) - len(line.lstrip("="))
            titles = [waiting for waiting in titles if waiting[0] < rank] + [(rank, title)]
            continue
        item = line.lstrip("*#:; ")
        # Rows of a table that lost its beginning or its end; items that began with a template.
        if line.startswith(("|", "{|")) or item.startswith((",", ".", ")")) or not any(map(str.isalnum, item)):
            continue
        for _, title in titles:
            lines += ["", title]
        bullet = bool(line[: len(line) - len(item)].strip(":; "))
        if not bullet and not titles:  # a blank line between paragraphs, none between the items of a list
            lines.append("")
        titles = []
        lines.append("- " + item if bullet else item)
    return lines
