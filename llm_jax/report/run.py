"""What the record of a run says of it as a whole: numbers by step, starts, evaluations, incidents, signs of life.

Beside what jobs/record.py writes today, lines of these kinds are shown where there are any:

    {"kind": "start", "step": 0, "devices": 16, "device": "TPU v5 lite", "processes": 4}    what a start runs on
    {"kind": "layers", "step": 100, "gradient_norms": {...}, "parameter_norms": {...}}      as in incident.json
    {"kind": "sample", "step": 100, "prompt": "The", "text": " list is"}                    a generation

and of training lines "memory": the most bytes in use so far on the device that uses most.
"""

import dataclasses
import datetime
import json
import pathlib

import numpy as np

from llm_jax.config import Config
from llm_jax.measure import goodput, metrics
from llm_jax.safety.rewinds import Rewind, Rewinds

SECONDS_ALIVE = 60.0  # the ledger gets a line every 10 s, whatever the run is doing
COLUMNS = ("step", "loss", "tokens", "seconds", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "max_load",
           "memory")  # fmt: skip
KINDS = ("start", "layers", "sample", "evaluate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the command. Times are unix times."""

    began: float
    ended: float  # its newest line
    down: float  # seconds without a process before it
    goes_on_from: int | None  # the step; None: it did not come that far
    reached: int | None  # the newest finished update
    lost: int  # updates of starts before it that it makes again, at least: a killed one leaves 10 s unbooked
    end: str  # how it ended, as far as that shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast the newest start is."""

    seconds_left: float | None  # to the last step, with saves and evaluations as often as so far
    section: str | None  # what it was doing when last heard of, as in goodput.SECTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run, read once. Arrays have one value for each training line of the record, in the order of steps."""

    name: str
    path: str
    config: Config
    parameters: int
    columns: dict[str, np.ndarray]  # COLUMNS; NaN where a line lacks one
    tokens: np.ndarray  # trained on until then, targets of lost updates not counted
    flops: np.ndarray  # of the model, attention counted causal
    seconds: np.ndarray  # in updates until then
    spikes: np.ndarray  # indices of lines with a spike, or a loss or gradient that is not finite
    skipped: np.ndarray  # bool: whether the update was left out
    hardware: dict | None  # the newest line of the kind "start"
    layers: list[dict]  # of the kind "layers"
    samples: list[dict]  # of the kind "sample"
    evaluations: list[dict]  # of the fixed subset during training, as in metrics.jsonl
    evaluation: dict | None  # of all held-out text: evaluate.json
    rewinds: list[Rewind]
    incidents: list[dict]  # incident.json without its history, by time; "batch": the text
    starts: list[Start]
    goodput: dict | None  # as goodput.summarize gives it
    pace: Pace | None

    @property
    def steps(self) -> np.ndarray:
        return self.columns["step"]

    @property
    def last_step(self) -> int:
        """The newest finished update, of the record or of the ledger, which has those without a line."""
        reached = self.starts[-1].reached if self.starts else None
        return max(int(self.steps[-1]) if len(self.steps) else 0, reached or 0)

    def restarts(self) -> list[Start]:
        """Starts that went on from a step, but not from the last one."""
        return [start for start in self.starts if 0 < (start.goes_on_from or 0) < self._total]

    def state(self, now: float) -> str:
        """finished | running | stopped; running: it gave a sign of life in the last minute."""
        alive = bool(self.starts) and now - self.starts[-1].ended < SECONDS_ALIVE
        evaluated = self.evaluation is not None and self.evaluation["step"] >= self._total
        if self.last_step >= self._total and (evaluated or not alive):
            return "finished"
        return "running" if alive else "stopped"

    @property
    def _total(self) -> int:
        return self.config.train.steps


def read(
    *,
    name: str,
    config: Config,
    parameters: int,
    flops_per_token: float,
    path: pathlib.Path,
    record: pathlib.Path,
    ledger: pathlib.Path,
    evaluation: pathlib.Path,
    rewinds: pathlib.Path,
    incidents: pathlib.Path,
) -> Run:
    """What lies in the workdir `path`. Of the files any may be missing."""
    lines = metrics.read(record) if record.exists() else []
    training = [line for line in lines if "kind" not in line]
    columns = {key: np.array([line.get(key, np.nan) for line in training], float) for key in COLUMNS}
    kinds = {kind: [line for line in lines if line.get("kind") == kind] for kind in KINDS}
    gaps = np.diff(columns["step"], prepend=0.0)  # more than 1 where not each step has a line
    tokens_per_step = config.train.batch_size * config.train.sequence_length
    booked = metrics.read(ledger) if ledger.exists() else []
    found = _incidents(incidents)
    return Run(
        name=name,
        path=str(path),
        config=config,
        parameters=parameters,
        columns=columns,
        tokens=np.cumsum(columns["tokens"] * gaps),
        flops=columns["step"] * tokens_per_step * flops_per_token,
        seconds=np.cumsum(columns["seconds"] * gaps),
        spikes=np.array([i for i, line in enumerate(training) if "spike" in line], int),
        skipped=np.array([line.get("skipped", False) for line in training], bool),
        hardware=kinds["start"][-1] if kinds["start"] else None,
        layers=kinds["layers"],
        samples=kinds["sample"],
        evaluations=kinds["evaluate"],
        evaluation=json.loads(evaluation.read_text("utf-8")) if evaluation.exists() else None,
        rewinds=Rewinds(rewinds).done,
        incidents=found,
        starts=_starts(booked, found, total=config.train.steps, every=config.checkpoint.every),
        goodput=goodput.summarize(ledger) if booked else None,
        pace=_pace(booked, config.train.steps) if booked else None,
    )


def _starts(booked: list[dict], incidents: list[dict], *, total: int, every: int) -> list[Start]:
    """From the lines of the ledger, see measure/goodput.py, of a run of `total` steps, saved `every` so many."""
    by_start = {}
    for line in booked:
        by_start.setdefault(line["start"], []).append(line)
    crashes = [incident["time"] for incident in incidents if incident["reason"] == "crash"]
    found, ended, reached = [], None, 0
    for began, lines in sorted(by_start.items()):
        origin = next((line["goes_on_from"] for line in lines if "goes_on_from" in line), None)
        last = lines[-1]
        found.append(
            Start(
                began=began,
                ended=last["now"],
                down=max(0.0, began - ended) if ended is not None else 0.0,
                goes_on_from=origin,
                reached=last["step"],
                lost=max(0, reached - origin) if origin is not None else 0,
                end="",
            )
        )
        ended = max(ended or 0.0, last["now"])
        if origin is not None:
            reached = last["step"] if last["step"] is not None else origin
    for i, start in enumerate(found):
        after = next((later for later in found[i + 1 :] if later.goes_on_from is not None), None)
        crashed = any(start.began <= moment <= start.ended + goodput.SECONDS_BETWEEN_LINES for moment in crashes)
        if crashed:
            end = "crashed"
        elif (start.reached or 0) >= total:
            end = "reached the last step"
        elif after is None:
            end = ""
        else:
            # Only a run that is told to stop saves a step between those of checkpoint.every.
            saved = after.goes_on_from == start.reached and (start.reached or 0) % every != 0
            end = "stopped, and saved" if saved else "cut off" if after.lost else "ended after a save"
        found[i] = dataclasses.replace(start, end=end)
    return found


def _pace(booked: list[dict], total: int) -> Pace:
    lines = [line for line in booked if line["start"] == booked[-1]["start"]]
    section = None
    if len(lines) > 1:
        before, after = lines[-2]["seconds"], lines[-1]["seconds"]
        grown = {key: seconds - before.get(key, 0.0) for key, seconds in after.items()}
        section = max(grown, key=lambda key: grown[key], default=None)
    since = max((i for i, line in enumerate(lines) if "goes_on_from" in line), default=len(lines))
    timed = [line for line in lines[since:] if (line["step"] or 0) > lines[since]["goes_on_from"]]
    if timed and timed[-1]["step"] > timed[0]["step"]:  # the time before the first is compilation
        first, last = timed[0], timed[-1]
        rate = (last["now"] - first["now"]) / (last["step"] - first["step"])
        return Pace(seconds_left=max(0, total - last["step"]) * rate, section=section)
    return Pace(seconds_left=None, section=section)


def _incidents(folder: pathlib.Path) -> list[dict]:
    found = []
    for path in sorted(folder.glob("*/incident.json")):
        if path.parent.suffix == ".tmp":
            continue
        incident = json.loads(path.read_text("utf-8"))
        del incident["history"]  # metrics.jsonl has it
        incident["time"] = datetime.datetime.fromisoformat(incident["time"]).timestamp()
        incident["batch"] = (path.parent / "batch.txt").read_text("utf-8")
        found.append(incident)
    return sorted(found, key=lambda incident: (incident["time"], incident["step"]))
