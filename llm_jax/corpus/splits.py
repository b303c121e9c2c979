"""Which split a document belongs to: by a hash of its address, so the same one whatever else is in the build."""

import dataclasses
import hashlib
from collections.abc import Iterator

from llm_jax.config import UserError
from llm_jax.corpus.document import Document
from llm_jax.corpus.rules import urls
from llm_jax.corpus.stats import Stats
from llm_jax.corpus.steps import Pair

TOGETHER = ("document", "site", "cluster")


@dataclasses.dataclass(frozen=True)
class Splits:
    """Map: documents with the name of their split, train, validation or test, as extra["split"].

    Attributes:
      validation, test: shares of the documents (or sites, or clusters), 0 to 1 in all; train has the rest. A greater
        share of one adds to it out of train: nothing else moves.
      together: what is never divided. "document": each by itself, a web page by its normalised URL, others by their
        keys. "site": web pages of one registered domain, as urls.domain has it; the shares are then of domains.
        "cluster": near-duplicates, where these are kept (see duplicates.ResolveNearDuplicates).
    """

    validation: float = 0.005
    test: float = 0.005
    together: str = "document"

    def __post_init__(self):
        for name, share in (("validation", self.validation), ("test", self.test)):
            if not 0 <= share <= 1:
                raise UserError(f"{name}={share}: a share of the documents lies between 0 and 1; try 0.005")
        if self.validation + self.test > 1:
            raise UserError(
                f"validation={self.validation}, test={self.test}: more than 1 in all; leave a rest for train"
            )
        if self.together not in TOGETHER:
            raise UserError(f"together={self.together}: not one of {', '.join(TOGETHER)}")

    def __call__(self, key: bytes, value: bytes, stats: Stats) -> Iterator[Pair]:
        document = Document.from_bytes(value)
        split = document.extra["split"] = self.of(document)
        stats.count(f"split/{split}")
        yield key, document.to_bytes()

    def of(self, document: Document) -> str:
        """The name of the document's split."""
        unit = document.key
        # Not an article of a dump: these have keys of their own, and all of them one domain.
        if self.together == "site" and document.url and not document.key.startswith("wikipedia:"):
            unit = urls.domain(document.url) or unit
        if self.together == "cluster":
            unit = document.extra.get("cluster", unit)
        # Salted: of duplicates the one with the lowest hash of its key stays, which must not decide here too.
        digest = hashlib.blake2b(unit.encode("utf-8", "surrogatepass"), digest_size=8, person=b"split").digest()
        place = (int.from_bytes(digest, "big") >> 11) / 2**53  # exact, and below 1
        if place < self.validation:
            return "validation"
        return "test" if place >= 1 - self.test else "train"
