"""The flight recorder: what is known about an update that went wrong, in a folder that outlives the run."""

import collections
import datetime
import itertools
import json
import pathlib


class Recorder:
    """Remembers the numbers of the last `length` updates and writes incidents. Only one process of the run writes.

    FOLDER/STEP-REASON/ holds incident.json and batch.txt. It is written under another name and renamed, so that what a
    killed process leaves is never taken for a whole one.
    """

    def __init__(self, folder: pathlib.Path, length: int = 100):
        self.folder = folder
        self.updates = collections.deque(maxlen=length)

    def note(self, step: int, metrics: dict) -> None:
        """Takes the metrics of an update: numbers, texts, NumPy scalars and arrays."""
        self.updates.append({"step": step, **metrics})

    def num_incidents(self, *reasons: str) -> int:
        """How many have been written for one of the reasons, by this and earlier starts."""
        paths = [path for reason in reasons for path in self.folder.glob(f"*-{reason}*/incident.json")]
        return sum(path.parent.suffix != ".tmp" for path in paths)

    def incident(self, step: int, reason: str, *, batch_text: str, replay: str, extra: dict) -> pathlib.Path:
        """Writes FOLDER/STEP-REASON/, or STEP-REASON-2/ and so on if there is one, and returns it.

        incident.json: step, reason, time (UTC), replay (the command that repeats the update), the entries of `extra`,
        and history, the updates noted, oldest first. NaN and the infinities are strings, as in metrics.jsonl. batch.txt
        holds batch_text.
        """
        record = {
            "step": step,
            "reason": reason,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "replay": replay,
            **extra,
            "history": list(self.updates),
        }
        # Python writes NaN, which is not JSON; reading it back is the one place where it can be replaced.
        record = json.loads(json.dumps(record, default=lambda array: array.tolist()), parse_constant=str)
        name = f"{step}-{reason}"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        path = next(self.folder / name for name in names if not (self.folder / name).exists())
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.mkdir(parents=True, exist_ok=True)
        (unfinished / "batch.txt").write_text(batch_text, "utf-8")
        (unfinished / "incident.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", "utf-8")
        unfinished.rename(path)
        return path
