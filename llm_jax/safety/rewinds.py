"""Rewinds: after a loss spike the run goes back to a checkpoint and past some batches (PaLM, arXiv:2204.02311, section
5.1), and remembers it in WORKDIR/rewinds.json, so that a restart takes the same batches."""

import dataclasses
import json
import os
import pathlib


@dataclasses.dataclass(frozen=True)
class Rewind:
    spike: int  # the update that spiked
    to: int  # the checkpoint that the run went back to
    batches: int  # left out after it


class Rewinds:
    """The rewinds of a run in the order in which they happened."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        saved = json.loads(path.read_text()) if path.exists() else {"done": [], "cleared": True}
        self.done = [Rewind(**rewind) for rewind in saved["done"]]
        self._cleared = saved["cleared"]

    def add(self, rewind: Rewind, *, write: bool) -> None:
        """write: in one process only. Call it before the checkpoints of the path that is left are removed: a process
        that dies in between finds them to_clear."""
        self.done.append(rewind)
        self._cleared = False
        if write:
            self._write()

    @property
    def to_clear(self) -> int | None:
        """The step beyond which checkpoints are of a path that was left."""
        return None if self._cleared else self.done[-1].to

    def clear(self, *, write: bool) -> None:
        """They have been removed."""
        self._cleared = True
        if write:
            self._write()

    def batch_number(self, step: int) -> int:
        """The batch, counted from 0, that is used for the update after `step` updates."""
        return step + sum(rewind.batches for rewind in self.done if step >= rewind.to)

    def _write(self) -> None:
        new = self._path.with_name(self._path.name + ".new")
        saved = {"done": [dataclasses.asdict(rewind) for rewind in self.done], "cleared": self._cleared}
        with open(new, "w") as file:
            file.write(json.dumps(saved, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._path)
