"""What training and the replay of a step have in common: the state, the update and the batches of a run."""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.config import Config, Parallel, UserError
from llm_jax.data.stream import TrainStream
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.jobs.prepare import Prepared
from llm_jax.model.transformer import Shape
from llm_jax.parallel import chips, hosts
from llm_jax.parallel.sharding import (
    Rules,
    global_rows,
    make_mesh,
    num_shards,
    num_slices,
    replicated,
    require_balanced,
    require_divisible,
)
from llm_jax.plan.search import choose
from llm_jax.safety.checkpoint import Checkpoints
from llm_jax.safety.rewinds import Rewinds
from llm_jax.safety.structure import named_leaves
from llm_jax.training.losses import Weights
from llm_jax.training.optimizer import make_optimizer
from llm_jax.training.schedule import make_schedule
from llm_jax.training.state import TrainState, abstract_state, begin, choose_attention, make_init, model_shape
from llm_jax.training.step import train_step

BATCHES_AHEAD = 2


def resolve_mesh(config: Config, vocab_size: int, devices: list[jax.Device]) -> tuple[Parallel, str | None]:
    """(the sizes of the mesh, how parallel.auto came to them; None: they were given)."""
    if not config.parallel.auto:
        return config.parallel, None
    chip = chips.of_device_kind(devices[0].device_kind)
    return choose(config, len(devices), chip, num_slices(devices), vocab_size)


class Program:
    """From the config and the size of the vocabulary: the state and the update of a run, on a mesh over `devices`.

    Needs no data, and devices that are not there (see plan.topology) will do for lowering. Raises UserError where the
    mesh does not fit. why_mesh tells how parallel.auto came to its mesh; None: it was given. attention and
    why_attention: see choose_attention.
    """

    def __init__(self, config: Config, vocab_size: int, devices: list[jax.Device] | None = None):
        self.config = config
        devices = jax.devices() if devices is None else devices
        self.parallel, self.why_mesh = resolve_mesh(config, vocab_size, devices)
        self.mesh, self.rules = make_mesh(self.parallel, devices), Rules()
        train, length = config.train, config.train.sequence_length
        self.shape: Shape = model_shape(config.model, vocab_size=vocab_size, sequence_length=length)
        self.attention, self.why_attention = choose_attention(config.model, self.shape, self.mesh, self.rules)
        self.optimizer: optax.GradientTransformation = make_optimizer(config.optimizer, train.steps)
        self.init = make_init(
            config.model,
            self.shape,
            self.optimizer,
            mesh=self.mesh,
            rules=self.rules,
            seed=train.seed,
            window=config.spikes.window,
            ema=train.ema_decay is not None,
            rounds=self.parallel.rounds,
        )
        field = "train.batch_size / train.microbatches" if train.microbatches > 1 else "train.batch_size"
        sizes = {
            field: (train.batch_size // train.microbatches, "batch"),
            "train.sequence_length": (length, "sequence"),
        }
        require_divisible(self.mesh, self.rules, sizes)
        require_balanced(self.mesh, self.rules, length)
        self.stages = num_shards(self.mesh, self.rules.layers)
        self.batch_sharding = jax.NamedSharding(self.mesh, self.rules.spec("batch", None))

    def lower(self, state: TrainState) -> jax.stages.Lowered:
        """The update (leaves of a state, batch) -> (leaves of the next one, metrics), for a state of these types. The
        given leaves are overwritten. See training.step; its norms are here by the names of the parameters.

        Leaves, as JAX would take a millisecond a step to take modules apart and to put them together.
        """
        config, structure = self.config, jax.tree.structure(state)
        step = functools.partial(
            train_step,
            optimizer=self.optimizer,
            schedule=make_schedule(config.optimizer, config.train.steps),
            num_microbatches=config.train.microbatches,
            pipelined=self.stages > 1,
            weights=Weights(
                z_loss=config.train.z_loss,
                load_balance=config.train.load_balance_loss,
                router_z=config.train.router_z_loss,
            ),
            router_bias_rate=config.train.router_bias_rate,
            chunk=config.train.loss_chunk,
            skip=config.spikes.action == "skip",
            threshold=config.spikes.threshold,
            ema_decay=config.train.ema_decay,
        )
        shape = (config.train.batch_size, config.train.sequence_length + 1)
        row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        batch = {"tokens": row, "segments": row, "positions": row}

        def update(leaves: list[jax.Array], batch: dict) -> tuple[list[jax.Array], dict]:
            after, metrics = step(jax.tree.unflatten(structure, leaves), batch)
            norms = {name: named_leaves(metrics[name]) for name in ("gradient_norms", "parameter_norms")}
            return jax.tree.leaves(after), metrics | norms

        return jax.jit(update, donate_argnames="leaves").lower(jax.tree.leaves(state), batch)


class Setup(Program):
    """The same with the run's batches and checkpoints."""

    def __init__(self, config: Config, prepared: Prepared):
        super().__init__(config, prepared.tokenizer.vocab_size)
        self.stream = make_stream(config, prepared)

    def compile(self, state: TrainState):
        return self.lower(state).compile()

    def batch(self, number: int) -> dict[str, jax.Array]:
        """The batch of that number on the devices; each process reads the rows its own devices hold."""

        def rows(first: int, last: int) -> dict[str, np.ndarray]:
            batch = self.stream.batch(number, first, last)
            return {"tokens": batch.tokens_BU, "segments": batch.segments_BU, "positions": batch.positions_BU}

        return global_rows(rows, self.stream.batch_size, self.batch_sharding)

    def batches(self, first_step: int, rewinds: Rewinds) -> Iterator[dict[str, jax.Array]]:
        """The batches from the one after first_step updates on, read ahead by a thread."""
        with concurrent.futures.ThreadPoolExecutor(1, "batches") as executor:

            def load(step: int) -> concurrent.futures.Future:
                return executor.submit(self.batch, rewinds.batch_number(step))

            ahead = collections.deque(load(first_step + i) for i in range(BATCHES_AHEAD))
            step = first_step + BATCHES_AHEAD
            while True:
                batch = ahead.popleft().result()
                ahead.append(load(step))
                step += 1
                yield batch

    def origin(self, rewinds: Rewinds) -> dict:
        """What a checkpoint says of the data that led to it."""
        return {"data": self.stream.fingerprint, "rewinds": [dataclasses.asdict(rewind) for rewind in rewinds.done]}

    def restore_or_init(
        self, checkpoints: Checkpoints, rewinds: Rewinds, step: int | None = None
    ) -> tuple[TrainState, int]:
        """The newest intact checkpoint, or that of `step`; or the state of step 0. Refuses other data."""
        config = self.config
        if step is None and rewinds.to_clear is not None:
            checkpoints.remove_after(rewinds.to_clear)
            rewinds.clear(write=hosts.is_first())
        target = abstract_state(self.init, self.mesh)
        if (checkpoints.latest() if step is None else step) == 0:  # of an imported model: its parameters, and no more
            restored = checkpoints.restore({"parameters": target.parameters}, step=0)
            assert restored is not None
            fresh = functools.partial(
                begin,
                optimizer=self.optimizer,
                window=config.spikes.window,
                ema=config.train.ema_decay is not None,
            )
            return jax.jit(fresh, donate_argnums=0)(restored[1]["parameters"]), 0
        restored = checkpoints.restore(items(target), step=step)
        if restored is None:
            # On CPU most of the time until the first step would be the optimization of code that runs once.
            on_cpu = self.mesh.devices.flat[0].platform == "cpu"
            options = {"xla_backend_optimization_level": 0} if on_cpu else None
            return jax.jit(self.init, compiler_options=options)(), 0
        step, saved, meta = restored
        if meta["data"] != self.stream.fingerprint and not config.checkpoint.allow_other_data:
            changed = [
                f"{key} {meta['data'].get(key)!r} -> {value!r}"
                for key, value in self.stream.fingerprint.items()
                if meta["data"].get(key) != value
            ]
            raise UserError(
                f"the checkpoint of step {step} was trained on other data ({'; '.join(changed)}); restore those data, "
                "take another --workdir, or go on with the new data by --config.checkpoint.allow_other_data"
            )
        gone = [[r for r in path if r["to"] < step] for path in (meta["rewinds"], self.origin(rewinds)["rewinds"])]
        if gone[0] != gone[1]:
            raise UserError(
                f"the checkpoint of step {step} comes from the rewinds {gone[0]}, and rewinds.json has {gone[1]}; "
                "restore that file: it tells which batches come next"
            )
        if step > config.train.steps:
            raise UserError(
                f"train.steps={config.train.steps} is less than the {step} steps in the checkpoint; try {step} or more"
            )
        steps_done = jax.device_put(jnp.asarray(step, jnp.int32), replicated(self.mesh))
        return dataclasses.replace(target, step=steps_done, **saved), step


def items(state: TrainState) -> dict[str, object]:
    """What a checkpoint holds, by the names of the fields; the step is its name."""
    trees = {"parameters": state.parameters, "optimizer": state.optimizer, "history": state.history}
    return trees if state.ema is None else trees | {"ema": state.ema}


def make_stream(config: Config, prepared: Prepared) -> TrainStream:
    return TrainStream(
        prepared.train,
        prepared.weights,
        sequence_length=config.train.sequence_length,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
    )


def describe_batch(stream: TrainStream, tokenizer: Tokenizer, number: int) -> list[dict]:
    """The documents of each row of a batch: keys, token ranges and texts."""
    tokens_BU = stream.batch(number).tokens_BU
    rows = []
    for row in range(stream.batch_size):
        origin = stream.origin(number, row)
        pieces, first = [], 0
        for key, offset, length in origin.pieces:
            text = tokenizer.decode(tokens_BU[row, first : first + length].tolist())
            pieces.append({"document": key, "first_token": offset, "tokens": length, "text": text})
            first += length
        rows.append({
            "row": row, "source": origin.source, "window": origin.window, "epoch": origin.epoch, "pieces": pieces,
        })  # fmt: skip
    return rows


def batch_text(rows: list[dict], characters: int | None = None) -> str:
    """The same for a person; `characters` of each text, in one line, or all of it."""
    lines = []
    for row in rows:
        lines.append(f"row {row['row']}: {row['source']}, window {row['window']}, epoch {row['epoch']}")
        for piece in row["pieces"]:
            shown = piece["text"] if characters is None else " ".join(piece["text"].split())[:characters]
            last = piece["first_token"] + piece["tokens"]
            lines.append(f"  {piece['document']} tokens {piece['first_token']}..{last - 1}: {shown}")
    return "\n".join(lines)
