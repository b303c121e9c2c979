"""Addresses and sites against known ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wet_pages import pages

from llm_jax.corpus.rules.urls import domain, normalize


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("HTTP://www.Example.com:80/Path/", "example.com/Path"),
        ("https://example.com:443", "example.com"),
        ("https://example.com:80/", "example.com:80"),
        ("//user:password@example.com./a#part", "example.com/a"),
        ("example.com/a/../b/./c/..", "example.com/b"),
        ("http://example.com/?utm_source=x&b=2&a=1&fbclid=3&", "example.com?a=1&b=2"),
        ("http://example.com/x;jsessionid=1A2B?PHPSESSID=9", "example.com/x"),
        ("http://example.com/%7euser/%e4%b8%ad a%2fb", "example.com/~user/%E4%B8%AD%20a%2Fb"),
        ("https://bücher.example/straße?q=ä", "xn--bcher-kva.example/stra%C3%9Fe?q=%C3%A4"),
        ("http://[2001:db8::1]:80/x", "[2001:db8::1]/x"),
        ("http://http://example.com", "example.com"),
        ("http://www.com/", "www.com"),
        ("http://example.com/100%", "example.com/100%25"),
    ],
)
def test_normalize(url, expected):
    assert normalize(url) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://news.bbc.co.uk/1", "bbc.co.uk"),
        ("example.com:8080?x=a.b.org/", "example.com"),
        ("http://me.blogspot.com/2018", "me.blogspot.com"),
        ("http://blogspot.com", "blogspot.com"),
        ("http://www.bücher.example", "xn--bcher-kva.example"),
        ("http://192.168.0.1:80/x", "192.168.0.1"),
        ("http://[2001:db8::1]:81/x", "[2001:db8::1]"),
        ("http://localhost:8000", "localhost"),
        ("", ""),
    ],
)
def test_domain(url, expected):
    assert domain(url) == expected == domain(normalize(url))


@given(st.one_of(st.text(max_size=40), st.text(alphabet="aAw.:/?#&=%@;[]é 4f-", max_size=40)))
def test_normalized_again_it_is_the_same(url):
    for found in (url, "http://" + url):
        once = normalize(found)
        assert normalize(once) == once
        assert domain(found) == domain(once)


def test_real_addresses():
    addresses = [url for url, _ in pages()]
    normal = [normalize(url) for url in addresses]
    assert [normalize(url) for url in normal] == normal
    assert not any("://" in url or "#" in url or url.startswith("www.") for url in normal)
    assert len(set(normal)) == len({url.removesuffix("/") for url in addresses})
