"""What a page must fulfil: small pure functions, each with its source and thresholds.

A rule is a frozen dataclass of thresholds, called with a text: it returns the text, changed or not, or Dropped.
"""

from collections.abc import Callable
from typing import NamedTuple


class Dropped(NamedTuple):
    """Why a page goes."""

    rule: str  # family and rule, the same for all of a kind: "gopher quality: too few words"
    detail: str = ""  # of this page: "12 words"


Rule = Callable[[str], str | Dropped]
