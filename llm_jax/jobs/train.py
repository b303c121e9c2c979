"""`llm-jax train`: the whole run, top to bottom. Start reading here.

The same command goes on where an earlier start of it stopped, and does nothing but report if it is finished.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from llm_jax.config import Config, RunFailed, UserError, dumps
from llm_jax.data.stream import HeldOut
from llm_jax.environment import repeats_exactly
from llm_jax.jobs import evaluate as evaluation
from llm_jax.jobs.evaluate import make_evaluate
from llm_jax.jobs.generate import generate
from llm_jax.jobs.prepare import Prepared, prepare, summary, table
from llm_jax.jobs.record import Record, Spike, untrained_perplexity
from llm_jax.jobs.sections import Sections
from llm_jax.jobs.setup import Setup, batch_text, describe_batch, items
from llm_jax.jobs.workdir import Workdir, start
from llm_jax.measure.flops import parameter_count
from llm_jax.measure.goodput import Ledger, process_began
from llm_jax.measure.metrics import encode
from llm_jax.model.decoding import Sampling
from llm_jax.parallel import hosts
from llm_jax.parallel.pipeline import bubble_fraction
from llm_jax.safety import replicas
from llm_jax.safety.checkpoint import Checkpoints, SaveFailed
from llm_jax.safety.digest import digests
from llm_jax.safety.rewinds import Rewind, Rewinds
from llm_jax.safety.structure import named_leaves
from llm_jax.safety.watchdog import Watchdog
from llm_jax.training.state import TrainState, compute_dtype

PROBE_BYTES = 32_000_000
SECONDS_TO_NOTICE = 1.0  # JAX's preemption service looks once a second


def run(config: Config, workdir: str, as_json: bool = False, **processes) -> int:
    """The verb; returns the exit code: 0 done, 75 saved after a preemption notice. processes: see hosts.start."""
    say = functools.partial(print, file=sys.stderr) if as_json else print
    work = Workdir(workdir)
    limits = dataclasses.asdict(config.watchdog)
    limits |= {"restore": limits["start"], "data": limits["step"], "finish": limits["evaluation"]}
    with contextlib.ExitStack() as stack:
        stack.callback(work.close)
        watchdog = Watchdog(limits, work.stacks, process=0)
        stack.callback(watchdog.close)
        start(config, saves_on_sigterm=True, **processes)
        watchdog.process = jax.process_index()
        repeats = repeats_exactly(jax.devices()[0].platform, os.environ)
        if config.checkpoint.recompute_every and not repeats:
            raise UserError(
                f"checkpoint.recompute_every={config.checkpoint.recompute_every} compares updates bit for bit, which "
                "GPUs repeat only with XLA_FLAGS=--xla_gpu_deterministic_ops=true; set it, or leave the field out"
            )
        if hosts.is_first():
            work.claim(config)
        else:
            say = silent
        hosts.require_same("--config", dumps(config))
        if not hosts.is_first():
            work.follow()
        preemption = hosts.Preemption()
        ledger = Ledger(work.ledger if hosts.is_first() else None, began=process_began())
        stack.callback(ledger.close)
        sections = Sections(ledger, watchdog, say)

        def leave(text: str) -> None:  # is called in a thread, and then the process ends
            work.let_go()
            say(text)

        with sections("prepare"), preemption.leaving_at_once(leave):
            prepared = prepare(work.with_own_tokenizer(config), say=say)
        say(table(summary(prepared)))
        setup = Setup(config, prepared)
        if setup.why_mesh is not None:
            say(f"parallel.auto: {setup.why_mesh}")
        because = "" if setup.why_attention is None else f", because {setup.why_attention}"
        say(f"attention: {setup.attention}{because}")
        if setup.stages > 1:
            idle = bubble_fraction(setup.stages, setup.parallel.rounds, config.train.microbatches)
            say(
                f"pipeline: {setup.stages} stages, each without work for {idle:.1%} of a step; more microbatches or "
                "parallel.rounds lessen it"
            )
        held_out = {name: HeldOut(store, config.train.sequence_length) for name, store in prepared.held_out.items()}
        evaluate = make_evaluate(setup.mesh, config.evaluate.batch_size, config.train.loss_chunk)
        with jax.set_mesh(setup.mesh):
            state = train(work, config, prepared, setup, held_out, evaluate, sections, preemption, say, leave)
            if state is None:
                return hosts.PREEMPTED
            with sections("finish"), preemption.leaving_at_once(leave):
                result = evaluate(state.parameters, held_out, proceed=sections.progress)
                finish(work, config, prepared, setup, state, result, as_json)
    return 0


def train(
    work: Workdir,
    config: Config,
    prepared: Prepared,
    setup: Setup,
    held_out: dict[str, HeldOut],
    evaluate: Callable,
    sections: Sections,
    preemption: hosts.Preemption,
    say: Callable[[str], None],
    leave: Callable[[str], None],
) -> TrainState | None:
    """From the newest checkpoint to the last step; None after a preemption notice. What there is has been saved."""
    total = config.train.steps
    rewinds = Rewinds(work.rewinds)
    checkpoints = Checkpoints(
        work.checkpoints,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        keep_best=config.checkpoint.keep_best,
        before_save=work.before_save,
    )

    def due(step: int) -> bool:
        every = config.evaluate.every
        return step in (0, total) or (every is not None and step % every == 0)

    def describe_step(step: int) -> str:
        return batch_text(describe_batch(setup.stream, prepared.tokenizer, rewinds.batch_number(step - 1)))

    @contextlib.contextmanager
    def may_fail(*, last: bool = False) -> Iterator[None]:
        """Tells of a save that failed; but for the last one, and some in a row, the next one may do."""
        try:
            yield
        except SaveFailed as error:
            if last or checkpoints.failures >= config.checkpoint.max_failures:
                raise
            record.say(f"WARNING: {error}; the run goes on and tries again at the next save")

    def current() -> TrainState:
        return jax.tree.unflatten(structure, leaves)

    def save(step: int, held_out_loss: float | None) -> None:
        record.flush()  # the record reaches as far as the checkpoint, and holds no NaN
        checkpoints.save(step, items(current()), setup.origin(rewinds), held_out_loss)
        sections.ledger.saved(step)

    with preemption.leaving_at_once(leave):  # nothing would be lost
        with sections("restore"):
            state, first_step = setup.restore_or_init(checkpoints, rewinds)
        if hosts.is_first():
            work.save_tokenizer(prepared.tokenizer)
            work.save_config(config)
        sections.ledger.goes_on_from(first_step)
        say(describe(state, config, setup.mesh, first_step))
        say(preemption_budget(work, config, state))
        with sections("compile"):
            update = setup.compile(state)
            checkpoints.warm_up(items(state))
        record = Record(work, config, setup, first_step, sections, describe_step)
        if due(first_step) and not record.has_evaluation(first_step):
            with sections("evaluation"):
                result = evaluate(state.parameters, held_out, config.evaluate.subset, proceed=sections.progress)
                record.evaluation(first_step, result)

    leaves, structure = jax.tree.flatten(state)
    del state  # the next update overwrites it
    while True:
        step, batches, preempted = first_step, setup.batches(first_step, rewinds), False
        sections.enter("step")
        try:
            for step in range(first_step + 1, total + 1):
                with sections("data"):
                    batch = next(batches)
                if config.checkpoint.recompute_every and step % config.checkpoint.recompute_every == 0:
                    leaves, metrics = repeated(update, leaves, structure, batch, step)
                else:
                    leaves, metrics = update(leaves, batch)
                record.training(step, metrics)
                with may_fail():
                    checkpoints.check()
                preempted = preemption.reached()
                loss = None
                # Before the checkpoint: a run that goes on from it has this line. After a notice there is no time for
                # it, and the next start makes up for it.
                if due(step) and not preempted:
                    with sections("evaluation"):
                        record.flush()
                        result = evaluate(
                            current().parameters,
                            held_out,
                            config.evaluate.subset,
                            proceed=lambda: sections.progress() and not preemption.reached(),
                        )
                    if result is None:
                        preempted = True
                    else:
                        loss = result["all"]["loss"]
                        record.evaluation(step, result)
                last = preempted or step == total
                if last or step % config.checkpoint.every == 0:
                    with sections("checkpoint"):
                        with may_fail():  # if the one before has failed, that is no reason not to save
                            checkpoints.wait()
                        with may_fail(last=last):
                            save(step, loss)
                if preempted:
                    with sections("checkpoint"):
                        checkpoints.close(verify=False)
                    record.close()
                    say(f"preempted: saved step {step}; the same command goes on from there")
                    return None
        except Spike as spike:
            if preempted:  # the next start comes by the same spike, and has the time to go back
                checkpoints.close(verify=False)
                record.close()
                say(f"preempted at {spike}: nothing to save; the same command goes on")
                return None
            if len(rewinds.done) >= config.spikes.limit:
                checkpoints.close(verify=False)
                raise RunFailed(f"{spike}: spikes.limit={config.spikes.limit} rewinds have been made") from spike
            del leaves
            with sections("restore"):
                with may_fail():
                    checkpoints.wait()
                rewinds.add(go_back(spike.step, checkpoints, config), write=hosts.is_first())
                if hosts.is_first():  # before the checkpoints of the path that is left are removed
                    work.push(work.rewinds)
                state, first_step = setup.restore_or_init(checkpoints, rewinds)
                leaves = jax.tree.leaves(state)
                del state
            sections.ledger.goes_on_from(first_step)
            record.rewound(rewinds.done[-1], first_step)
            continue
        except RunFailed:  # as in all processes: what is being saved is from before
            checkpoints.close(verify=False)
            raise
        except UserError:
            raise
        except Exception:
            record.crashed(step)
            raise
        finally:
            batches.close()
        with sections("checkpoint"):
            checkpoints.close()
        record.close()
        return current()


def repeated(
    update: Callable, leaves: list[jax.Array], structure: jax.tree_util.PyTreeDef, batch: dict, step: int
) -> tuple[list[jax.Array], dict]:
    """The update, made twice: bits that differ, there or between the copies of a parameter, mean failing hardware."""

    def named(leaves):
        return named_leaves(items(jax.tree.unflatten(structure, leaves)))

    again, _ = update(list(map(jnp.copy, leaves)), batch)
    expected = digests(named(again))
    del again
    leaves, metrics = update(leaves, batch)
    arrays = named(leaves)
    found = digests(arrays)
    wrong = [f"{name}: repeated, the update gives other bits" for name in found if found[name] != expected[name]]
    wrong += replicas.disagreeing(arrays)
    if hosts.anywhere(bool(wrong)):
        raise RunFailed(
            f"step {step} was computed wrongly by this hardware, and the checkpoints are from before: "
            + ("; ".join(wrong[:8]) or "another process tells what differs")
        )
    return leaves, metrics


def go_back(spike: int, checkpoints: Checkpoints, config: Config) -> Rewind:
    """To the newest checkpoint at least rewind_steps before the spike, else to the oldest one, else to the start."""
    saved = checkpoints.steps()
    before = [step for step in saved if step <= spike - config.spikes.rewind_steps]
    to = max(before) if before else min(saved, default=0)
    to = hosts.first_says(to)
    return Rewind(spike=spike, to=to, batches=max(config.spikes.rewind_batches, spike - to))  # that of the spike, too


def preemption_budget(work: Workdir, config: Config, state: TrainState) -> str:
    """Whether a save fits between a preemption notice and the end, by the speed at which the disk takes a sample."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items(state))) / jax.process_count()
    sample = bytes(min(int(size), PROBE_BYTES))
    try:
        seconds = work.probe(sample) * size / len(sample)
    except OSError as error:
        return (
            f"WARNING: {len(sample) / 1e6:,.1f} MB cannot be written to {work.name}, nor a checkpoint: {error.strerror}"
        )
    left = config.checkpoint.notice_seconds - SECONDS_TO_NOTICE - seconds
    text = (
        f"preemption: of the {config.checkpoint.notice_seconds:.0f} s after SIGTERM, up to {SECONDS_TO_NOTICE:.0f} s "
        f"pass until it is noticed, and about {seconds:.1f} s go into saving {size / 1e6:,.0f} MB"
    )
    if left <= 0:
        return f"WARNING: {text}: that does not fit; use more processes, or save more often"
    return f"{text}; it fits if a step takes less than {left / 2:.1f} s"


def describe(state: TrainState, config: Config, mesh: jax.sharding.Mesh, first_step: int) -> str:
    device = mesh.devices.flat[0]
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    where = f"{mesh.size} x {device.device_kind}" + (f" as {sizes}" if sizes else "")
    how = f"goes on from step {first_step}" if first_step else "starts"
    dtype = compute_dtype(config.model, mesh)
    return (
        f"model: {parameter_count(state.parameters):,} parameters, computed in {dtype} on {where}; the run {how}, "
        f"{config.train.steps} steps of {config.train.batch_size} x {config.train.sequence_length} tokens"
    )


def finish(
    work: Workdir, config: Config, prepared: Prepared, setup: Setup, state: TrainState, measured: dict, as_json: bool
) -> None:
    """Writes what the whole held-out text gave, shows a sample, and says where things lie."""
    result = {"step": config.train.steps, **measured}
    if hosts.is_first():
        work.save_evaluation(result)
    sample = None
    if config.log.sample_prompt is not None:
        sampling = Sampling(temperature=0.8, top_p=0.95, eos=prepared.tokenizer.eos)
        prompt, length = config.log.sample_prompt, config.log.sample_tokens
        if state.parameters.position_embed is not None:
            length = min(length, config.train.sequence_length - 1 - len(prepared.tokenizer.encode([prompt])[0]))
        # A pipeline would gather all layers for every token; `generate` takes another mesh. And no prompt may take all
        # positions there are.
        if length > 0 and setup.stages == 1:
            sample = prompt + generate(
                state.parameters, prepared.tokenizer, [prompt], mesh=setup.mesh, sampling=sampling, max_tokens=length,
                seed=0,
            )[0]  # fmt: skip
    if not hosts.is_first():
        return
    if as_json:
        print(
            json.dumps(
                {"workdir": work.name, "evaluate": encode(result), "sample": sample}, indent=2, ensure_ascii=False
            )
        )
        return
    print(f"\nAll held-out text, step {config.train.steps}:\n{evaluation.table(result)}")
    if untrained := untrained_perplexity(work):
        before, after = untrained
        times = f"{before / after:.0f} times lower"
        print(f"Perplexity of the held-out subset: {before:,.1f} untrained, {after:,.2f} trained ({times})")
    if sample is not None:
        print(f"\nSample:\n{sample}\n")
    print(
        f"{work.name}: metrics.jsonl (the record), checkpoints/, evaluate.json, tokenizer.model, tensorboard/\n"
        f"Try: llm-jax generate --workdir={work.name} --prompt='The'"
    )


def silent(text: str) -> None:
    """What a process other than the first says."""
