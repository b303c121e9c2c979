"""The update of a tiny model, built once for all tests of a process, and what it does on 20 batches."""

import dataclasses
import functools

import jax
from tiny_model import FAST, LENGTH, RULES, VOCAB_SIZE, packed_rows, put

from llm_jax import config
from llm_jax.training.losses import Weights
from llm_jax.training.optimizer import make_optimizer
from llm_jax.training.schedule import make_schedule
from llm_jax.training.state import make_init, model_shape
from llm_jax.training.step import train_step

STEPS = 20
BATCH_SIZE = 16
OPTIMIZER = config.Optimizer(peak_learning_rate=1e-2, warmup_steps=5)
BATCHES = [packed_rows(BATCH_SIZE, seed=step) for step in range(STEPS)]


_built = {}


def build(
    mesh, model, *, num_microbatches=1, chunk=None, z_loss=1e-3, optimizer=OPTIMIZER,
    skip=False, threshold=10.0, window=8, ema_decay=None, rounds=1, load_balance=0.0, router_z=0.0,
    router_bias_rate=None,
):  # fmt: skip
    """(init, step), jitted, and compiled once for all tests. auto is scan here, not what it is on CPU."""
    settings = (num_microbatches, chunk, z_loss, skip, threshold, window, ema_decay, rounds, load_balance, router_z)
    key = (mesh, repr((model, optimizer, router_bias_rate, *settings)))
    if key not in _built:
        model = dataclasses.replace(model, layers="scan" if model.layers == "auto" else model.layers)
        made, schedule = make_optimizer(optimizer, STEPS), make_schedule(optimizer, STEPS)
        shape = model_shape(model, vocab_size=VOCAB_SIZE, sequence_length=LENGTH)
        init = make_init(
            model, shape, made, mesh=mesh, rules=RULES, seed=0, window=window, ema=ema_decay is not None, rounds=rounds
        )
        step = functools.partial(
            train_step,
            optimizer=made,
            schedule=schedule,
            num_microbatches=num_microbatches,
            pipelined=mesh.shape["stage"] > 1,
            weights=Weights(z_loss=z_loss, load_balance=load_balance, router_z=router_z),
            router_bias_rate=router_bias_rate,
            chunk=chunk,
            skip=skip,
            threshold=threshold,
            ema_decay=ema_decay,
        )
        _built[key] = jax.jit(init, compiler_options=FAST), jax.jit(step, compiler_options=FAST)
    return _built[key]


def losses(mesh, model, **settings) -> list[float]:
    with jax.set_mesh(mesh):
        init, step = build(mesh, model, **settings)
        state, result = init(), []
        for batch in BATCHES:
            state, metrics = step(state, put(batch, mesh))
            result.append(float(metrics["loss"]))
        assert step._cache_size() == 1
    return result
