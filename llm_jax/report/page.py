"""The page: what is said of one run, or of several beside each other, around the charts."""

import datetime
import math
import os
import shlex
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe

from llm_jax.config import Config, differences, flatten
from llm_jax.measure.goodput import CAUSES
from llm_jax.report import charts
from llm_jax.report.facts import duration, facts, short
from llm_jax.report.run import Run

SHOWN_CHARACTERS = 4000  # of the batch of an incident
SHOWN_INCIDENTS = 20
SHOWN_SAMPLES = 20


def render(runs: Sequence[Run], *, by: str, cards: Mapping[str, dict], now: float) -> str:
    """One file that needs nothing but itself. runs: the first is the one it is about; by: the name of a charts.Axis;
    cards: what `llm-jax build` wrote of the sources, by name; now: unix time."""
    drawn = charts.draw(runs, by)
    heat_maps = charts.heat_maps(runs[0])
    library, script, elements = charts.html([*drawn, *heat_maps])
    return TEMPLATES.get_template("report.html.jinja").render(
        run=runs[0],
        runs=runs,
        facts=[facts(run, now) for run in runs],
        charts=drawn,
        heat_maps=heat_maps,
        samples=runs[0].samples[:: -(len(runs[0].samples) // SHOWN_SAMPLES + 1)],
        axes=charts.axes(runs),
        by=by,
        colors=charts.COLORS,
        library=markupsafe.Markup(library),
        script=markupsafe.Markup(script),
        elements={name: markupsafe.Markup(element) for name, element in elements.items()},
        differences=table_of_differences(runs),
        changed=differences(Config(), runs[0].config),
        config=flatten(runs[0].config),
        commands=commands(runs[0]),
        cards=cards,
        now=now,
        causes=CAUSES,
        shown_characters=SHOWN_CHARACTERS,
        shown_incidents=SHOWN_INCIDENTS,
    )


def table_of_differences(runs: Sequence[Run]) -> dict[str, list]:
    """{field: its value in each run} of fields that are not the same in all."""
    flat = [flatten(run.config) for run in runs]
    fields = dict.fromkeys(field for values in flat for field in values)
    rows = {field: [values.get(field) for values in flat] for field in fields}
    return {field: row for field, row in rows.items() if any(value != row[0] for value in row)}


def commands(run: Run) -> dict[str, str]:
    def command(*words: str) -> str:
        return shlex.join(["llm-jax", *words, f"--workdir={run.path}"])

    return {
        "go on": command("train"),
        "evaluate": command("evaluate"),
        "generate": f"{command('generate')} --prompt=The",
        "export": f"{command('export')} --to=exported",
        "verify checkpoints": command("inspect", "checkpoints"),
    }


def _time(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _number(value: float | str | None, form: str) -> str:
    """By a format; what is not known is a dash, and what is not finite its name, as JSON has it."""
    value = math.nan if value is None else float(value)
    return form.format(value) if math.isfinite(value) else "–" if math.isnan(value) else str(value)


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"short": short, "duration": duration, "time": _time, "number": _number, "literal": repr}
