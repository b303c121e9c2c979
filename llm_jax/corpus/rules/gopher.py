"""Gopher's rules of quality and repetition.

Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", arXiv:2112.11446,
appendix A1.1 and table A1; what the paper leaves open (what is a word, how repeats are counted) as datatrove 0.10 has
it, whose results FineWeb is made of. On its words (spaCy's) all verdicts are the same. On those of words.py, 9 of 346
English pages get another by quality, all where the share of words with a letter is 0.78 to 0.81 and the threshold 0.8,
and one by repetition. The rules of words are for languages that put spaces between them; the stop words are English.
"""

import dataclasses
import functools

import numpy as np

from llm_jax.corpus.rules import Dropped
from llm_jax.corpus.rules.words import LETTER, PLAIN, hash_of, words

_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")
_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_LOW_BITS = np.uint64(0xFFFFFF)


@dataclasses.dataclass(frozen=True)
class GopherQuality:
    """Drops pages that do not read like running text (appendix A1.1, "Quality Filtering").

    Attributes:
      min_words, max_words: words other than symbols
      min_word_length, max_word_length: their mean length in characters
      max_symbols_per_word: "#", and ellipses, each
      max_bullet_lines: share of lines that begin with a bullet or a dash
      max_ellipsis_lines: share of lines that end in an ellipsis
      min_alphabetic: share of words with at least one letter; datatrove counts symbols as words here, and so do we
      min_stop_words: different ones of stop_words, in lower case, that the page must have; 0 for other languages
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic: float = 0.8
    min_stop_words: int = 2
    stop_words: frozenset[str] = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})

    def __call__(self, text: str) -> str | Dropped:
        hashes, lengths, kinds = words(text)
        count = len(hashes)
        is_plain = kinds & PLAIN != 0
        plain, plain_length = np.count_nonzero(is_plain), int(lengths[is_plain].sum())
        alphabetic = np.count_nonzero(kinds & LETTER)

        if plain < self.min_words or not plain:
            return Dropped("gopher quality: too few words", f"{plain} words")
        if plain > self.max_words:
            return Dropped("gopher quality: too many words", f"{plain} words")
        if plain_length < self.min_word_length * plain:
            return Dropped("gopher quality: words too short", f"{plain_length / plain:.2f} characters")
        if plain_length > self.max_word_length * plain:
            return Dropped("gopher quality: words too long", f"{plain_length / plain:.2f} characters")
        ellipses = sum(map(text.count, _ELLIPSES))
        for name, symbols in (("hashes", text.count("#")), ("ellipses", ellipses)):
            if symbols > self.max_symbols_per_word * count:
                return Dropped(f"gopher quality: too many {name}", f"{symbols / count:.2f} a word")

        lines = text.splitlines()
        # Lines are looked at one by one only where there are enough such marks in all.
        if sum(map(text.count, _BULLETS)) > self.max_bullet_lines * len(lines):
            bullets = sum(line.lstrip().startswith(_BULLETS) for line in lines)
            if bullets > self.max_bullet_lines * len(lines):
                return Dropped("gopher quality: too many bullet lines", f"{bullets} of {len(lines)}")
        if ellipses > self.max_ellipsis_lines * len(lines):
            ended = sum(line.rstrip().endswith(_ELLIPSES) for line in lines)
            if ended > self.max_ellipsis_lines * len(lines):
                return Dropped("gopher quality: too many lines end in an ellipsis", f"{ended} of {len(lines)}")
        if alphabetic < self.min_alphabetic * count:
            return Dropped("gopher quality: too few alphabetic words", f"{alphabetic / count:.3f}")
        if (found := (hashes == _hashes_of(self.stop_words)).any(axis=1).sum()) < self.min_stop_words:
            return Dropped("gopher quality: too few stop words", f"{found} different ones")
        return text


@dataclasses.dataclass(frozen=True)
class GopherRepetition:
    """Drops pages that repeat themselves (table A1).

    Attributes:
      duplicate_lines, duplicate_paragraphs: greatest share of lines (paragraphs) that stood on the page before
      duplicate_line_characters, duplicate_paragraph_characters: the same by characters of the text
      top_n_grams: (n, greatest share of characters of the text in occurrences of the commonest n-gram)
      duplicate_n_grams: (n, greatest share of characters in n-grams that stood on the page before, counted once where
        they overlap); n increasing and shares decreasing
    """

    duplicate_lines: float = 0.30
    duplicate_paragraphs: float = 0.30
    duplicate_line_characters: float = 0.20
    duplicate_paragraph_characters: float = 0.20
    top_n_grams: tuple[tuple[int, float], ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
    duplicate_n_grams: tuple[tuple[int, float], ...] = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.10),
    )

    def __call__(self, text: str) -> str | Dropped:
        lines = text.split("\n")
        if "\n\n" in text:
            paragraphs = [part.lstrip("\n") for part in text.strip().split("\n\n") if part]
            elements, characters = repeated(paragraphs)
            if elements > self.duplicate_paragraphs * len(paragraphs):
                return Dropped("gopher repetition: duplicate paragraphs", f"{elements} of {len(paragraphs)}")
            if characters > self.duplicate_paragraph_characters * len(text):
                return Dropped("gopher repetition: characters in duplicate paragraphs", f"{characters} of {len(text)}")
            lines = list(filter(None, lines))
        elements, characters = repeated(lines)
        if elements > self.duplicate_lines * len(lines):
            return Dropped("gopher repetition: duplicate lines", f"{elements} of {len(lines)}")
        if characters > self.duplicate_line_characters * len(text):
            return Dropped("gopher repetition: characters in duplicate lines", f"{characters} of {len(text)}")

        # Most pages pass by bounds; the exact count is for the rest.
        hashes, lengths, _ = words(text)
        one, two = _most_characters(hashes, lengths, 1), _most_characters(hashes, lengths, 2)
        for n, share in self.top_n_grams:
            # An n-gram is n // 2 pairs and n % 2 words, none of which is rarer than it.
            if n // 2 * two + n % 2 * one <= share * len(text):
                continue
            characters = _top_characters(hashes, lengths, n)
            if characters > share * len(text):
                return Dropped(f"gopher repetition: top {n}-gram", f"{characters} of {len(text)} characters")

        shortest, _ = self.duplicate_n_grams[0]
        _, least = self.duplicate_n_grams[-1]
        # A repeated n-gram consists of shorter repeated ones.
        if _duplicate_characters_at_most(hashes, lengths, shortest, least * len(text)) <= least * len(text):
            return text
        for n, share in self.duplicate_n_grams:
            characters = _duplicate_characters(hashes, lengths, n)
            if characters > share * len(text):
                return Dropped(f"gopher repetition: duplicate {n}-grams", f"{characters} of {len(text)} characters")
        return text


def repeated(elements: list[str]) -> tuple[int, int]:
    """How many elements stood in the list before, and their characters."""
    distinct = set(elements)
    if len(distinct) == len(elements):
        return 0, 0
    return len(elements) - len(distinct), sum(map(len, elements)) - sum(map(len, distinct))


@functools.cache
def _hashes_of(stop_words: frozenset[str]) -> np.ndarray:  # [words, 1]
    return np.array([hash_of(word) for word in sorted(stop_words)], np.uint64)[:, None]


# An n-gram is known by a 64-bit hash: in a page of 100,000 words, two get the same one with probability 3e-10.


def _n_grams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of the n-grams, [W - n + 1]."""
    count = max(0, len(hashes) - n + 1)
    grams = hashes[:count].copy()
    for i in range(1, n):
        grams *= _FACTOR
        grams += hashes[i : i + count]
    return grams


def _keys(hashes: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
    """Hashes of the n-grams with their characters, a space after each word, in the low bits: a sort gives both."""
    grams = _n_grams(hashes, n)
    ends = np.concatenate(([0], np.cumsum(lengths + 1)))
    sizes = np.minimum(ends[n:] - ends[:-n], int(_LOW_BITS))[: len(grams)]
    return (grams & ~_LOW_BITS) | sizes.astype(np.uint64)


def _most_characters(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """At least the characters, with a space after each word, in all occurrences of any one n-gram."""
    keys = np.sort(_keys(hashes, lengths, n))
    if not len(keys):
        return 0
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    counts = np.append(starts[1:], len(keys)) - starts
    return int((counts * (keys[starts] & _LOW_BITS).astype(np.int64)).max())


def _top_characters(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters in all occurrences of the commonest n-gram (the first of them), one space between words."""
    grams = _n_grams(hashes, n)
    if not len(grams):
        return 0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    at = first[counts == counts.max()].min()
    return int(counts.max() * (lengths[at : at + n].sum() + n - 1))


def _duplicate_characters(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """Characters of words in n-grams met before, from left to right; after one, the search goes on behind it."""
    grams = _n_grams(hashes, n)
    _, inverse, counts = np.unique(grams, return_inverse=True, return_counts=True)
    repeated_at = np.flatnonzero(counts[inverse] > 1)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    sizes = (ends[repeated_at + n] - ends[repeated_at]).tolist()
    met, characters, behind = set(), 0, 0
    for at, gram, size in zip(repeated_at.tolist(), inverse[repeated_at].tolist(), sizes, strict=True):
        if at < behind:
            continue
        if gram in met:
            characters += size
            behind = at + n
        else:
            met.add(gram)
    return characters


def _duplicate_characters_at_most(hashes: np.ndarray, lengths: np.ndarray, n: int, limit: float) -> int:
    """At least the characters of words in n-grams of which the same stood before, and so of those in longer ones."""
    keys = _keys(hashes, lengths, n)
    in_order = np.sort(keys)
    overlapping = int((in_order[1:][in_order[1:] == in_order[:-1]] & _LOW_BITS).sum())
    if overlapping <= limit:
        return overlapping
    order = np.argsort(keys, kind="stable")
    later = order[1:][keys[order[1:]] == keys[order[:-1]]]
    covered = np.zeros(len(hashes), bool)
    for i in range(n):
        covered[later + i] = True
    return int(lengths[covered].sum())
