"""The words of a text, and runs of them, as hashes: what makes two texts equal, alike, or overlap.

rules/words.py has other words: those of the rules that count them, punctuation included.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

OWN_WORD = (  # scripts written without spaces, in which each character counts as a word
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han, and below
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
LAST_LETTER = 0x323AF  # above are only tags, variation selectors and private use
NOT_ALONE = np.uint64(2**64 - 1)  # the character may change, or be changed by, its neighbours
PIECE = 1 << 18  # characters looked at at once
FACTOR = 0x9E3779B97F4A7C15


def word_hashes(text: str) -> np.ndarray:
    """[words] uint64: the hash of each word, the same on every machine.

    The text is brought to Unicode's NFKC and to small letters; words are then the runs of letters, digits and marks, so
    that case, punctuation, symbols, spacing and compatibility forms ("ﬁ") make no difference. A character of a script
    written without spaces is a word by itself. Runs of 262,144 characters without a space are cut.
    """
    return np.concatenate([_word_hashes(piece) for piece in _pieces(text)])


def ngram_hashes(words: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """For each of the lengths, which rise, [words - length + 1] uint64: the hash of each run of so many words."""
    powers, _ = _powers()
    total, found = np.zeros(len(words) + 1, np.uint64), []
    for i in range(max(lengths, default=0)):
        total = total[:-1] + words[i:] * powers[i]
        if i + 1 in lengths:
            found.append(_mix(total))
    return found


def _pieces(text: str) -> Iterator[str]:
    """The text, if it is long in pieces cut at spaces."""
    begin = end = 0
    if len(text) > PIECE:
        for match in re.finditer(rf"\S{{1,{PIECE}}}", text):
            if match.end() - begin > PIECE:
                yield text[begin:end]
                begin = match.start()
            end = match.end()
    yield text[begin:]


def _word_hashes(text: str) -> np.ndarray:
    alone, letters = _alphabet()
    values = alone.take(_codes(text))
    if not (values == NOT_ALONE).any():
        return _hash_words(values)
    # Of one character NFKC makes up to 18: cut again.
    return np.concatenate(
        [_hash_words(letters.take(_codes(piece))) for piece in _pieces(unicodedata.normalize("NFKC", text))]
    )


def _hash_words(values: np.ndarray) -> np.ndarray:
    """The hash of each word of a piece, of the values of its characters."""
    own = values & np.uint64(1)
    if own.any():  # a space on either side
        places = np.cumsum(1 + 2 * own.astype(np.int64)) - 1 - own.astype(np.int64)
        spaced = np.zeros(places[-1] + 2, np.uint64)
        spaced[places] = values
        values = spaced
    inside = values != 0
    starts = np.flatnonzero(inside[1:] > inside[:-1]) + 1
    if len(inside) and inside[0]:
        starts = np.concatenate([[0], starts])
    if not len(starts):
        return np.zeros(0, np.uint64)
    # For each word a polynomial in its characters' values: of the whole text, divided by the power of where it starts.
    powers, inverses = _powers()
    return _mix(np.add.reduceat(values * powers[: len(values)], starts) * inverses[starts])


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _mix(values: np.ndarray) -> np.ndarray:
    """A one-to-one function of 64 bits whose every output bit depends on all input bits (MurmurHash3's finaliser)."""
    values = (values ^ values >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ values >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ values >> np.uint64(33)


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Powers of an odd number modulo 2^64, and those of its inverse, for each place in a piece with spaces put in."""
    bases = FACTOR, pow(FACTOR, -1, 2**64)
    return tuple(np.multiply.accumulate(np.full(4 * PIECE, base, np.uint64)) for base in bases)


@functools.cache
def _alphabet() -> tuple[np.ndarray, np.ndarray]:
    """A value for each code point as text has it, and as NFKC leaves it. 0: not of a word; odd: a word by itself."""
    letters = np.zeros(0x110000, np.uint64)
    alone = np.zeros(0x110000, np.uint64)
    joins = set(range(0x1160, 0x1200))  # Hangul vowels and finals
    for code in range(LAST_LETTER + 1):
        character = chr(code)
        folded = character.casefold()
        if unicodedata.category(character)[0] in "LMN":
            letters[code] = ord(folded) if len(folded) == 1 else ord(character.lower()[0])
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            joins.add(int(parts[1], 16))
    letters = _mix(letters) & NOT_ALONE - np.uint64(1)
    for first, last in OWN_WORD:
        letters[first : last + 1] |= letters[first : last + 1] != 0
    for code in range(LAST_LETTER + 1):
        form = unicodedata.normalize("NFKC", chr(code))
        if code in joins or unicodedata.combining(chr(code)):
            alone[code] = NOT_ALONE
        elif len(form) == 1:
            alone[code] = letters[ord(form)]
        elif any(letters[ord(character)] for character in form):
            alone[code] = NOT_ALONE
    return alone, letters
