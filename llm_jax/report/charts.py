"""The charts of a report, by Bokeh; the only file that imports it.

Colours of axes, grid and text are CSS variables of the page (Bokeh reads --bk-...), so that light and dark are a matter
of the style sheet. Lines have colours that show on both. The page's script changes the x axis and hides runs; it finds
things by name: a renderer is named "run-0", and its glyph's x is one of the AXES.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np
from bokeh import embed, models, resources
from bokeh.palettes import Viridis256
from bokeh.plotting import figure

from llm_jax.report.run import Run
from llm_jax.report.series import limits, smooth, thin

COLORS = ("#3d7fd9", "#d9730d", "#2b9a66", "#b05cc6", "#c94a4a", "#1496ab", "#8c7a14", "#7d6bd9")  # 3:1 on both grounds
MARK = "#8a9099"
ALARM = "#e0484d"
HEAT_MAP_COLUMNS = 200
HEAT_MAP_LABELS = 12
SMOOTHED = 25  # parts of a run that are averaged over
UNITS = {
    "tokens": ((1e12, "trillion tokens"), (1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens")),
    "flops": ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")),
    "seconds": ((86400.0, "days in updates"), (3600.0, "hours in updates"), (60.0, "minutes in updates")),
}
PLAIN = {"tokens": "tokens", "flops": "FLOP", "seconds": "seconds in updates"}


@dataclasses.dataclass(frozen=True)
class Axis:
    """What runs can be laid over each other by: an attribute of Run, in a unit that suits all of them."""

    name: str  # steps | tokens | flops | seconds
    label: str
    unit: float


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure and what the page says about it."""

    name: str
    title: str
    note: str
    plot: figure
    wide: bool = False
    key: Sequence[tuple[str, str]] = ()  # (name, colour)


def axes(runs: Sequence[Run]) -> list[Axis]:
    found = [Axis("steps", "step", 1.0)]
    for name, units in UNITS.items():
        largest = max(getattr(run, name)[-1] for run in runs)
        unit, label = next((pair for pair in units if largest >= pair[0]), (1.0, PLAIN[name]))
        found.append(Axis(name, label, unit))
    return found


def draw(runs: Sequence[Run], by: str) -> list[Chart]:
    """All charts that the runs have values for. by: the name of an Axis."""
    known = axes(runs)
    sheet = _Sheet(runs, {axis.name: axis for axis in known}, by)
    single = runs[0] if len(runs) == 1 else None
    charts = [sheet.loss()]
    if single and len(single.evaluations) > 1 and len(single.evaluations[0]["sources"]) > 1:
        charts.append(sheet.sources(single))
    charts += [
        sheet.line("learning_rate", "Learning rate", "As the schedule has it.", "%.3g", smoothed=False),
        sheet.line(
            "grad_norm", "Gradient norm", "Before clipping. Thin: each update; thick: smoothed.", "%.4g", log=True
        ),
        sheet.line("tokens_per_second", "Tokens per second", "Thin: each update; thick: smoothed.", "%.6g", zero=True),
        sheet.line("mfu", "Model FLOPs utilization, %", "Causal attention counted.", "%.1f %%", factor=100, zero=True),
    ]
    if any(np.isfinite(run.columns["max_load"]).any() for run in runs):
        charts.append(sheet.line("max_load", "Load of the busiest expert", "Times the mean.", "%.2f", zero=True))
    if any(np.isfinite(run.columns["memory"]).any() for run in runs):
        note = "The most in use so far on the device that uses most."
        charts.append(sheet.line("memory", "Memory, GiB", note, "%.3g", factor=1 / 2**30, zero=True, smoothed=False))
    return charts


def heat_maps(run: Run) -> list[Chart]:
    """Norms by layer over the training, or else at incidents."""
    recorded = [(str(line["step"]), line) for line in run.layers[:: -(-len(run.layers) // HEAT_MAP_COLUMNS) or 1]]
    when = ""
    if not recorded:
        # The same update may be there twice, made again by a later start.
        incidents = {f"{one['step']} {one['reason']}": one for one in run.incidents if "gradient_norms" in one}
        recorded, when = list(incidents.items()), ", at incidents"
    if not recorded:
        return []
    places = len(run.config.model.pattern)
    return [
        _heat_map(key, title + when, [(moment, _by_layer(line[key], places)) for moment, line in recorded])
        for key, title in (
            ("gradient_norms", "Gradient norms by layer"), ("parameter_norms", "Parameter norms by layer")
        )
    ]  # fmt: skip


def html(charts: Iterable[Chart]) -> tuple[str, str, dict[str, str]]:
    """(scripts of the library, script of the charts, {name: element}): all there is to embed, nothing to fetch."""
    library = resources.Resources(mode="inline", components=["bokeh"]).render_js()
    script, elements = embed.components({chart.name: chart.plot for chart in charts})
    return library, script, elements


class _Sheet:
    """Charts that share their x axis, so that a zoom of one is a zoom of all."""

    def __init__(self, runs: Sequence[Run], axes: dict[str, Axis], by: str):
        self.runs, self.axes, self.by = runs, axes, by
        self.x_range = models.DataRange1d(range_padding=0.02)

    def loss(self) -> Chart:
        plot = self._figure(self._limits(lambda run: run.columns["loss"]), height=400)
        for i, run in enumerate(self.runs):
            self._curve(plot, i, run.columns["loss"], "loss", "%.4f")
            if run.evaluations:
                own = {"source": self._evaluations(run, lambda line: line), "color": _color(i), "name": f"run-{i}"}
                plot.segment(self.by, "low", self.by, "high", **own)
                plot.line(self.by, "loss", line_dash="dotted", line_width=2, **own)
                dots = plot.scatter(self.by, "loss", size=8, **own)
                values = [("held out", "@loss{%.4f}"), ("perplexity", "@perplexity{%.2f}")]
                plot.add_tools(self._hover(run, dots, values, ("loss", "perplexity")))
            self._spikes(plot, i, run.columns["loss"])
        self._marks(plot)
        note = (
            "Nats per token. Thin: each update; thick: smoothed; dots: held-out subset with its 95 % interval. "
            "Triangles: spikes, or values that are not finite; filled where the update was left out."
        )
        return Chart("loss", "Loss", note, plot, wide=True)

    def sources(self, run: Run) -> Chart:
        """Perplexity of each source of the fixed subset over the training."""
        names = list(run.evaluations[0]["sources"])
        values = [line["sources"][name]["perplexity"] for line in run.evaluations for name in names]
        plot = self._figure(limits(np.log(np.array(values, float)), 0.0), log=True)
        for i, name in enumerate(names):
            source = self._evaluations(run, lambda line, name=name: line["sources"][name])
            own = {"source": source, "color": _color(i), "name": "source"}
            plot.line(self.by, "perplexity", line_width=2, **own)
            dots = plot.scatter(self.by, "perplexity", size=7, **own)
            values = [("source", _literal(name)), ("perplexity", "@perplexity{%.2f}")]
            plot.add_tools(self._hover(run, dots, values, ("perplexity",)))
        self._marks(plot)
        key = [(name, _color(i)) for i, name in enumerate(names)]
        return Chart("sources", "Held-out perplexity by source", "Of the fixed subset.", plot, key=key)

    def line(
        self, column: str, title: str, note: str, form: str, *, factor: float = 1.0, log: bool = False,
        zero: bool = False, smoothed: bool = True,
    ) -> Chart:  # fmt: skip
        shown = self._limits(lambda run: np.log(run.columns[column]) if log else run.columns[column] * factor)
        if shown and zero:
            shown = (0.0, shown[1])
        plot = self._figure(shown, log=log)
        for i, run in enumerate(self.runs):
            self._curve(plot, i, run.columns[column] * factor, column.replace("_", " "), form, smoothed)
            if column == "grad_norm":
                self._spikes(plot, i, run.columns[column])
        self._marks(plot)
        return Chart(column, title, note, plot)

    def _limits(self, values: Callable[[Run], np.ndarray]) -> tuple[float, float] | None:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = [limits(values(run)) for run in self.runs]
        found = [pair for pair in found if pair is not None]
        return (min(low for low, _ in found), max(high for _, high in found)) if found else None

    def _figure(self, shown: tuple[float, float] | None, *, log: bool = False, height: int = 260) -> figure:
        """shown: the y range, of the logarithm where log."""
        shown = shown or (0.0, 1.0)
        low, high = np.exp(shown) if log else shown
        made = figure(
            height=height,
            sizing_mode="stretch_width",
            x_range=self.x_range,
            y_range=models.Range1d(float(low), float(high)),
            y_axis_type="log" if log else "linear",
            x_axis_label=self.axes[self.by].label,
            tools=[tool(dimensions="width") for tool in (models.BoxZoomTool, models.PanTool, models.WheelZoomTool)],
            active_drag=None,  # a finger that moves over it scrolls the page; the page's script asks for a mouse
            toolbar_location="below",
        )
        made.add_tools(models.ResetTool())
        made.toolbar.logo = None
        made.toolbar.autohide = True
        made.min_border_left, made.min_border_right = 45, 12
        made.xaxis.axis_label_text_font_style = "normal"
        for axis in (made.xaxis, made.yaxis):
            axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
            axis.minor_tick_line_color = None
        made.xaxis.formatter = models.PrintfTickFormatter(format="%g")
        made.yaxis.formatter = models.PrintfTickFormatter(format="%.4g")
        if log:
            made.yaxis.ticker = made.ygrid.ticker = models.FixedTicker(ticks=_round_numbers(low, high), minor_ticks=[])
        return made

    def _x(self, run: Run, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A column for each axis."""
        return {
            name: (getattr(run, name)[indices] / axis.unit).astype(np.float32 if name != "steps" else np.int32)
            for name, axis in self.axes.items()
        }

    def _at(self, run: Run, steps: Sequence[int]) -> dict[str, np.ndarray]:
        """The same for steps that may have no line."""
        return {
            name: np.interp(steps, np.append(0, run.steps), np.append(0, getattr(run, name))) / axis.unit
            for name, axis in self.axes.items()
        }

    def _evaluations(self, run: Run, part: Callable[[dict], dict]) -> models.ColumnDataSource:
        measures = [part(line) for line in run.evaluations]
        columns = self._at(run, [line["step"] for line in run.evaluations])
        columns |= {key: np.array([m[key] for m in measures], float) for key in ("loss", "perplexity")}
        for i, key in enumerate(("low", "high")):
            columns[key] = np.array([m["interval95"][i] for m in measures], float)
        return models.ColumnDataSource(columns)

    def _curve(self, plot: figure, i: int, values: np.ndarray, name: str, form: str, smoothed=True) -> None:
        """Each value thin, and smoothed thick; or, without, each value thick."""
        run, color = self.runs[i], _color(i)
        main = smooth(values, len(values) // SMOOTHED) if smoothed else values
        if smoothed:
            source = self._thinned(run, values)
            plot.line(self.by, "y", source=source, line_color=color, line_alpha=0.45, name=f"run-{i}")
        source = self._thinned(run, main)
        line = plot.line(self.by, "y", source=source, line_color=color, line_width=2.5, name=f"run-{i}")
        plot.add_tools(self._hover(run, line, [(name, f"@y{{{form}}}")], ("y",), along=True))

    def _thinned(self, run: Run, values: np.ndarray) -> models.ColumnDataSource:
        kept = thin(values)
        return models.ColumnDataSource(self._x(run, kept) | {"y": values[kept].astype(np.float32)})

    def _spikes(self, plot: figure, i: int, values: np.ndarray) -> None:
        run = self.runs[i]
        if not len(run.spikes):
            return
        low, high = plot.y_range.start, plot.y_range.end
        shown = np.clip(np.nan_to_num(values[run.spikes], nan=high, posinf=high, neginf=low), low, high)
        columns = self._x(run, run.spikes) | {
            "y": shown,
            "value": np.array([f"{value:.4g}" for value in values[run.spikes]]),
            "what": np.array(["left out" if left_out else "kept" for left_out in run.skipped[run.spikes]]),
            "alpha": np.where(run.skipped[run.spikes], 0.9, 0.0),
        }
        marks = plot.scatter(
            self.by, "y", source=models.ColumnDataSource(columns), marker="inverted_triangle", size=11, color=ALARM,
            fill_alpha="alpha", name=f"run-{i}",
        )  # fmt: skip
        plot.add_tools(self._hover(run, marks, [("spike", "@value, @what")], ()))

    def _marks(self, plot: figure) -> None:
        """Vertical lines where runs were started again, and where they went back."""
        single = len(self.runs) == 1
        for i, run in enumerate(self.runs):
            restarts = [start.goes_on_from for start in run.restarts()]
            for steps, color, dash in (
                (restarts, MARK, "dashed"), ([rewind.to for rewind in run.rewinds], ALARM, "dotdash")
            ):  # fmt: skip
                if steps:
                    plot.vspan(
                        self.by, source=models.ColumnDataSource(self._at(run, steps)), line_dash=dash, line_width=1.5,
                        line_color=color if single else _color(i), name=f"run-{i}", level="underlay",
                    )  # fmt: skip

    def _hover(self, run: Run, renderer, values: list[tuple[str, str]], fields: Sequence[str], along: bool = False):
        """fields: those that `values` gives a format for; along: of a lone line, found by x alone."""
        rows = [*values, ("step", "@steps{0,0}")]
        if len(self.runs) > 1:
            rows.insert(0, ("run", _literal(run.name)))
        mode = "vline" if along and len(self.runs) == 1 else "mouse"
        formatters = {f"@{field}": "printf" for field in fields}
        return models.HoverTool(renderers=[renderer], tooltips=rows, formatters=formatters, mode=mode, visible=False)


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between two positive numbers; of many, the powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in ((1, 2, 5) if len(powers) < 5 else (1,))]
    return [number for number in found if low <= number <= high]


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _literal(text: str) -> str:
    """Text for a tooltip, which Bokeh fills fields into and then reads as HTML."""
    return re.sub(r"[@$]", lambda found: f"&#{ord(found[0])};", escape(text))


def _heat_map(name: str, title: str, moments: Sequence[tuple[str, dict[str, float]]]) -> Chart:
    """moments: (when, {layer: norm}); brighter is more."""
    layers = list(dict.fromkeys(layer for _, norms in moments for layer in norms))
    cells = [(i, when, layer, norm) for i, (when, norms) in enumerate(moments) for layer, norm in norms.items()]
    norms = np.array([cell[3] for cell in cells])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(norms)
    low, high = limits(logs, 0.0) or (0.0, 1.0)
    places = np.clip(np.nan_to_num((logs - low) / (high - low), nan=1.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
    columns = dict(zip(("x", "when", "layer"), map(list, zip(*[cell[:3] for cell in cells], strict=True)), strict=True))
    columns |= {"norm": norms, "color": [Viridis256[int(255 * place)] for place in places]}
    plot = figure(
        height=110 + 22 * len(layers), sizing_mode="stretch_width", y_range=layers[::-1], tools="",
        x_range=models.Range1d(-0.5, len(moments) - 0.5), toolbar_location=None,
    )  # fmt: skip
    source = models.ColumnDataSource(columns)
    drawn = plot.rect("x", "layer", 1, 1, source=source, fill_color="color", line_color=None)
    tooltips = [("step", "@when"), ("", "@layer"), ("norm", "@norm{%.4g}")]
    plot.add_tools(models.HoverTool(renderers=[drawn], tooltips=tooltips, formatters={"@norm": "printf"}))
    plot.grid.grid_line_color = None
    shown = range(0, len(moments), -(-len(moments) // HEAT_MAP_LABELS))
    plot.xaxis.ticker = models.FixedTicker(ticks=list(shown))
    plot.xaxis.major_label_overrides = {i: moments[i][0] for i in shown}
    plot.xaxis.major_label_orientation = 0.9
    for axis in (plot.xaxis, plot.yaxis):
        axis.major_label_text_font_size = "12px"
    finite = norms[np.isfinite(norms)]
    span = f"{finite.min():.3g} (dark) to {finite.max():.3g} (bright), logarithmic" if len(finite) else "none is finite"
    return Chart(name, title, f"L2 norms; {span}.", plot)


def _by_layer(norms: dict[str, object], places: int) -> dict[str, float]:
    """{"embed": ..., "layer 0": ..., "head": ...} from norms by parameter, of which stacks have one for each layer."""
    squares: dict[str, float] = {}
    for name, values in norms.items():
        found = re.match(r"blocks/(?:(\d+)/)?", name)
        if found is None:
            squares[name.partition("/")[0]] = squares.get(name.partition("/")[0], 0.0) + float(values) ** 2
            continue
        for repetition, norm in enumerate(np.atleast_1d(np.array(values, float))):
            layer = f"layer {repetition * places + int(found[1] or 0)}"
            squares[layer] = squares.get(layer, 0.0) + float(norm) ** 2

    def order(layer: str) -> tuple[bool, int]:
        return layer != "embed" and layer != "position_embed", int(layer[6:]) if layer.startswith("layer ") else 10**9

    return {layer: squares[layer] ** 0.5 for layer in sorted(squares, key=order)}
