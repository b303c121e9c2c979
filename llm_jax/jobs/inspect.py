"""`llm-jax inspect ...`: looks into a run without changing it, and needs no accelerator.

batch: which text fed a step; step: what that update did; goodput: what the time went into; checkpoints: whether all are
intact; params: what is in one; diff: how two runs differ
"""

import functools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Config, UserError, differences
from llm_jax.jobs.prepare import prepare
from llm_jax.jobs.setup import Setup, batch_text, describe_batch, make_stream
from llm_jax.jobs.workdir import Workdir, start
from llm_jax.measure import goodput as ledger
from llm_jax.measure import metrics
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.safety.rewinds import Rewinds

SHOWN_CHARACTERS = 72  # of a text in a table


def batch(config: Config, workdir: str, as_json: bool = False, step: int | None = None, text: bool = False) -> None:
    """The documents of the batch that makes (or made) update `step`; with `text`, whole."""
    if step is None or step < 1:
        raise UserError("inspect batch needs --step=N, the number of an update; the first is 1")
    work = Workdir(workdir)
    prepared = prepare(work.with_own_tokenizer(config), say=functools.partial(print, file=sys.stderr))
    stream = make_stream(config, prepared)
    rows = describe_batch(stream, prepared.tokenizer, Rewinds(work.rewinds).batch_number(step - 1))
    if as_json:
        print(json.dumps({"step": step, "rows": rows}, indent=2, ensure_ascii=False))
    else:
        print(batch_text(rows, None if text else SHOWN_CHARACTERS))


def step(config: Config, workdir: str, as_json: bool = False, step: int | None = None) -> None:
    """Makes update `step` again, from the newest checkpoint before it, and shows what it did."""
    if step is None:
        raise UserError("inspect step needs --step=N, the number of an update; the first is 1")
    start(config, num_processes=1)
    work = Workdir(workdir)
    say = functools.partial(print, file=sys.stderr)
    setup = Setup(config, prepare(work.with_own_tokenizer(config), say=say))
    rewinds, saved = Rewinds(work.rewinds), Checkpoints(work.checkpoints)
    recorded = {line["step"]: line for line in metrics.read(work.metrics) if "kind" not in line}.get(step)
    with jax.set_mesh(setup.mesh):
        before = max((s for s in saved.steps() if s < step), default=None)
        if before is None:
            say("there is no checkpoint before that step: this begins at step 0")
            state, first = jax.jit(setup.init)(), 0
        else:
            state, first = setup.restore_or_init(saved, rewinds, before)
        update = setup.compile(state)
        leaves, values = jax.tree.leaves(state), {}
        for number in range(first, step):
            leaves, values = update(leaves, setup.batch(rewinds.batch_number(number)))
    result = {
        "step": step,
        "replayed_from": first,
        **{key: float(values[key]) for key in ("loss", "grad_norm", "learning_rate")},
        "batch": f"{int(values['batch']):08x}",
        "spike": bool(values["spike"]),
        "as_recorded": recorded and all(recorded[k] == float(values[k]) for k in ("loss", "grad_norm")),
        **{
            key: {name: np.asarray(norms).tolist() for name, norms in values[key].items()}
            for key in ("gradient_norms", "parameter_norms")
        },
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    width = max(map(len, result["gradient_norms"]))
    print(f"{'parameter':{width}}  layer  gradient norm  parameter norm")
    places = len(config.model.pattern)
    for name, norms in result["gradient_norms"].items():
        place = int(found[1]) if (found := re.match(r"blocks/(\d+)/", name)) else 0
        for repetition, (gradient, parameter) in enumerate(
            zip(np.atleast_1d(norms), np.atleast_1d(result["parameter_norms"][name]), strict=True)
        ):
            print(f"{name:{width}}  {repetition * places + place:5}  {gradient:13.6g}  {parameter:14.6g}")
    compared = {None: "not in the record", True: "bit-identical to the record", False: "OTHER than in the record"}
    print(
        f"step {step}, replayed from {first}: loss {result['loss']:.6g}, gradient norm {result['grad_norm']:.6g}, "
        f"learning rate {result['learning_rate']:.6g}; {compared[result['as_recorded']]}"
    )


def goodput(config: Config, workdir: str, as_json: bool = False) -> None:
    """What the time of the run went into, over all its starts."""
    work = Workdir(workdir)
    if not work.ledger.exists():
        raise UserError(
            f"{work.shown(work.ledger)} does not exist yet; run `llm-jax train --workdir={work.name}` first"
        )
    result = ledger.summarize(work.ledger)
    print(json.dumps(result, indent=2) if as_json else ledger.table(result))


def checkpoints(config: Config, workdir: str, as_json: bool = False) -> int:
    """Reads every checkpoint and compares its digests; exit code 70 if one is damaged. Changes nothing."""
    start(config, num_processes=1)
    work = Workdir(workdir)
    saved = Checkpoints(work.checkpoints)
    damage = {step: saved.verify(step) for step in saved.steps()}
    if as_json:
        print(
            json.dumps(
                {"intact": [s for s, d in damage.items() if not d], "damaged": {s: d for s, d in damage.items() if d}}
            )
        )
    elif not damage:
        print(f"{work.checkpoints} holds no checkpoint")
    else:
        for step, what in damage.items():
            print(f"step {step}: {'DAMAGED, ' + what if what else 'intact'}")
    return 70 if any(damage.values()) else 0


def params(config: Config, workdir: str, as_json: bool = False, step: int | None = None) -> None:
    """The tree of a checkpoint: names, shapes, types, and the root mean square of each array."""
    start(config, num_processes=1)
    work = Workdir(workdir)
    saved = Checkpoints(work.checkpoints)
    step = step if step is not None else saved.latest()
    if step is None:
        raise UserError(f"{work.checkpoints} holds no checkpoint yet; run `llm-jax train --workdir={work.name}` first")
    arrays = saved.read("parameters", step)
    root_mean_square = jax.jit(lambda array: jnp.sqrt(jnp.mean(jnp.square(array.astype(jnp.float32)))))
    rows = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "rms": float(root_mean_square(array))}
        for name, array in arrays.items()
    }
    if as_json:
        print(json.dumps({"step": step, "parameters": rows}, indent=2))
        return
    width = max(map(len, rows))
    for name, row in rows.items():
        print(f"{name:{width}}  {row['dtype']} {'x'.join(map(str, row['shape'])):>18}  rms {row['rms']:.4g}")
    print(f"step {step}: {sum(math.prod(row['shape']) for row in rows.values()):,} parameters")


def diff(config: Config, workdir: str, other: str | None = None, as_json: bool = False) -> None:
    """How two runs differ: config, losses of the steps both have, digests of the checkpoints both have."""
    if other is None:
        raise UserError("inspect diff needs --other=DIR, the run to compare with")
    runs = Workdir(workdir), Workdir(other)
    fields = {field: list(values) for field, values in differences(config, runs[1].saved_config()).items()}
    curves = [{line["step"]: line["loss"] for line in metrics.read(run.metrics) if "kind" not in line} for run in runs]
    common = sorted(curves[0].keys() & curves[1].keys())
    unequal = [step for step in common if curves[0][step] != curves[1][step]]
    largest = max((abs(curves[0][s] / curves[1][s] - 1) for s in unequal), default=0.0)
    saved = [Checkpoints(run.checkpoints) for run in runs]
    parameters = {}
    for step in sorted(set(saved[0].steps()) & set(saved[1].steps())):
        digests = [run.record(step)["digests"]["parameters"] for run in saved]
        names = digests[0].keys() | digests[1].keys()
        parameters[step] = sorted(name for name in names if digests[0].get(name) != digests[1].get(name))
    result = {
        "config": fields,
        "losses": {
            "common_steps": len(common),
            "first_difference": unequal[0] if unequal else None,
            "largest_relative_difference": largest,
        },
        "parameters_that_differ": parameters,
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print("config: " + ("the same" if not fields else ""))
    for field, (mine, theirs) in fields.items():
        print(f"  {field}: {mine!r} here, {theirs!r} there")
    if not common:
        print("losses: no step in common")
    elif unequal:
        print(
            f"losses of {len(common)} common steps: {unequal[0]} is the first to differ, up to {largest:.1e} relative"
        )
    else:
        print(f"losses: bit-identical in all {len(common)} common steps")
    for step, names in parameters.items():
        print(f"parameters at step {step}: " + (f"{len(names)} arrays differ" if names else "bit-identical"))
