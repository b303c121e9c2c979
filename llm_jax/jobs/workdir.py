"""A run is a directory: what lies where in it, and how a verb opens it.

WORKDIR/config.json        the resolved config; every later verb needs --workdir alone
WORKDIR/tokenizer.model    the SentencePiece model
WORKDIR/metrics.jsonl      the record, one line a step
WORKDIR/checkpoints/STEP/  what training goes on from
WORKDIR/imported.json      where the parameters of step 0 came from, in a run that began with those of another library
WORKDIR/evaluate.json      the last full evaluation
WORKDIR/ledger.jsonl       what the time went into, over all starts
WORKDIR/incidents/         what was recorded at a spike, a NaN or a crash
WORKDIR/rewinds.json       where the run went back, and past which batches
WORKDIR/stacks/            what each thread was doing when the watchdog ended the run
WORKDIR/lock               held by the process that trains
WORKDIR/tensorboard/       the record for TensorBoard
"""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import sys
import time

import jax

from llm_jax import config as config_module
from llm_jax.config import Config, Parallel, UserError
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.jobs.prepare import cache_dir
from llm_jax.jobs.setup import resolve_mesh
from llm_jax.measure import metrics
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import Rules, make_mesh
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.training.optimizer import make_optimizer
from llm_jax.training.state import abstract_state, make_init, model_shape

# What may change between two starts of a run without making it another run.
FREE = ("checkpoint.", "evaluate.", "log.", "parallel.", "train.steps", "train.microbatches", "train.loss_chunk",
        "model.layers", "model.remat", "data.data_dir", "data.cache_dir", "data.num_workers", "watchdog.",
        "spikes.action", "spikes.threshold", "spikes.limit", "spikes.rewind_")  # fmt: skip
# And what may with checkpoint.allow_other_data: what the fingerprint of the data is made of.
DATA = ("data.", "train.batch_size", "train.sequence_length", "train.seed")
# And before the first step with an imported model.
NOT_IMPORTED = ("optimizer.", "train.", "spikes.")


SECONDS_TO_LOCK = 10.0
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class Workdir:
    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.model"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.imported = self.path / "imported.json"
        self.evaluation = self.path / "evaluate.json"
        self.ledger = self.path / "ledger.jsonl"
        self.incidents = self.path / "incidents"
        self.rewinds = self.path / "rewinds.json"
        self.stacks = self.path / "stacks"
        self._lock = None

    def claim(self, config: Config) -> None:
        """Makes the directory that of a run with this config, or checks that it is; UserError with the differences.

        Until the run has begun to train, another config may take the place of the first one: a mistake in it costs
        nothing. Afterwards the file is left alone until it is sure that the run goes on: save_config.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"--workdir={self.path} is a file; give a directory") from error
        self._take_lock()
        if self.has_begun() and self.config.exists():
            free = FREE + DATA if config.checkpoint.allow_other_data else FREE
            if self.imported.exists() and not self.metrics.exists():
                free = FREE + DATA + NOT_IMPORTED
            changed = {
                field: values
                for field, values in config_module.differences(self.saved_config(), config).items()
                if not field.startswith(free)
            }
            if changed:
                lines = [f"{field}: {old!r} there, {new!r} now" for field, (old, new) in changed.items()]
                raise UserError(
                    f"--workdir={self.path} holds a run with another config; take another --workdir, or these values\n"
                    + "\n".join(lines)
                )
            return
        self.save_config(config)

    def _take_lock(self) -> None:
        """Until this process ends, however it ends. Another that has the lock may be about to end: it is given time."""
        self._lock = open(self.path / "lock", "ab")
        deadline = time.monotonic() + SECONDS_TO_LOCK
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in NO_LOCKS:
                    print(
                        f"WARNING: {self.path} has no locks: see that it is not trained twice at once", file=sys.stderr
                    )
                    return
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--workdir={self.path} is being trained by another process; stop that one, or take another "
                        "--workdir"
                    ) from error
            time.sleep(0.1)

    def has_begun(self) -> bool:
        """Whether there is something to lose."""
        return self.metrics.exists() or self.checkpoints.exists()

    def saved_config(self) -> Config:
        try:
            return config_module.from_dict(json.loads(self.config.read_text("utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.config} is damaged ({error}); mend it, or take another --workdir") from error

    def save_config(self, config: Config) -> None:
        write_atomically(self.config, config_module.dumps(config).encode())

    def save_evaluation(self, result: dict) -> None:
        write_atomically(self.evaluation, (json.dumps(metrics.encode(result), indent=2) + "\n").encode())

    def with_own_tokenizer(self, config: Config) -> Config:
        """The config with the tokenizer of the run, if it has begun: not one trained anew on other text, should the
        sources have changed since."""
        if not (self.has_begun() and self.tokenizer.exists()):
            return config
        own = dataclasses.replace(config.tokenizer, model_file=str(self.tokenizer))
        return dataclasses.replace(config, tokenizer=own)

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        write_atomically(self.tokenizer, tokenizer.model)

    def load_tokenizer(self) -> Tokenizer:
        """The one the run was trained with."""
        if not self.tokenizer.exists():
            raise UserError(f"{self.path} holds no checkpoint yet; run `llm-jax train --workdir={self.path}` first")
        return load_tokenizer(self.tokenizer)


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """The file has the old bytes or the new ones, whenever the process dies."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(data)
        os.replace(new, path)
    except OSError as error:  # that of a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def start(config: Config, *, saves_on_sigterm: bool = False, **processes) -> None:
    """Starts JAX as the config says; what it compiles is kept for the next start. processes: see hosts.start."""
    cache = os.path.join(cache_dir(config.data), "compiled")
    hosts.start(config.parallel, compilation_cache=cache, saves_on_sigterm=saves_on_sigterm, **processes)


def mesh_for_reading(config: Config, vocab_size: int) -> jax.sharding.Mesh:
    """The run's mesh, or one over whatever devices are here: evaluation and generation do not depend on it.

    A pipeline is for training: here its stages shard parameters and batch, as fsdp does.
    """
    devices = jax.devices()
    try:
        parallel, _ = resolve_mesh(config, vocab_size, devices)
        if parallel.stage > 1:
            parallel = dataclasses.replace(parallel, stage=1, rounds=1, fsdp=None)
        return make_mesh(parallel, devices)
    except UserError:
        return make_mesh(Parallel(replica=len(devices), fsdp=1), devices)


def restore_parameters(
    workdir: Workdir,
    config: Config,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    step: int | None,
    ema: bool = False,
) -> tuple[int, Transformer]:
    """(step, model) of the newest intact checkpoint, or of `step`; only the parameters, or their average, are read."""
    if ema and config.train.ema_decay is None:
        raise UserError("--ema: this run keeps no average; train with --config.train.ema_decay=0.999")
    item = "ema" if ema else "parameters"
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    shape = model_shape(config.model, vocab_size=tokenizer.vocab_size, sequence_length=config.train.sequence_length)
    init = make_init(
        config.model, shape, optimizer, mesh=mesh, rules=Rules(), seed=config.train.seed, window=config.spikes.window,
        ema=ema,
    )  # fmt: skip
    target = getattr(abstract_state(init, mesh), item)
    restored = Checkpoints(workdir.checkpoints).restore({item: target}, step=step)
    if restored is None:
        raise UserError(
            f"{workdir.checkpoints} holds no checkpoint yet; run `llm-jax train --workdir={workdir.path}` first"
        )
    step, items, meta = restored
    if meta["data"]["tokenizer"] != tokenizer.sha256:
        raise UserError(
            f"{workdir.tokenizer} is not the tokenizer of the checkpoint of step {step} (sha256 "
            f"{tokenizer.sha256[:12]}, not {meta['data']['tokenizer'][:12]}); restore it, or run "
            f"`llm-jax train --workdir={workdir.path}` again"
        )
    return step, items[item]
