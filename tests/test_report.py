"""`llm-jax report` and `llm-jax status`, compared with records that are written and read here without the package.

The browser is Debian's Chromium, if it is there: nothing else shows whether the page works.
"""

import html
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from llm_jax.cli import VERBS
from llm_jax.config import (
    Checkpoint,
    Config,
    Data,
    Evaluate,
    Model,
    Optimizer,
    Source,
    Tokenizer,
    Train,
    UserError,
    dumps,
)
from llm_jax.jobs import status
from llm_jax.report import run as run_module
from llm_jax.report import series

pytest.importorskip("bokeh", reason="the extra [report] is not installed")
from llm_jax.jobs import report  # noqa: E402
from llm_jax.report import charts  # noqa: E402

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;@y{safe}$name '\"\u202e"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BEGAN = 1_700_000_000.0


def config(**changes) -> Config:
    train = Train(**({"steps": 40, "batch_size": 2, "sequence_length": 8} | changes))
    sources = (Source(name="web"), Source(name="wiki"))
    return Config(
        model=Model(num_layers=2, width=32, num_heads=4), tokenizer=Tokenizer(vocab_size=400), train=train,
        data=Data(sources=sources, data_dir="/nowhere"), checkpoint=Checkpoint(every=10), evaluate=Evaluate(every=10),
        optimizer=Optimizer(warmup_steps=4),
    )  # fmt: skip


def line(step: int, **changes) -> dict:
    """A training line."""
    loss = 2 + 6 * math.exp(-step / 10) + 0.2 * math.sin(7 * step)
    return {
        "step": step, "loss": loss, "tokens": 14 + step % 3, "seconds": 0.5 + step % 5 / 10, "grad_norm": 1 + 1 / step,
        "learning_rate": 1e-3 / step, "batch": "00000000", "tokens_per_second": 16 / (0.5 + step % 5 / 10), "mfu": 0.4,
    } | changes  # fmt: skip


def measures(loss: float) -> dict:
    return {
        "loss": loss, "perplexity": math.exp(loss), "interval95": [loss - 0.1, loss + 0.1], "top1_accuracy": 0.25,
        "top5_accuracy": 0.5, "tokens": 1234, "documents": 7,
    }  # fmt: skip


def evaluation(step: int, *, web: float, wiki: float) -> dict:
    sources = {"web": measures(web), "wiki": measures(wiki)}
    return {"kind": "evaluate", "step": step, **measures((web + wiki) / 2), "sources": sources}


def booked(start: float, now: float, step: int | None, seconds: dict, **event) -> dict:
    return {"start": BEGAN + start, "now": BEGAN + now, "seconds": seconds, "step": step, **event}


LEDGER = [
    booked(0, 5, None, {"start": 5.0}),
    booked(0, 8, None, {"start": 5.0, "restore": 3.0}, goes_on_from=0),
    booked(0, 20, 10, {"start": 5.0, "restore": 3.0, "step": 12.0}),
    booked(0, 27, 17, {"start": 5.0, "restore": 3.0, "step": 19.0}),  # killed here
    booked(40, 44, None, {"start": 4.0}, goes_on_from=10),
    booked(40, 50, 13, {"start": 4.0, "step": 6.0}),  # told to stop: saved step 13
    booked(60, 63, None, {"start": 3.0}, goes_on_from=13),
    booked(60, 75, 33, {"start": 3.0, "step": 10.0, "evaluation": 2.0}),
]


def write_run(folder, *, lines=None, settings=None, ledger=LEDGER, evaluated=True):
    """A workdir as a training leaves it, but for tokenizer and checkpoints; `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(dumps(settings or config()))
    if lines is None:
        lines = [evaluation(0, web=6.0, wiki=6.5)]
        for step in range(1, 41):
            spike = {"spike": True, "skipped": True, "grad_norm": 50.0} if step == 22 else {}
            lines.append(line(step, **spike))
            if step % 10 == 0:
                lines.append(evaluation(step, web=6 - step / 20, wiki=6.5 - step / 20))
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "ledger.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ledger))
    if evaluated:
        whole = {"step": 40, "all": measures(3.5) | {"bits_per_byte": 1.75}, "sources": {}}
        whole["sources"] = {"web": measures(3.25), "wiki": measures(3.75)}
        (folder / "evaluate.json").write_text(json.dumps(whole))
    return folder


def add_incident(folder, step: int, reason: str, *, batch: str = "row 0", time: str = "2023-11-14T22:13:40+00:00"):
    norms = {"embed": 3.0, "blocks/attention/wq": [3.0, 6.0], "blocks/attention/wo": [4.0, 8.0], "head": "NaN"}
    incident = {"step": step, "reason": reason, "time": time, "replay": f"llm-jax inspect step --step={step} # \ud83d"}
    incident |= {"gradient_norms": norms, "parameter_norms": norms, "history": []}
    place = folder / "incidents" / f"{step}-{reason}"
    place.mkdir(parents=True)
    (place / "incident.json").write_text(json.dumps(incident))
    (place / "batch.txt").write_text(batch)


def recorded(folder, kind=None) -> list[dict]:
    lines = [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]
    return [one for one in lines if one.get("kind") == kind]


def open_run(folder, settings=None) -> run_module.Run:
    return status.open_run(status.Workdir(folder), settings or config())


class Page(html.parser.HTMLParser):
    """The page as a reader has it: tables by id, texts, and everything that a browser would fetch or run."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.texts, self.figures, self.scripts, self.fetched = {}, [], {}, 0, []
        self.tags, self._table, self._term, self._inside = [], None, None, None
        self.feed(path.read_text("utf-8"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.scripts += tag == "script"
        self.tags.append(tag)
        self.fetched += [value for key in ("src", "href", "srcset", "data") if (value := attributes.get(key))]
        assert not any(key.startswith("on") for key in attributes), attributes
        if tag == "table":
            self._table = self.tables.setdefault(attributes.get("id", len(self.tables)), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        self._inside = tag

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None
        self._inside = None

    def handle_data(self, data):
        if self._inside in ("script", "style"):
            return
        self.texts.append(data)
        if self._table and self._table[-1]:
            self._table[-1][-1] += data
        if self._inside == "dt":
            self._term = data
        elif self._inside == "dd":
            self.figures.setdefault(self._term, data.strip())

    def row(self, table: str, head: str) -> list[str]:
        return next([cell.strip() for cell in row[1:]] for row in self.tables[table] if row[0].strip() == head)


def make(folder, *, out=None, settings=None, **options) -> Page:
    report.run(settings or config(), str(folder), out=out and str(out), **options)
    return Page(out or folder / "report.html")


def test_the_page_says_what_the_record_says(tmp_path):
    folder = write_run(tmp_path / "first")
    page = make(folder)
    lines = recorded(folder)
    assert page.figures["Step"] == "40"
    assert page.figures["Tokens"] == f"{sum(one['tokens'] for one in lines):,}"
    assert page.figures["Held-out perplexity"] == f"{math.exp(3.5):,.2f}"
    assert page.figures["Training loss"] == f"{lines[-1]['loss']:.4f}"
    rates = sorted(one["tokens_per_second"] for one in lines)
    assert page.figures["Tokens/s, median"] == f"{(rates[19] + rates[20]) / 2:,.0f}"
    assert "finished" in page.text and f"perplexity of {math.exp(6.25):.1f}" in page.text
    for name, loss in {"web": 3.25, "wiki": 3.75, "all": 3.5}.items():
        row = next(row for table in page.tables.values() for row in table if row[0].strip() == name)
        assert row[1:4] == [f"{loss:.4f}", f"{loss - 0.1:.4f} – {loss + 0.1:.4f}", f"{math.exp(loss):,.2f}"]
    assert "1 update spiked or gave what is not finite, 1 of them left out; 0 rewinds" in page.text
    assert page.row("config", "train.steps") == ["40", "1000"]
    assert page.row("config", "data.sources[0].name") == ["'web'", "'python_docs'"]
    assert not any(row[0] == "optimizer.name" for row in page.tables["config"])  # as by default
    told = re.findall(r"llm-jax ([\w-]+(?: checkpoints)?) (.*?)(?= To |$)", page.text.partition("Commands")[2])
    assert {f"train --workdir={folder}", f"evaluate --workdir={folder}"} <= {" ".join(words) for words in told}
    assert len(told) == 5 and {verb for verb, _ in told} <= set(VERBS)


def test_what_is_drawn_is_the_record(tmp_path):
    folder = write_run(tmp_path / "first")
    run = open_run(folder)
    drawn = {chart.name: chart.plot for chart in charts.draw([run], "steps")}
    lines = recorded(folder)
    each = drawn["loss"].renderers[0].data_source.data
    assert each["steps"].tolist() == [one["step"] for one in lines]
    np.testing.assert_allclose(each["y"], [one["loss"] for one in lines], rtol=1e-6)
    np.testing.assert_allclose(each["tokens"], np.cumsum([one["tokens"] for one in lines]), rtol=1e-6)
    np.testing.assert_allclose(each["seconds"], np.cumsum([one["seconds"] for one in lines]), rtol=1e-6)
    # Attention and feed-forward weights of 2 layers and the head, 6 FLOP each a token; of 8 keys half are seen.
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 96) + 32 * 400
    flops = 40 * 16 * (6 * weights + 3 * 2 * 2 * 2 * 32 * 8 / 2)
    unit = {axis.name: axis.unit for axis in charts.axes([run])}["flops"]
    assert each["flops"][-1] * unit == pytest.approx(flops)
    held_out = next(r for r in drawn["loss"].renderers if "perplexity" in r.data_source.data).data_source.data
    assert held_out["loss"].tolist() == [one["loss"] for one in recorded(folder, "evaluate")]
    assert held_out["low"].tolist() == [one["interval95"][0] for one in recorded(folder, "evaluate")]
    spikes = next(r for r in drawn["grad_norm"].renderers if "what" in r.data_source.data).data_source.data
    assert spikes["steps"].tolist() == [22] and spikes["what"].tolist() == ["left out"]
    restarts = next(r for r in drawn["mfu"].renderers if "y" not in r.data_source.data).data_source.data
    assert restarts["steps"].tolist() == [10, 13]
    assert "max_load" not in drawn and "memory" not in drawn and charts.heat_maps(run) == []


def heat(folder) -> tuple[list, dict]:
    """(the steps, {(step, layer): norm}) of the map of gradient norms."""
    drawn = {chart.name: chart for chart in charts.heat_maps(open_run(folder))}
    cells = drawn["gradient_norms"].plot.renderers[0].data_source.data
    norms = zip(cells["when"], cells["layer"], cells["norm"], strict=True)
    return list(dict.fromkeys(cells["when"])), {(when, layer): norm for when, layer, norm in norms}


def test_norms_by_layer(tmp_path):
    folder = write_run(tmp_path / "first")
    add_incident(folder, 22, "spike")
    _, found = heat(folder)
    assert [layer for _, layer in found] == ["embed", "layer 0", "layer 1", "head"]
    assert found["22 spike", "layer 0"] == 5.0 and found["22 spike", "layer 1"] == 10.0
    assert math.isnan(found["22 spike", "head"])

    norms = {"blocks/0/attention/wq": [1.0, 3.0], "blocks/1/moe/w_up": [2.0, 4.0]}
    settings = config()
    settings.model.pattern = ("dense", "dense")
    settings.model.num_layers = 4
    kind = {"kind": "layers", "gradient_norms": norms, "parameter_norms": norms}
    lines = [line(1), *({"step": step} | kind for step in range(1, 400))]
    folder = write_run(tmp_path / "second", lines=lines, settings=settings)
    drawn = charts.heat_maps(open_run(folder, settings))[0].plot.renderers[0].data_source.data
    assert len(set(drawn["when"])) == 200  # of 399
    assert dict(zip(drawn["layer"], drawn["norm"], strict=True)) == {f"layer {i}": i + 1.0 for i in range(4)}


def test_what_a_record_may_also_hold(tmp_path):
    lines = [{"kind": "start", "step": 0, "devices": 16, "device": "TPU v9 <x>", "processes": 4}]
    lines += [line(step, memory=step * 2.0**30) for step in range(1, 41)]
    lines += [{"kind": "sample", "step": step, "prompt": "The", "text": f" <b>{step}"} for step in range(1, 40)]
    page = make(write_run(tmp_path / "first", lines=lines))
    assert "16 × TPU v9 <x> in 4 processes" in page.text
    shown = [int(step) for step in re.findall(r"The <b>(\d+)", page.text)]
    assert shown == list(range(39, 0, -2))
    assert "Memory, GiB" in page.text


def test_starts_and_how_they_ended(tmp_path):
    folder = write_run(tmp_path / "first")
    found = open_run(folder)
    assert [(start.goes_on_from, start.reached, start.lost, start.end) for start in found.starts] == [
        (0, 17, 0, "cut off"), (10, 13, 7, "stopped, and saved"), (13, 33, 0, "")
    ]  # fmt: skip
    assert [start.down for start in found.starts] == [0, 13, 10]
    add_incident(folder, 12, "crash", time="2023-11-14T22:14:08+00:00")  # 48 s after the beginning
    assert [start.end for start in open_run(folder).starts] == ["cut off", "crashed", ""]
    page = make(folder)
    assert page.tables["starts"][2][1:4] == ["10", "13", "7"]
    causes = {row[0]: float(row[2].replace(",", "")) for row in page.tables["goodput"][1:]}
    assert sum(causes.values()) == pytest.approx(75.0, abs=0.5)
    assert causes["lost work"] == 7.0 and causes["downtime"] == 23.0


def test_rewinds_are_marked(tmp_path):
    folder = write_run(tmp_path / "first", ledger=LEDGER[:4])
    done = [{"spike": 22, "to": 20, "batches": 4}]
    (folder / "rewinds.json").write_text(json.dumps({"done": done, "cleared": True}))
    assert "1 rewind: from step 22 to 20, past 4 batches." in make(folder).text
    plot = next(chart.plot for chart in charts.draw([open_run(folder)], "tokens") if chart.name == "mfu")
    marks = next(renderer for renderer in plot.renderers if "y" not in renderer.data_source.data)
    assert marks.data_source.data["steps"].tolist() == [20] and marks.glyph.x == "tokens"
    tokens = sum(one["tokens"] for one in recorded(folder) if one["step"] <= 20)
    assert marks.data_source.data["tokens"].tolist() == [tokens]


def test_long_runs_are_thinned_and_keep_their_peaks(tmp_path):
    values = np.random.default_rng(0).normal(size=1_000_000)
    values[[123_456, 654_321]] = 1e6, -1e6
    values[500_000:510_000] = np.nan
    kept = series.thin(values)
    assert len(kept) <= 2 * series.BUCKETS + 2 and (np.diff(kept) > 0).all()
    assert {0, 123_456, 654_321, 999_999} <= set(kept.tolist())
    assert np.isnan(values[kept]).any()
    assert series.BUCKETS == 800
    for part in range(series.BUCKETS):
        here = kept[(kept >= part * 1250) & (kept < (part + 1) * 1250)]
        all_of_it = values[part * 1250 : (part + 1) * 1250]
        if np.isfinite(all_of_it).any():
            assert {np.nanmin(all_of_it), np.nanmax(all_of_it)} <= set(values[here].tolist())

    lines = [line(step) for step in range(1, 30_001)]
    lines[20_000]["loss"] = 1234.5
    settings = config(steps=30_000)
    folder = write_run(tmp_path / "long", lines=lines, settings=settings)
    make(folder, settings=settings)
    assert (folder / "report.html").stat().st_size < 2_500_000


def test_smoothing_is_a_mean_of_what_is_finite():
    values = np.array([5.0, 1, 3, np.nan, 4, np.inf, 2, 6])
    expected = [5.0, 3.0, 2.0, 3.5, 4.0, 3.0, 4.0, 4.0]
    np.testing.assert_allclose(series.smooth(values, 3), expected)
    assert np.isnan(series.smooth(np.array([np.nan] * 3), 3)).all()


def test_values_that_are_not_finite(tmp_path):
    lines = [line(step) for step in range(1, 31)]
    lines[9] |= {"loss": "NaN", "grad_norm": "Infinity", "spike": False, "skipped": False}
    lines += [line(step, loss="NaN", grad_norm="NaN", spike=False, skipped=False) for step in range(31, 41)]
    page = make(write_run(tmp_path / "first", lines=lines, evaluated=False))
    assert page.figures["Training loss"] == "–"
    assert "11 updates spiked or gave what is not finite" in page.text
    page = make(write_run(tmp_path / "all", lines=[line(1, loss="NaN", grad_norm="NaN", mfu="NaN", spike=False)]))
    assert page.figures["MFU, median"] == "–"


def test_what_is_missing_is_said(tmp_path):
    page = make(write_run(tmp_path / "first", evaluated=False))
    assert f"Fixed subset, step 40. Untrained, the subset had a perplexity of {math.exp(6.25):.1f}" in page.text
    folder = write_run(tmp_path / "second", lines=[line(1)], ledger=[], evaluated=False)
    page = make(folder)
    assert f"Not evaluated yet: llm-jax evaluate --workdir={folder}" in page.text and "no ledger" in page.text
    empty = write_run(tmp_path / "empty", lines=[evaluation(0, web=6, wiki=6)], ledger=LEDGER[:2], evaluated=False)
    with pytest.raises(UserError, match=rf"^{empty}/metrics.jsonl holds no step yet; [^\n]+$"):
        make(empty)
    with pytest.raises(UserError, match=r"^--compare=/no/such holds no run: [^\n]+ does not exist$"):
        make(folder, compare=["/no/such"])
    for out in (tmp_path, tmp_path / "none" / "report.html"):
        with pytest.raises(UserError, match=rf"^--out={out} must be a file in a folder that exists; [^\n]+$"):
            make(folder, out=out)
    with pytest.raises(UserError, match="^--by=epochs must be one of step, tokens, flops, time$"):
        make(folder, by="epochs")
    without = "import sys; sys.modules['bokeh'] = None; from llm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", without, "report", f"--workdir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    way_out = "report needs bokeh; install it with: pip install 'llm-jax[report]'"
    assert (done.returncode, done.stderr) == (78, f"llm-jax: error: {way_out}\n")


def test_texts_are_shown_and_not_run(tmp_path):
    settings = config()
    settings.data.sources[0].name = EVIL
    lines = [evaluation(0, web=6, wiki=6), line(1), evaluation(1, web=5, wiki=5)]
    for one in (lines[0], lines[2]):
        one["sources"][EVIL] = one["sources"].pop("web")
    plain = make(write_run(tmp_path / "plain", evaluated=False))
    folder = write_run(tmp_path / "x<script>alert(3)<", lines=lines, settings=settings, evaluated=False)
    add_incident(folder, 1, "spike", batch=EVIL)
    other = write_run(tmp_path / "y<script>", settings=config())
    page = make(folder, settings=settings, compare=[str(other)])
    assert page.scripts == plain.scripts and "img" not in page.tags
    assert EVIL[:40] in page.text and "alert(3)" in page.text
    alone = make(folder, settings=settings, out=tmp_path / "alone.html")
    assert alone.scripts == plain.scripts and "img" not in alone.tags


def test_names_in_tooltips_are_texts():
    """Bokeh takes what is not a field for HTML, and @ and $ for fields."""
    from llm_jax.report.charts import _literal

    assert html.unescape(_literal(EVIL)) == EVIL
    assert not set("<>@$") & set(_literal(EVIL))


def test_the_data_card_of_a_source(tmp_path):
    from test_card import counted, facts

    from llm_jax.corpus.card import write_card

    place = tmp_path / "data" / "web" / "1.0.0"
    place.mkdir(parents=True)
    write_card(str(place), facts(description="All <b>of it"), counted())
    written = json.loads((place / "card.json").read_text())
    settings = config()
    settings.data.data_dir = str(tmp_path / "data")
    page = make(write_run(tmp_path / "first", settings=settings), settings=settings)
    assert "Data card of web All <b>of it" in page.text
    read, dropped = (written["documents"][key] for key in ("read", "dropped"))
    assert f"Documents read {read:,} Left out {dropped:,} Kept {read - dropped:,}" in page.text
    most = max(written["dropped"], key=lambda row: row["count"])
    row = next(row for table in page.tables.values() for row in table if row[0].strip() == most["reason"])
    assert row[1] == f"{most['count']:,}"


def test_nothing_is_fetched(tmp_path):
    folder = write_run(tmp_path / "first")
    page = make(folder)
    assert page.fetched == []
    assert "default-src 'none'" in (folder / "report.html").read_text()


def test_runs_beside_each_other(tmp_path, capsys):
    folder = write_run(tmp_path / "a" / "run")
    settings = config(batch_size=4, seed=7)
    other = write_run(tmp_path / "b" / "run", settings=settings, lines=[line(step) for step in range(1, 21)])
    page = make(folder, compare=[str(other)], by="flops", out=tmp_path / "both.html", as_json=True)
    assert page.row("runs", "a/run")[1] == "40" and page.row("runs", "b/run")[1] == "33"  # by the ledger
    assert page.row("differences", "train.batch_size") == ["2", "4"]
    assert page.row("differences", "train.seed") == ["0", "7"]
    assert len(page.tables["differences"]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in printed["runs"]] == ["a/run", "b/run"]
    assert printed["report"] == str(tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert re.search(r'value="flops"[^>]* checked', text)


def test_status(tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path / "first", lines=[line(step) for step in range(1, 34)], evaluated=False)
    (folder / "checkpoints" / "30").mkdir(parents=True)

    def say(now: float) -> str:
        monkeypatch.setattr(time, "time", lambda: BEGAN + now)
        status.run(config(), str(folder))
        return capsys.readouterr().out

    assert ": running, in: useful steps; last sign of life 5 s ago\nstep 33 of 40 (82.5%)" in say(80)
    assert ": stopped; last sign of life 2 min 5 s ago" in say(200)
    status.run(config(), str(folder), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "stopped" and found["seconds_left"] is None and found["starts"] == 3
    assert found["tokens"] == sum(one["tokens"] for one in recorded(folder)) and found["mfu"] == 0.4

    with open(folder / "ledger.jsonl", "a") as file:
        file.write(json.dumps(booked(60, 85, 35, {"start": 3.0, "step": 10.5, "evaluation": 11.0})) + "\n")
    told = say(90)  # 2 steps in 10 s, and 5 to go
    assert "running, in: evaluation" in told and "about 25 s to go" in told

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(dumps(config()))
    status.run(config(), str(empty))
    assert capsys.readouterr().out == f"{empty}: not begun\n"


def test_a_real_run(trained, tmp_path, capsys):
    from llm_jax.jobs.workdir import Workdir

    settings = Workdir(trained).saved_config()
    page = make(trained, settings=settings, out=tmp_path / "report.html")
    whole = json.loads((trained / "evaluate.json").read_text())
    assert page.figures["Held-out perplexity"] == f"{whole['all']['perplexity']:,.2f}"
    parameters = re.search(r"model: ([\d,]+) parameters", (trained / "stdout.txt").read_text())[1]
    assert page.figures["Parameters"] == parameters
    capsys.readouterr()
    status.run(settings, str(trained))
    told = capsys.readouterr().out
    assert "finished" in told and "step 24 of 24" in told and "checkpoints: 16, 20, 24" in told


def browse(path) -> tuple[list[str], str]:
    """(what the page has said on the console, the document after a while)."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={path}.profile", "--virtual-time-budget=30000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr), done.stdout


needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium")


@needs_browser
def test_errors_would_show(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>missing()</script>")
    assert any("missing is not defined" in said for said in browse(bad)[0])


PROBE = """<script>
const look = setInterval(() => {
  if (!document.documentElement.dataset.charts) return;
  clearInterval(look);
  document.querySelector("input[value=seconds]").click();
  document.querySelector("input[value=run-1]")?.click();
  setTimeout(() => {
    const plot = Bokeh.documents[0].roots()[0];
    const hidden = plot.renderers.filter(renderer => !renderer.visible).length;
    document.body.dataset.seen = `${plot.below[0].axis_label}|${plot.x_range.end}|${hidden > 0}`;
  }, 500);
}, 50);
</script>"""


@needs_browser
@pytest.mark.parametrize("several", [False, True])
def test_in_a_browser(tmp_path, several):
    """All charts are drawn, nothing complains, and the switches do what they say."""
    lines = [evaluation(0, web=6, wiki=6)]
    lines += [line(step, **({"loss": "NaN", "spike": False} if step == 9 else {})) for step in range(1, 41)]
    folder = write_run(tmp_path / "first", lines=lines + [evaluation(40, web=5, wiki=5)])
    add_incident(folder, 22, "spike", batch=EVIL)
    other = write_run(tmp_path / "other", settings=config(seed=3))
    make(folder, compare=[str(other)] if several else None)
    path = folder / "report.html"
    path.write_text(path.read_text("utf-8") + PROBE)
    said, document = browse(path)
    assert [text for text in said if "[bokeh" not in text] == []
    # Loss, learning rate, gradient norm, rate, utilization; of a lone run its sources, and of the incident two maps.
    charts = 5 + 2 + (not several)
    assert int(re.search(r'data-charts="(\d+)"', document)[1]) == charts == document.count('class="plot"')
    label, end, hidden = re.search(r'data-seen="([^"]*)"', document)[1].split("|")
    seconds = sum(one["seconds"] for one in recorded(folder))
    assert label == "seconds in updates" and float(end) == pytest.approx(seconds, rel=0.05)
    assert hidden == str(several).lower()
