"""One form for all addresses of a page, and the site it belongs to."""

import functools
import re
import urllib.parse

import idna
from publicsuffixlist import PublicSuffixList

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
# Say how a reader came or who it is, not what is read: analytics, mail campaigns, advertisements, sessions.
_TRACKING = re.compile(
    r"utm_.*|pk_.*|mtm_.*|matomo_.*|hsa_.*|_hs(enc|mi)|mc_[ce]id|fbclid|gclid|gclsrc|dclid|gbraid|wbraid|msclkid|yclid|"
    r"twclid|ttclid|igshid|_ga|_gl|vero_id|mkt_tok|oly_(anon|enc)_id|phpsessid|jsessionid|aspsessionid.*|sessionid",
    re.IGNORECASE,
)
_SESSION_IN_PATH = re.compile(r";jsessionid=[^/;]*", re.IGNORECASE)
_ESCAPE = re.compile("%([0-9A-F]{2})?", re.IGNORECASE)
_NEEDS_CARE = re.compile(r"[^A-Za-z0-9\-._~!$&'()*+,;=:@/?\[\]|]")


def normalize(url: str) -> str:
    """The address without what does not tell pages apart: "example.com/a?b=1&c=2". Again normalised, it is the same.

    Scheme and "www." go, as in C4 (normalize_url in tensorflow_datasets/text/c4_utils.py): very many sites serve the
    same pages with and without, next to none serve others. So do user and password, default ports, fragments, tracking
    and session parameters, empty queries and slashes at the end. What is left of the parameters is sorted. Hosts are in
    lower case and IDNA's ASCII form; "." and ".." are resolved; needless escapes are undone, others put in upper
    case (RFC 3986, section 6.2.2). Upper and lower case of paths tell pages apart, and stay.
    """
    # Crawls have addresses such as "http://http://x..", and titles for hosts: what one pass leaves may need another.
    while (normalized := _normalize_once(url)) != url:
        url = normalized
    return url


def _normalize_once(url: str) -> str:
    url = url.strip()
    port = None
    while scheme := _SCHEME.match(url):
        port = _DEFAULT_PORTS.get(scheme[1].lower())
        url = url[scheme.end() :]
    url = url.removeprefix("//")
    url = url.partition("#")[0]
    rest, _, query = url.partition("?")
    authority, slash, path = rest.partition("/")

    host = _normalize_host(authority.rpartition("@")[2])
    if port:
        host = host.removesuffix(port)
    while host.startswith("www.") and "." in host[4:]:
        host = host[4:]

    path = _normalize_escapes(slash + path)
    if ";" in path:
        path = _SESSION_IN_PATH.sub("", path)
    if "/." in path:
        path = _remove_dots(path)
    parameters = [_normalize_escapes(part) for part in query.split("&")] if query else []
    kept = sorted(part for part in parameters if part and not _TRACKING.fullmatch(part.partition("=")[0]))
    return host + path.rstrip("/") + ("?" + "&".join(kept) if kept else "")


def domain(url: str) -> str:
    """The registered domain of an address, normalised or not: "bbc.co.uk" of "https://news.bbc.co.uk/1".

    By the Public Suffix List that publicsuffixlist brings along, with its private part: a blog of blogspot.com is a
    site of its own, as it has an owner of its own. The host itself if it is an IP address or has no registered one.
    """
    return _domain_of_host(normalize(url).partition("/")[0].partition("?")[0])


@functools.lru_cache(maxsize=2**16)
def _domain_of_host(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    host = host.partition(":")[0]
    if host.replace(".", "").isdigit():
        return host
    return _suffixes().privatesuffix(host) or host


@functools.cache
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()


def _normalize_host(host: str) -> str:
    host = host.lower()
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode()
        except idna.IDNAError:  # no such host can be, yet pages with it are
            host = urllib.parse.quote(host, safe="%:[]", errors="surrogatepass").lower()
    name, colon, port = host.partition(":") if not host.startswith("[") else (host, "", "")
    return name.rstrip(".") + (colon + port if port else "")


def _normalize_escapes(text: str) -> str:
    if not _NEEDS_CARE.search(text):
        return text

    def escape(match: re.Match) -> str:
        if match[1] is None:
            return "%25"
        character = chr(int(match[1], 16))
        return character if character.isascii() and (character.isalnum() or character in "-._~") else match[0].upper()

    return urllib.parse.quote(_ESCAPE.sub(escape, text), safe="%!$&'()*+,;=:@/?[]|", errors="surrogatepass")


def _remove_dots(path: str) -> str:
    """RFC 3986, section 5.2.4."""
    kept: list[str] = []
    parts = path.split("/")[1:]
    for part in parts:
        if part == "..":
            del kept[-1:]
        elif part != ".":
            kept.append(part)
    return "/" + "/".join(kept)
