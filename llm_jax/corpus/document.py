"""What flows through a build: documents, and the word of what could not be read."""

import dataclasses
from typing import NamedTuple

import msgpack


@dataclasses.dataclass(slots=True)
class Document:
    """One text with what is known of it.

    Attributes:
      key: unique in a build and stable over builds: a normalised URL, "wikipedia:en:12", "FILE:17"
      text: never empty
      url: as it was found; "" where there is none
      title: "" where there is none
      timestamp: when it was fetched or written, ISO 8601 in UTC ("2018-10-15T20:40:37Z"); "" if unknown
      language: ISO 639-1 code where there is one, else 639-3; "" while unknown
      origin: where it was read, for people: "FILE:record 17" or "FILE:line 17"
      extra: what only some sources know, by name: "revision", "licence", ...
    """

    key: str
    text: str
    url: str = ""
    title: str = ""
    timestamp: str = ""
    language: str = ""
    origin: str = ""
    extra: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return msgpack.packb([getattr(self, field.name) for field in dataclasses.fields(self)])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Document":
        return cls(*msgpack.unpackb(data))


class Skipped(NamedTuple):
    """What a reader could not use: counted and named in the data card; the build goes on."""

    reason: str  # few words, the same for all of a kind: "truncated gzip member", "not an article: redirect"
    origin: str  # as in Document
    detail: str = ""  # of this one: the error, the title, the beginning of the text
