"""What is counted while a build runs, and the examples kept of it. Merged in any order, the result is the same."""

import bisect
import collections
import hashlib
import json
from collections.abc import Iterable

EXAMPLES = 20  # kept per name
EXAMPLE_LENGTH = 500  # characters


class Stats:
    """Counts and examples by name, such as "clean/documents", "dropped/c4: fewer than 3 sentences".

    The examples kept are those with the lowest hashes of their keys: a fair sample that does not depend on order.
    """

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[list[str]]] = {}  # name -> [[hash, key, text], ...], sorted

    def count(self, name: str, by: int = 1) -> None:
        self.counts[name] += by

    def example(self, name: str, key: str, text: str) -> None:
        digest = hashlib.sha1(f"{name}\n{key}".encode("utf-8", "surrogatepass")).hexdigest()
        self._insert(name, [digest, key, text[:EXAMPLE_LENGTH]])

    def merge(self, others: Iterable["Stats"]) -> "Stats":
        for other in others:
            self.counts.update(other.counts)
            for name, examples in other.examples.items():
                for example in examples:
                    self._insert(name, example)
        return self

    def to_json(self) -> str:
        return json.dumps(
            {"counts": dict(sorted(self.counts.items())), "examples": dict(sorted(self.examples.items()))}
        )

    @classmethod
    def from_json(cls, text: str) -> "Stats":
        stats, saved = cls(), json.loads(text)
        stats.counts.update(saved["counts"])
        stats.examples = saved["examples"]
        return stats

    def _insert(self, name: str, example: list[str]) -> None:
        kept = self.examples.setdefault(name, [])
        if len(kept) == EXAMPLES and example >= kept[-1]:
            return
        if example not in kept:
            bisect.insort(kept, example)
            del kept[EXAMPLES:]
