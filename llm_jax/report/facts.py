"""The figures of a run, for a page, a terminal or a program, and how they are written."""

import math

import numpy as np

from llm_jax.report.run import Run

RECENT = 20  # lines, for what is asked of a run that goes on


def facts(run: Run, now: float) -> dict:
    """The figures of a run, also for --json: NaN or None where the record has nothing to say."""
    held_out, what = held_out_measures(run)
    rates, state = run.columns["tokens_per_second"], run.state(now)
    has_steps = len(run.steps) > 0
    return {
        "name": run.name,
        "workdir": run.path,
        "state": state,
        "step": run.last_step,
        "steps": run.config.train.steps,
        "seconds_left": run.pace.seconds_left if run.pace and state == "running" else None,
        "seconds_silent": max(0.0, now - run.starts[-1].ended) if run.starts else None,
        "section": run.pace.section if run.pace and state == "running" else None,
        "parameters": run.parameters,
        "tokens": int(run.tokens[-1]) if has_steps else 0,
        "flops": float(run.flops[-1]) if has_steps else 0.0,
        "loss": _recent(run.columns["loss"]),
        "perplexity": held_out and float(held_out["all"]["perplexity"]),
        "perplexity_of": what,
        "held_out": held_out,
        "untrained_perplexity": next(
            (float(line["perplexity"]) for line in run.evaluations if line["step"] == 0), None
        ),
        "tokens_per_second": _median(rates),
        "tokens_per_second_now": _median(rates[-RECENT:]),
        "mfu": _median(run.columns["mfu"]),
        "goodput": run.goodput and run.goodput["goodput"],
        "wall": run.goodput and run.goodput["wall"],
        "starts": len(run.starts),
        "spikes": len(run.spikes),
        "skipped": int(run.skipped.sum()),
        "rewinds": len(run.rewinds),
    }


def held_out_measures(run: Run) -> tuple[dict | None, str]:
    """({"all": ..., "sources": ...}, of what) of the newest evaluation there is: whole, else of the subset."""
    line = run.evaluations[-1] if run.evaluations else None
    if run.evaluation is not None and (line is None or run.evaluation["step"] >= line["step"]):
        return run.evaluation, f"all held-out text, step {run.evaluation['step']}"
    if line is not None:
        return {"all": line, "sources": line["sources"]}, f"fixed subset, step {line['step']}"
    return None, ""


def _recent(values: np.ndarray) -> float:
    """Mean of the last fiftieth, of what is finite there."""
    last = values[-max(1, len(values) // 50) :]
    finite = last[np.isfinite(last)]
    return float(finite.mean()) if len(finite) else math.nan


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def short(number: float) -> str:
    """Three digits and a word."""
    for power, word in ((12, " trillion"), (9, " billion"), (6, " million")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.3g}{word}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """The two largest units."""
    whole = round(seconds)
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{seconds:.3g} s"
