"""`llm-jax status`: how a run is doing, from its workdir alone, wherever it is trained."""

import json
import time

from llm_jax.config import Config
from llm_jax.jobs.workdir import Workdir
from llm_jax.measure import metrics
from llm_jax.measure.goodput import CAUSES
from llm_jax.plan.costs import model_flops, parameter_count
from llm_jax.plan.memory import make_job
from llm_jax.report.facts import duration, facts
from llm_jax.report.run import Run, read
from llm_jax.safety.checkpoint import Checkpoints


def run(config: Config, workdir: str, as_json: bool = False) -> None:
    """The verb: prints a few lines. Changes nothing and touches no device."""
    work = Workdir(workdir)
    found = facts(open_run(work, config), time.time()) | {"checkpoints": Checkpoints(work.checkpoints).steps()}
    print(json.dumps(metrics.encode(found), indent=2) if as_json else text(found))


def open_run(work: Workdir, config: Config, name: str = "") -> Run:
    """What the workdir says of its run. It may be trained meanwhile; no device is touched."""
    vocab_size = work.load_tokenizer().vocab_size if work.tokenizer.exists() else None
    job = make_job(config, vocab_size)
    return read(
        name=name or work.path.name,
        config=config,
        parameters=parameter_count(job.shape),
        flops_per_token=model_flops(job.shape, config.train.sequence_length, causal=True),
        path=work.path,
        record=work.metrics,
        ledger=work.ledger,
        evaluation=work.evaluation,
        rewinds=work.rewinds,
        incidents=work.incidents,
    )


def text(found: dict) -> str:
    """For a terminal; a line each, without those the record has nothing for."""
    if not found["starts"] and not found["tokens"]:
        return f"{found['workdir']}: not begun"
    first = f"{found['workdir']}: {found['state']}"
    if found["section"]:
        first += f", in: {CAUSES[found['section']]}"
    if found["seconds_silent"] is not None:
        first += f"; last sign of life {duration(found['seconds_silent'])} ago"
    progress = f"step {found['step']:,} of {found['steps']:,} ({found['step'] / found['steps']:.1%})"
    if found["tokens"]:
        progress += (
            f"  loss {found['loss']:.4f}  {found['tokens_per_second_now']:,.0f} tokens/s  MFU {found['mfu']:.1%}"
        )
    if found["seconds_left"] is not None:
        progress += f"  about {duration(found['seconds_left'])} to go"
    lines = [first, progress]
    if found["perplexity"] is not None:
        lines.append(f"held-out perplexity: {found['perplexity']:,.2f} ({found['perplexity_of']})")
    lines.append(f"checkpoints: {', '.join(map(str, found['checkpoints'])) or 'none yet'}")
    past = f"{number(found['starts'], 'start')}, {number(found['spikes'], 'spike')} ({found['skipped']} left out)"
    past += f", {number(found['rewinds'], 'rewind')}"
    lines.append(past + (f"; goodput {found['goodput']:.1%}" if found["goodput"] is not None else ""))
    return "\n".join(lines)


def number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
