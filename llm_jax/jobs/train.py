"""`llm-jax train`: the whole run, top to bottom. Start reading here.

The same command goes on where an earlier start of it stopped, and does nothing but report if it is finished.
"""

import collections
import concurrent.futures
import functools
import json
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Config, UserError
from llm_jax.data.stream import HeldOut, TrainStream
from llm_jax.jobs import evaluate as evaluation
from llm_jax.jobs.generate import generate
from llm_jax.jobs.prepare import Prepared, prepare, summary, table
from llm_jax.jobs.record import Record, untrained_perplexity
from llm_jax.jobs.workdir import Workdir, start
from llm_jax.measure.flops import parameter_count, peak_flops
from llm_jax.model.decoding import Sampling
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import Rules, global_rows, make_mesh, replicated, require_divisible
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.safety.guards import all_finite
from llm_jax.training.optimizer import make_optimizer
from llm_jax.training.schedule import make_schedule
from llm_jax.training.state import TrainState, abstract_state, compute_dtype, make_init, model_shape
from llm_jax.training.step import train_step

PREEMPTED = 75  # exit code: saved after a notice, start again
BATCHES_AHEAD = 2


def run(config: Config, workdir: str, as_json: bool = False) -> int:
    """The verb; returns the exit code: 0 done, 75 saved after a preemption notice."""
    say = functools.partial(print, file=sys.stderr) if as_json else print
    work = Workdir(workdir)
    work.claim(config)
    start(config, saves_on_sigterm=True)
    mesh, rules = make_mesh(config.parallel), Rules()
    prepared = prepare(work.with_own_tokenizer(config), say=say)
    say(table(summary(prepared)))
    stream = make_stream(config, prepared)

    optimizer = make_optimizer(config.optimizer, config.train.steps)
    schedule = make_schedule(config.optimizer, config.train.steps)
    shape = model_shape(
        config.model, vocab_size=prepared.tokenizer.vocab_size, sequence_length=config.train.sequence_length
    )
    init = make_init(config.model, shape, optimizer, mesh=mesh, rules=rules, seed=config.train.seed)
    require_divisible_batch(config, mesh, rules)
    device = jax.local_devices()[0]
    peak = peak_flops(device, compute_dtype(config.model, device.platform))

    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(
            work.checkpoints, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every
        )
        state, first_step = restore_or_init(checkpoints, init, mesh, stream, config)
        if hosts.is_first():
            work.save_tokenizer(prepared.tokenizer)
            work.save_config(config)
        say(describe(state, config, mesh, first_step))
        step_function = jax.jit(
            functools.partial(
                train_step,
                optimizer=optimizer,
                schedule=schedule,
                num_microbatches=config.train.microbatches,
                z_loss=config.train.z_loss,
                chunk=config.train.loss_chunk,
            ),
            donate_argnames="state",
        )
        held_out = {name: HeldOut(store, config.train.sequence_length) for name, store in prepared.held_out.items()}
        evaluate = evaluation.make_evaluate(mesh, config.evaluate.batch_size, config.train.loss_chunk)
        record = Record(work, config, shape, peak, mesh.size, first_step)

        def save(step: int, state: TrainState) -> None:
            record.flush()  # the record reaches as far as the checkpoint, and holds no NaN
            items = {"parameters": state.parameters, "optimizer": state.optimizer}
            if not all_finite(items):
                raise FloatingPointError(
                    f"step {step} made a parameter NaN or infinite; the checkpoints are from before"
                )
            checkpoints.save(step, items, {"data": stream.fingerprint})

        def due(step: int) -> bool:
            every = config.evaluate.every
            return step in (0, config.train.steps) or (every is not None and step % every == 0)

        if due(first_step) and not record.has_evaluation(first_step):
            record.evaluation(first_step, evaluate(state.parameters, held_out, config.evaluate.subset))
        try:
            for step, batch in zip(
                range(first_step + 1, config.train.steps + 1), batches(stream, first_step, mesh, rules), strict=False
            ):
                state, metrics = step_function(state, batch)
                record.training(step, metrics)
                checkpoints.check()
                preempted = checkpoints.reached_preemption(step)
                # Before the checkpoint: a run that goes on from it has this line. After a notice there is no time for
                # it, and the next start makes up for it.
                if due(step) and not preempted:
                    record.flush()
                    record.evaluation(step, evaluate(state.parameters, held_out, config.evaluate.subset))
                if preempted or step == config.train.steps or step % config.checkpoint.every == 0:
                    save(step, state)
                if preempted:
                    checkpoints.close()
                    record.close()
                    say(f"preempted: saved step {step}; the same command goes on from there")
                    return PREEMPTED
        except FloatingPointError:
            checkpoints.close()  # what is being saved is from before
            raise
        checkpoints.close()
        record.close()
        finish(work, config, prepared, state, held_out, evaluate, mesh, as_json)
    return 0


def make_stream(config: Config, prepared: Prepared) -> TrainStream:
    return TrainStream(
        prepared.train,
        prepared.weights,
        sequence_length=config.train.sequence_length,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
    )


def require_divisible_batch(config: Config, mesh: jax.sharding.Mesh, rules: Rules) -> None:
    rows = config.train.batch_size // config.train.microbatches
    field = "train.batch_size / train.microbatches" if config.train.microbatches > 1 else "train.batch_size"
    require_divisible(mesh, rules, {field: (rows, "batch")})


def restore_or_init(
    checkpoints: Checkpoints, init, mesh: jax.sharding.Mesh, stream: TrainStream, config: Config
) -> tuple[TrainState, int]:
    """The newest intact checkpoint, or the state of step 0. Refuses a checkpoint that was trained on other data."""
    target = abstract_state(init, mesh)
    restored = checkpoints.restore({"parameters": target.parameters, "optimizer": target.optimizer})
    if restored is None:
        # On CPU most of the time until the first step would be the optimization of code that runs once.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        return jax.jit(init, compiler_options=options)(), 0
    step, items, meta = restored
    if meta["data"] != stream.fingerprint and not config.checkpoint.allow_other_data:
        changed = [
            f"{key} {meta['data'].get(key)!r} -> {value!r}"
            for key, value in stream.fingerprint.items()
            if meta["data"].get(key) != value
        ]
        raise UserError(
            f"the checkpoint of step {step} was trained on other data ({'; '.join(changed)}); restore those data, take "
            "another --workdir, or go on with the new data by --config.checkpoint.allow_other_data"
        )
    if step > config.train.steps:
        raise UserError(
            f"train.steps={config.train.steps} is less than the {step} steps in the checkpoint; try {step} or more"
        )
    steps_done = jax.device_put(jnp.asarray(step, jnp.int32), replicated(mesh))
    return TrainState(steps_done, items["parameters"], items["optimizer"]), step


def batches(
    stream: TrainStream, first_step: int, mesh: jax.sharding.Mesh, rules: Rules
) -> Iterator[dict[str, jax.Array]]:
    """The batches from the one after first_step updates on, read ahead by a thread."""
    sharding = jax.NamedSharding(mesh, rules.spec("batch", None))

    def load(step: int) -> dict[str, jax.Array]:
        def rows(first: int, last: int) -> dict[str, np.ndarray]:
            batch = stream.batch(step, first, last)
            return {"tokens": batch.tokens_BU, "segments": batch.segments_BU, "positions": batch.positions_BU}

        return global_rows(rows, stream.batch_size, sharding)

    with concurrent.futures.ThreadPoolExecutor(1, "batches") as executor:
        ahead = collections.deque(executor.submit(load, first_step + i) for i in range(BATCHES_AHEAD))
        step = first_step + BATCHES_AHEAD
        while True:
            batch = ahead.popleft().result()
            ahead.append(executor.submit(load, step))
            step += 1
            yield batch


def describe(state: TrainState, config: Config, mesh: jax.sharding.Mesh, first_step: int) -> str:
    device = mesh.devices.flat[0]
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    where = f"{mesh.size} x {device.device_kind}" + (f" as {sizes}" if sizes else "")
    how = f"goes on from step {first_step}" if first_step else "starts"
    dtype = compute_dtype(config.model, device.platform)
    return (
        f"model: {parameter_count(state.parameters):,} parameters, computed in {dtype} on {where}; the run {how}, "
        f"{config.train.steps} steps of {config.train.batch_size} x {config.train.sequence_length} tokens"
    )


def finish(work, config, prepared, state, held_out, evaluate, mesh, as_json: bool) -> None:
    """Evaluates everything, shows a sample, and says where things lie."""
    result = {"step": config.train.steps, **evaluate(state.parameters, held_out)}
    if hosts.is_first():
        work.save_evaluation(result)
    sample = None
    if config.log.sample_prompt is not None:
        sampling = Sampling(temperature=0.8, top_p=0.95)
        prompt, length = config.log.sample_prompt, config.log.sample_tokens
        if state.parameters.position_embed is not None:
            length = min(length, config.train.sequence_length - 1 - len(prepared.tokenizer.encode([prompt])[0]))
        if length > 0:  # else the prompt takes all positions there are
            sample = prompt + generate(
                state.parameters, prepared.tokenizer, [prompt], mesh=mesh, sampling=sampling, max_tokens=length, seed=0
            )[0]  # fmt: skip
    if not hosts.is_first():
        return
    if as_json:
        print(
            json.dumps({"workdir": str(work.path), "evaluate": result, "sample": sample}, indent=2, ensure_ascii=False)
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
        f"{work.path}: metrics.jsonl (the record), checkpoints/, evaluate.json, tokenizer.model, tensorboard/\n"
        f"Try: llm-jax generate --workdir={work.path} --prompt='The'"
    )
