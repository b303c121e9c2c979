"""FineWeb's own rules, after Gopher's and C4's.

Penedo et al. 2024, "The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale", arXiv:2406.17557,
section 3.6, and datatrove 0.10, with which all of 346 English pages agree. The fourth rule, of lists, is datatrove's.
"""

import dataclasses

from llm_jax.corpus.rules import Dropped
from llm_jax.corpus.rules.gopher import repeated
from llm_jax.corpus.rules.words import words

# Unicode's Sentence_Terminal characters of the scripts in use, as datatrove 0.10 (FineWeb of 2024 had also quotes).
END_MARKS = frozenset("!.?։؝؞؟۔।॥၊။።፧፨។៕᠃᠉‼‽⁇⁈⁉。﹒﹖﹗！．？｡꓿꘎꘏꛳꛷꧈꧉꩝꩞꩟꯫᭚᭛᭞᭟᰻᰼᱾᱿܀܁܂߹")


@dataclasses.dataclass(frozen=True)
class FineWeb:
    """Drops pages of menus, lists and boilerplate.

    Attributes:
      min_punctuated_lines: least share of lines that end in a mark of END_MARKS; blank lines do not count
      short_line: characters up to which a line is short
      max_short_lines: greatest share of short lines
      max_duplicate_characters: greatest share of characters in lines that stood on the page before
      max_lines_per_word: greatest ratio of line ends to words
    """

    min_punctuated_lines: float = 0.12
    short_line: int = 30
    max_short_lines: float = 0.67
    max_duplicate_characters: float = 0.01
    max_lines_per_word: float = 0.3

    def __call__(self, text: str) -> str | Dropped:
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return Dropped("fineweb: empty")
        punctuated = sum(line[-1] in END_MARKS for line in lines)
        if punctuated < self.min_punctuated_lines * len(lines):
            return Dropped("fineweb: too few lines end in punctuation", f"{punctuated} of {len(lines)}")
        short = sum(length <= self.short_line for length in map(len, lines))
        if short > self.max_short_lines * len(lines):
            return Dropped("fineweb: too many short lines", f"{short} of {len(lines)}")
        line_ends = text.count("\n")
        _, characters = repeated(lines)
        if characters > self.max_duplicate_characters * (len(text) - line_ends):
            return Dropped("fineweb: characters in duplicate lines", f"{characters} of {len(text) - line_ends}")
        if line_ends > self.max_lines_per_word * (count := len(words(text).hashes)):
            return Dropped("fineweb: too many lines for its words", f"{line_ends} lines, {count} words")
        return text
