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

WORKDIR may be gs://BUCKET/PATH. Checkpoints then go there directly; the other files are a local copy, which is uploaded
where it matters: see safety/remote.py.
"""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import sys
import time
import typing

import jax
from etils import epath

from llm_jax import config as config_module
from llm_jax.config import Config, Parallel, UserError
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from llm_jax.jobs.prepare import cache_dir
from llm_jax.jobs.setup import resolve_mesh
from llm_jax.measure import metrics
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import Rules, make_mesh
from llm_jax.safety import lease
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.safety.lease import Lease
from llm_jax.safety.remote import Mirror, Store, Taken, Unreachable, is_url
from llm_jax.safety.watchdog import CRASHED
from llm_jax.training.optimizer import make_optimizer
from llm_jax.training.state import abstract_state, make_init, model_shape

# What may change between two starts of a run without making it another run.
FREE = ("checkpoint.", "evaluate.", "log.", "parallel.", "train.steps", "train.microbatches", "train.loss_chunk",
        "model.attention", "model.layers", "model.remat", "data.data_dir", "data.cache_dir", "data.num_workers",
        "watchdog.", "spikes.action", "spikes.threshold", "spikes.limit", "spikes.rewind_")  # fmt: skip
# And what may with checkpoint.allow_other_data: what the fingerprint of the data is made of.
DATA = ("data.", "train.batch_size", "train.sequence_length", "train.seed")
# And before the first step with an imported model.
NOT_IMPORTED = ("optimizer.", "train.", "spikes.")


SECONDS_TO_LOCK = 10.0
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class Workdir:
    """name: the directory or URL, for messages; path: the folder where its files are, but for the checkpoints."""

    def __init__(self, path: str | os.PathLike):
        self._mirror = self._lease = None
        if is_url(path):
            self._mirror = Mirror(Store(str(path)))
            self._mirror.pull()
            self.path, self.name = self._mirror.folder, self._mirror.store.url
            self.checkpoints = epath.Path(self.name) / "checkpoints"
        else:
            self.path = pathlib.Path(path).expanduser().absolute()
            self.name = str(self.path)
            self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.model"
        self.metrics = self.path / "metrics.jsonl"
        self.imported = self.path / "imported.json"
        self.evaluation = self.path / "evaluate.json"
        self.ledger = self.path / "ledger.jsonl"
        self.incidents = self.path / "incidents"
        self.rewinds = self.path / "rewinds.json"
        self.stacks = self.path / "stacks"
        self._lock = None

    def claim(self, config: Config) -> None:
        """Makes the directory that of a run with this config, or checks that it is; UserError with the differences.
        For the first process of a training, until close; the others call follow after it.

        Until the run has begun to train, another config may take the place of the first one: a mistake in it costs
        nothing. Afterwards the file is left alone until it is sure that the run goes on: save_config.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"--workdir={self.path} is a file; give a directory") from error
        if self._mirror is None:
            self._take_lock()
        else:
            self._lease = Lease(self._mirror.store, self._lost, lease.SECONDS)
            self._lease.acquire()
            self.follow()
            self._mirror.keep_pushing(self._lost)
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
                    f"--workdir={self.name} holds a run with another config; take another --workdir, or these values\n"
                    + "\n".join(lines)
                )
            return
        self.save_config(config)

    def follow(self) -> None:
        """In every process of a training, once the first one has the lock: what others have written is there now."""
        if self._mirror is not None:
            self._mirror.pull()
            self._mirror.salvage()

    def push(self, *paths: pathlib.Path) -> None:
        """These files, or all, are in the store when it returns, if they have changed; nothing to do without one."""
        if self._mirror is not None:
            try:
                self._mirror.push(*(path.relative_to(self.path).as_posix() for path in paths))
            except Taken as taken:
                self._lost(taken)

    def before_save(self) -> None:
        """The record reaches as far as the checkpoint that is about to be saved, and nobody else trains here.
        Unreachable where that cannot be had."""
        if self._lease is not None:
            self._lease.confirm()
            self.push(self.metrics, self.rewinds, self.ledger)

    def shown(self, path: pathlib.Path) -> str:
        """For messages: where a file of this run lies, or is going to."""
        return f"{self.name}/{path.relative_to(self.path).as_posix()}"

    def probe(self, sample: bytes) -> float:
        """Seconds to write a sample to where checkpoints go. OSError if it cannot be written."""
        if self._mirror is not None:
            return self._mirror.store.probe(f"probe/{jax.process_index()}", sample)
        probe = self.path / f"probe-{jax.process_index()}"
        begin = time.monotonic()
        try:
            with open(probe, "wb") as file:
                file.write(sample)
                file.flush()
                os.fsync(file.fileno())
            return time.monotonic() - begin
        finally:
            probe.unlink(missing_ok=True)

    def let_go(self) -> None:
        """Uploads what is new, and frees the lock: the process is about to end. The lock of a folder goes by itself."""
        try:
            if self._lease is not None:
                self.push()
                self._lease.release()
        except Unreachable as error:
            print(f"WARNING: what was written last is not there: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.let_go()
        if self._mirror is not None:
            self._mirror.close()

    def _lost(self, taken: Taken) -> typing.NoReturn:
        """At once, whatever the run is doing: nothing of it may be written any more."""
        print(
            f"llm-jax: stopped (exit code 70): another process has written {self.name}/{taken} and trains there now; "
            "this one writes nothing more",
            file=sys.stderr,
            flush=True,
        )
        os._exit(CRASHED)

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
                        f"--workdir={self.name} is being trained by another process; stop that one, or take another "
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
            raise UserError(
                f"{self.shown(self.config)} is damaged ({error}); mend it, or take another --workdir"
            ) from error

    def save_config(self, config: Config) -> None:
        write_atomically(self.config, config_module.dumps(config).encode())
        self.push(self.config)

    def save_evaluation(self, result: dict) -> None:
        write_atomically(self.evaluation, (json.dumps(metrics.encode(result), indent=2) + "\n").encode())
        self.push(self.evaluation)

    def with_own_tokenizer(self, config: Config) -> Config:
        """The config with the tokenizer of the run, if it has begun: not one trained anew on other text, should the
        sources have changed since."""
        if not (self.has_begun() and self.tokenizer.exists()):
            return config
        own = dataclasses.replace(config.tokenizer, model_file=str(self.tokenizer))
        return dataclasses.replace(config, tokenizer=own)

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        write_atomically(self.tokenizer, tokenizer.model)
        self.push(self.tokenizer)

    def load_tokenizer(self) -> Tokenizer:
        """The one the run was trained with."""
        if not self.tokenizer.exists():
            raise UserError(f"{self.name} holds no checkpoint yet; run `llm-jax train --workdir={self.name}` first")
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
    model = dataclasses.replace(config.model, attention="auto")  # this may be another machine than the run's
    init = make_init(
        model, shape, optimizer, mesh=mesh, rules=Rules(), seed=config.train.seed, window=config.spikes.window,
        ema=ema,
    )  # fmt: skip
    target = getattr(abstract_state(init, mesh), item)
    restored = Checkpoints(workdir.checkpoints).restore({item: target}, step=step)
    if restored is None:
        raise UserError(
            f"{workdir.checkpoints} holds no checkpoint yet; run `llm-jax train --workdir={workdir.name}` first"
        )
    step, items, meta = restored
    if meta["data"]["tokenizer"] != tokenizer.sha256:
        raise UserError(
            f"{workdir.shown(workdir.tokenizer)} is not the tokenizer of the checkpoint of step {step} (sha256 "
            f"{tokenizer.sha256[:12]}, not {meta['data']['tokenizer'][:12]}); restore it, or run "
            f"`llm-jax train --workdir={workdir.name}` again"
        )
    return step, items[item]
