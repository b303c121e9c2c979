"""C4's rule of bad words.

Raffel et al. 2020, arXiv:1910.10683, section 2.2: a page with a word of a list is dropped (they used LDNOOBW's, "List
of Dirty, Naughty, Obscene or Otherwise Bad Words"). As in tensorflow_datasets/text/c4_utils.py of c4 3.1.0, a word
counts where no letter, digit or underscore stands on either side, and in languages without spaces wherever it stands.
"""

import dataclasses
import functools
import pathlib
import re

import numpy as np

from llm_jax.config import UserError
from llm_jax.corpus.rules import Dropped
from llm_jax.corpus.rules.words import hash_of, hashes_of_runs

# Han, kana, Thai, Lao, Khmer and Burmese. C4 goes by the language of the list; the script of the word also tells, and
# keeps the Latin abbreviations in the Japanese list from matching inside of English words.
_NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# In the lists, but parts of so many good words that C4 allows them: each would drop over 10 % of its language.
_ALLOWED = frozenset({"グロ", "女の子", "性"})
_RUN = re.compile(r"\w+")
_TABLE_MASK = np.uint64(0xFFFF)


@dataclasses.dataclass(frozen=True)
class BadWords:
    """Drops pages with one of these words or phrases, in lower case."""

    words: tuple[str, ...]

    @classmethod
    def read(cls, path: str) -> "BadWords":
        """The words of a file, one a line, in UTF-8. Raises UserError for a file that cannot be read or is empty."""
        try:
            lines = pathlib.Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"bad_words={path!r} cannot be read ({error}); give a UTF-8 file, one word a line"
            ) from None
        words = sorted({line.strip().lower() for line in lines} - {""} - _ALLOWED)
        if not words:
            raise UserError(f"bad_words={path!r} has no words; give a UTF-8 file, one word a line")
        return cls(tuple(words))

    def __call__(self, text: str) -> str | Dropped:
        lower = text.lower()
        if self._anywhere and (match := self._anywhere.search(lower)):
            return Dropped("bad words", match.group())
        hashes = hashes_of_runs(lower)
        for run in np.unique(hashes[self._table[hashes & _TABLE_MASK]]).tolist():
            for word in self._by_run.get(run, ()):
                if word in lower and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", lower):
                    return Dropped("bad words", word)
        return text

    @functools.cached_property
    def _anywhere(self) -> re.Pattern | None:
        words = [re.escape(word) for word in self.words if _NO_SPACES.search(word) or not _RUN.search(word)]
        return re.compile("|".join(words)) if words else None

    @functools.cached_property
    def _by_run(self) -> dict[int, list[str]]:
        """The entries by the hash of their longest run of letters, which a page with them must have."""
        entries: dict[int, list[str]] = {}
        for word in self.words:
            if not _NO_SPACES.search(word) and (runs := _RUN.findall(word)):
                entries.setdefault(hash_of(max(runs, key=len)), []).append(word)
        return entries

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """At a hash's low bits, whether it can be one of these: passes all but one of a hundred other words over."""
        table = np.zeros(int(_TABLE_MASK) + 1, bool)
        table[np.array(list(self._by_run), np.uint64) & _TABLE_MASK] = True
        return table
