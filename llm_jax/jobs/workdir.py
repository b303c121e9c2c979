"""A run is a directory: what lies where in it, and how a verb opens it.

WORKDIR/config.json        the resolved config; every later verb needs --workdir alone
WORKDIR/tokenizer.model    the SentencePiece model
WORKDIR/metrics.jsonl      the record, one line a step
WORKDIR/checkpoints/STEP/  what training goes on from
WORKDIR/evaluate.json      the last full evaluation
WORKDIR/tensorboard/       the record for TensorBoard
"""

import dataclasses
import json
import os
import pathlib

import jax

from llm_jax import config as config_module
from llm_jax.config import Config, Parallel, UserError
from llm_jax.jobs.prepare import cache_dir
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import Rules, make_mesh
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.training.optimizer import make_optimizer
from llm_jax.training.state import abstract_state, make_init, model_shape

# What may change between two starts of a run without making it another run.
FREE = ("checkpoint.", "evaluate.", "log.", "parallel.", "train.steps", "train.microbatches", "train.loss_chunk",
        "model.layers", "model.remat", "data.data_dir", "data.cache_dir", "data.num_workers")  # fmt: skip


class Workdir:
    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.model"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluate.json"

    def claim(self, config: Config) -> None:
        """Makes the directory that of a run with this config, or checks that it is; UserError with the differences."""
        if self.config.exists():
            saved = config_module.from_dict(json.loads(self.config.read_text()))
            changed = {
                field: values
                for field, values in config_module.differences(saved, config).items()
                if not field.startswith(FREE)
            }
            if changed:
                lines = [f"{field}: {old!r} there, {new!r} now" for field, (old, new) in changed.items()]
                raise UserError(
                    f"--workdir={self.path} holds a run with another config; take another --workdir, or these values\n"
                    + "\n".join(lines)
                )
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, config_module.dumps(config))


def write_atomically(path: pathlib.Path, text: str) -> None:
    """The file has the old text or the new one, whenever the process dies."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def start(config: Config) -> None:
    """Starts JAX as the config says; what it compiles is kept for the next start."""
    hosts.start(config.parallel, compilation_cache=os.path.join(cache_dir(config.data), "compiled"))


def mesh_for_reading(parallel: Parallel) -> jax.sharding.Mesh:
    """The run's mesh, or one over whatever devices are here: evaluation and generation do not depend on it."""
    try:
        return make_mesh(parallel)
    except UserError:
        return make_mesh(dataclasses.replace(parallel, replica=1, fsdp=None, tensor=1))


def restore_parameters(
    workdir: Workdir, config: Config, vocab_size: int, mesh: jax.sharding.Mesh, *, step: int | None
) -> tuple[int, object]:
    """(step, model) of the newest intact checkpoint, or of `step`; only the parameters are read."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    shape = model_shape(config.model, vocab_size=vocab_size, sequence_length=config.train.sequence_length)
    init = make_init(config.model, shape, optimizer, mesh=mesh, rules=Rules(), seed=config.train.seed)
    target = abstract_state(init, mesh).parameters
    restored = Checkpoints(workdir.checkpoints).restore({"parameters": target}, step=step)
    if restored is None:
        raise UserError(f"{workdir.checkpoints} holds no checkpoint yet; run `llm-jax train --workdir={workdir.path}` first")
    step, items, _ = restored
    return step, items["parameters"]
