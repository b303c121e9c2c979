"""`llm-jax evaluate`: loss, perplexity and bits per byte on held-out text, to the last token.

B row, U = T + 1 tokens of a row
"""

import functools
import json
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.config import Config, UserError
from llm_jax.data.stream import HeldOut
from llm_jax.jobs import perplexity
from llm_jax.jobs.prepare import prepare
from llm_jax.jobs.workdir import Workdir, mesh_for_reading, restore_parameters, start
from llm_jax.measure import metrics
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import Rules, global_rows, num_shards
from llm_jax.training.losses import token_losses


def run(
    config: Config,
    workdir: str,
    as_json: bool = False,
    step: int | None = None,
    batch_size: int | None = None,
    ema: bool = False,
    text: str | None = None,
    stride: int | None = None,
    wikitext: bool = False,
    tasks: list[str] | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    length: int | None = None,
) -> None:
    """The verb: evaluates a checkpoint on all held-out text, prints a table or JSON, writes WORKDIR/evaluate.json; or
    on one text, or on tasks: jobs/perplexity.py, jobs/harness.py.

    ema: the averaged parameters instead of the last ones.
    """
    of_text = {"stride": stride, "wikitext": wikitext}
    of_tasks = {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot}
    require_effect(text=text, tasks=tasks, of_text=of_text, of_tasks=of_tasks, length=length)
    common = {"as_json": as_json, "step": step, "batch_size": batch_size, "ema": ema, "length": length}
    if text:
        perplexity.run(config, workdir, text=text, **of_text, **common)
        return
    if tasks:
        try:
            from llm_jax.jobs import harness
        except ModuleNotFoundError as error:
            if str(error.name).startswith("llm_jax"):
                raise
            raise UserError(f"--tasks needs {error.name}; install it with: pip install 'llm-jax[eval]'") from error
        harness.run(config, workdir, tasks=tasks, **of_tasks, **common)
        return
    start(config)
    work = Workdir(workdir)
    say = (lambda text: None) if as_json else print
    tokenizer = work.load_tokenizer()
    prepared = prepare(work.with_own_tokenizer(config), say=say)
    mesh = mesh_for_reading(config, tokenizer.vocab_size)
    with jax.set_mesh(mesh):
        step, model = restore_parameters(work, config, tokenizer, mesh, step=step, ema=ema)
        held_out = {name: HeldOut(store, config.train.sequence_length) for name, store in prepared.held_out.items()}
        evaluate = make_evaluate(mesh, batch_size or config.evaluate.batch_size, config.train.loss_chunk)
        result = {"step": step, **evaluate(model, held_out)}
    if hosts.is_first():
        plain = metrics.encode(result)
        work.save_evaluation(plain)
        print(json.dumps(plain, indent=2) if as_json else table(result))


def require_effect(*, text: str | None, tasks: list[str] | None, of_text: dict, of_tasks: dict, length: int | None):
    """UserError for flags that contradict each other, or change nothing."""
    if text and tasks:
        raise UserError("--text and --tasks exclude each other; evaluate one after the other")
    needs = {
        "--text": (text, of_text),
        "--tasks": (tasks, of_tasks),
        "--text or --tasks": (text or tasks, {"length": length}),
    }
    for needed, (given, flags) in needs.items():
        for name, value in flags.items():
            if value is not None and value is not False and not given:
                raise UserError(f"--{name}={value} has an effect only with {needed}; leave it out")


def make_evaluate(mesh: jax.sharding.Mesh, batch_size: int, chunk: int | None) -> Callable:
    """evaluate(model, held_out, subset=None, proceed=None) -> {"all": measures, "sources": {name: measures}}.

    The function compiles once. `subset` takes that many windows of each source, evenly spaced, instead of all. Sums
    over tokens are made on the host in float64 by document, so batch size, mesh and number of hosts change at most the
    last bits of a token's loss. `proceed()` is asked before every batch, as often in every process; where it says
    False, evaluate gives up and returns None.
    """
    rules = Rules()
    sharding = jax.NamedSharding(mesh, rules.spec("batch", None))
    stages = num_shards(mesh, rules.layers)
    rows = num_shards(mesh, rules.batch) * stages
    batch_size = -(-batch_size // rows) * rows
    losses = jax.jit(functools.partial(token_losses, chunk=chunk, num_microbatches=stages))

    def evaluate(
        model,
        held_out: dict[str, HeldOut],
        subset: int | None = None,
        proceed: Callable[[], bool] | None = None,
    ) -> dict | None:
        sums = {}
        for name, split in held_out.items():
            sums[name] = sum_by_document(model, split, subset, proceed)
            if sums[name] is None:
                return None
        known = set.intersection(*(set(source) for source in sums.values()))  # bytes: only of whole splits
        everything = {key: np.concatenate([source[key] for source in sums.values()]) for key in known}
        return {"all": measures(everything), "sources": {name: measures(source) for name, source in sums.items()}}

    def sum_by_document(model, split: HeldOut, subset: int | None, proceed) -> dict[str, np.ndarray] | None:
        windows = np.arange(split.num_rows)
        if subset is not None and subset < split.num_rows:
            windows = np.linspace(0, split.num_rows - 1, subset).astype(np.int64)
        num_documents = split.store.num_documents
        sums = {key: np.zeros(num_documents) for key in ("tokens", "nll", "top1", "top5")}
        for first in range(0, len(windows), batch_size):
            if proceed is not None and not proceed():
                return None
            rows = windows[first : first + batch_size]
            rows = np.pad(rows, (0, batch_size - len(rows)), constant_values=split.num_rows)  # padding counts nothing
            batch = global_rows(functools.partial(_read, split, rows), batch_size, sharding)
            nll_BT, rank_BT = multihost_utils.process_allgather(losses(model, batch), tiled=True)
            document_BT = split.documents_BT(rows)
            counted = document_BT >= 0
            documents = document_BT[counted]
            values = {"tokens": 1.0, "nll": nll_BT[counted], "top1": rank_BT[counted] < 1, "top5": rank_BT[counted] < 5}
            for key, value in values.items():
                weights = np.broadcast_to(value, documents.shape)
                sums[key] += np.bincount(documents, weights=weights, minlength=num_documents)
        if len(windows) == split.num_rows:  # a part of a document has no known length in bytes
            sums |= {"bytes": split.store.bytes.astype(float), "words": split.store.words.astype(float)}
        return sums

    return evaluate


def _read(split: HeldOut, rows: np.ndarray, first: int, last: int) -> dict[str, np.ndarray]:
    batch = split.rows(rows[first:last])
    return {"tokens": batch.tokens_BU, "segments": batch.segments_BU, "positions": batch.positions_BU}


def measures(sums: dict[str, np.ndarray]) -> dict[str, float | list[float]]:
    """From sums by document: nats per token and what follows from them.

    interval95: of the loss, were the documents drawn anew: 1.96 standard errors of the ratio estimator (Cochran,
    Sampling Techniques, 3rd edition, section 2.11), since tokens of a document are not independent.
    bits_per_byte and word_perplexity do not depend on the tokenizer; the end of a document is counted in them.
    """
    seen = sums["tokens"] > 0
    tokens_d, nll_d = sums["tokens"][seen], sums["nll"][seen]
    tokens, nll, documents = tokens_d.sum(), nll_d.sum(), len(tokens_d)
    loss = nll / tokens
    spread = np.sum((nll_d - loss * tokens_d) ** 2) * documents / max(documents - 1, 1)
    margin = 1.96 * math.sqrt(spread) / tokens
    result = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # what a float can hold
        "interval95": [loss - margin, loss + margin],
        "top1_accuracy": sums["top1"].sum() / tokens,
        "top5_accuracy": sums["top5"].sum() / tokens,
        "tokens": int(tokens),
        "documents": documents,
    }
    if "bytes" in sums:
        result["bits_per_byte"] = nll / math.log(2) / sums["bytes"].sum()
        result["word_perplexity"] = math.exp(min(nll / sums["words"].sum(), 700.0))
        result["bytes"] = int(sums["bytes"].sum())
    return {key: value if isinstance(value, int | list) else float(value) for key, value in result.items()}


def table(result: dict) -> str:
    """For the terminal; one row per source and one for all."""
    header = (
        "held-out",
        "loss",
        "95 % interval",
        "perplexity",
        "bits/byte",
        "word ppl",
        "top-1",
        "top-5",
        "tokens",
        "documents",
    )
    rows = [header]
    sources = result["sources"] if len(result["sources"]) > 1 else {}
    for name, m in {**sources, "all": result["all"]}.items():
        name = next(iter(result["sources"])) if name == "all" and not sources else name
        low, high = m["interval95"]
        rows.append((
            name, f"{m['loss']:.4f}", f"{low:.4f} .. {high:.4f}", f"{m['perplexity']:.2f}",
            f"{m['bits_per_byte']:.4f}" if "bits_per_byte" in m else "-",
            f"{m['word_perplexity']:,.0f}" if "word_perplexity" in m else "-",
            f"{100 * m['top1_accuracy']:.1f} %", f"{100 * m['top5_accuracy']:.1f} %",
            f"{m['tokens']:,}", f"{m['documents']:,}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
