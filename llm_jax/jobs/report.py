"""`llm-jax report`: a run, or several beside each other, as one HTML file."""

import json
import os
import pathlib
import time

from llm_jax.config import Config, UserError
from llm_jax.jobs.status import open_run
from llm_jax.jobs.workdir import Workdir, write_atomically
from llm_jax.measure import metrics
from llm_jax.report import page
from llm_jax.report.facts import facts

BY = {"step": "steps", "tokens": "tokens", "flops": "flops", "time": "seconds"}


def run(
    config: Config,
    workdir: str,
    as_json: bool = False,
    compare: list[str] | None = None,
    by: str | None = None,
    out: str | None = None,
) -> None:
    """The verb: writes the page. compare: workdirs of other runs; by: of BY, what is on the x axis at first; out: the
    file, by default WORKDIR/report.html."""
    if by is not None and by not in BY:
        raise UserError(f"--by={by} must be one of {', '.join(BY)}")
    path = pathlib.Path(out).expanduser() if out else Workdir(workdir).path / "report.html"
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--out={path} must be a file in a folder that exists; make it, or choose another place")
    works = [Workdir(path) for path in (workdir, *(compare or ()))]
    runs = []
    for work, name in zip(works, names([work.path for work in works]), strict=True):
        if not work.config.exists():
            raise UserError(f"--compare={work.path} holds no run: {work.config} does not exist")
        found = open_run(work, config if work is works[0] else work.saved_config(), name)
        if not len(found.steps):
            raise UserError(f"{work.metrics} holds no step yet; `llm-jax train --workdir={work.path}` writes it")
        runs.append(found)
    now = time.time()
    text = page.render(runs, by=BY[by or ("tokens" if compare else "step")], cards=cards(config), now=now)
    data = text.encode("utf-8", "replace")  # JSON may hold half a surrogate pair
    write_atomically(path, data)
    if as_json:
        result = {"report": str(path), "bytes": len(data), "runs": [facts(found, now) for found in runs]}
        print(json.dumps(metrics.encode(result), indent=2))
    else:
        print(f"{path} ({len(data) / 1e6:.1f} MB); open it in a browser, it needs no network")


def names(paths: list[pathlib.Path]) -> list[str]:
    """As few of the last parts of each path as tell them all apart."""
    for parts in range(1, max(len(path.parts) for path in paths)):
        found = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(found)) == len(found):
            return found
    return [str(path) for path in paths]


def cards(config: Config) -> dict[str, dict]:
    """The newest data card of each source that has one, where `llm-jax build` has put it."""
    folder = pathlib.Path(config.data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    found = {}
    for source in config.data.sources:
        paths = list((folder.expanduser() / source.name.replace(":", "/")).glob("**/card.json"))
        if paths:
            newest = max(paths, key=lambda path: path.stat().st_mtime)
            found[source.name] = json.loads(newest.read_text("utf-8"))
    return found
