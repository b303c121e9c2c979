"""Copies of the record: they get the dictionaries of metrics.jsonl, and may fail without harm to the run."""

import os
import pathlib
import sys

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

SECONDS_BETWEEN_FLUSHES = 10.0


class TensorBoardWriter:
    """Scalars in WORKDIR/tensorboard: train/loss, evaluate/loss, evaluate/sources/web/loss, ...

    start_step: the step the run goes on from; TensorBoard then hides what an earlier process wrote for later steps.
    Written in the calling thread: tensorboardX's SummaryWriter hands events to a thread through a bounded queue, and
    once that thread has died of a full disk, the training would wait for it for ever.
    """

    def __init__(self, workdir: str | os.PathLike, *, start_step: int = 0):
        directory = pathlib.Path(workdir) / "tensorboard"
        self._writer = None
        self._last_flush = 0.0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(directory / "events"))
            restart = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._writer.write_event(Event(step=start_step + 1, session_log=restart))
        except Exception as error:
            self._give_up(error)

    def write(self, line: dict, wall_time: float) -> None:
        """A line of metrics.jsonl, measured at wall_time (seconds since the epoch). One without `step` is left out."""
        if self._writer is None or "step" not in line:
            return
        prefix = line.get("kind", "train")
        try:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in _scalars(line, prefix)]
            # One event for all: 0.09 ms, which the loop waits for; with one for each, by tensorboardX's `scalar`, 0.27.
            self._writer.write_event(Event(step=int(line["step"]), summary=Summary(value=values), wall_time=wall_time))
            if wall_time - self._last_flush > SECONDS_BETWEEN_FLUSHES:
                self._writer.flush()
                self._last_flush = wall_time
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._give_up(error)
            self._writer = None

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        print(f"TensorBoard gets no more values ({type(error).__name__}: {error}); the run goes on", file=sys.stderr)


def _scalars(line: dict, prefix: str):
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}/{key}")
        elif key != "step" and not isinstance(value, bool | str | None | list | tuple):
            yield f"{prefix}/{key}", float(value)
