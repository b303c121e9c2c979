"""What a build is made of: steps over named collections of pairs (key, value), for any engine to run.

A step's function is a top-level function, or an instance of a frozen dataclass with __call__, whose fields are its
options. It is called in another process, in any order and, after a fault, again: it must give the same pairs for the
same arguments, and count what it does in `stats` alone.
"""

import collections
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Sequence

Pair = tuple[bytes, bytes]


@dataclasses.dataclass(frozen=True)
class Read:
    """Pairs out of inputs: function(input, stats) -> Iterable[Pair]. One task per input."""

    name: str
    inputs: tuple[str, ...]
    function: Callable[..., Iterable[Pair]]

    @property
    def sources(self) -> tuple[str, ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class Map:
    """Pairs out of each pair: function(key, value, stats) -> Iterable[Pair]. One task per file of the source."""

    name: str
    source: str
    function: Callable[..., Iterable[Pair]]

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)


@dataclasses.dataclass(frozen=True)
class Group:
    """Pairs out of all pairs of a key: function(key, *values, stats=stats) -> Iterable[Pair], where `values` has one
    list for each of the sources, in byte order, empty where the source lacks the key.

    streams: iterators instead of lists, for more values than memory holds. They can be read once, in any order and as
    far as wanted, until the function asks for the next key, that is, ends.
    """

    name: str
    sources: tuple[str, ...]
    function: Callable[..., Iterable[Pair]]
    streams: bool = False


Step = Read | Map | Group


def check(steps: Sequence[Step]) -> None:
    """That the steps fit together; what does not is a mistake in the code that made them."""
    known = set()
    for step in steps:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", step.name), f"{step.name!r} cannot name a folder"
        assert step.name not in known, f"two steps are called {step.name!r}"
        assert set(step.sources) <= known, f"{step.name!r} reads {step.sources}, not all of which are earlier steps"
        assert len(set(step.sources)) == len(step.sources), f"{step.name!r} reads a source twice"
        known.add(step.name)


def results(steps: Sequence[Step]) -> list[str]:
    """The names of the collections that no step reads: what the build is for."""
    read = {source for step in steps for source in step.sources}
    return [step.name for step in steps if step.name not in read]


def readers(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """The steps that read each collection."""
    found = collections.defaultdict(list)
    for step in steps:
        for source in step.sources:
            found[source].append(step)
    return found


def describe(step: Step) -> dict:
    """All that decides what a step does, but for the contents of its inputs, as JSON: the same in every process."""
    values = {field.name: describe_value(getattr(step, field.name)) for field in dataclasses.fields(step)}
    return {"kind": type(step).__name__, **values}


def describe_value(value: object) -> object:
    """A value of options as JSON, the same in every process."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [describe_value(item) for item in value]
    if isinstance(value, dict):
        return [[describe_value(key), describe_value(item)] for key, item in value.items()]
    if isinstance(value, set | frozenset):  # whose own order changes from process to process
        return sorted((describe_value(item) for item in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if inspect.isroutine(value) or isinstance(value, type):
        assert "<" not in value.__qualname__, f"{value.__qualname__} is no top-level function"
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"an option of type {type(value).__name__} cannot be written down: {value!r}")
