"""A stack of layers as a pipeline: each stage holds some of them, and microbatches go from stage to stage.

M microbatch, B batch, T position, D width, R repetitions of the pattern of layers, S stages, V rounds, C = M / S

Chunk v * S + s, of R / (S * V) consecutive layers, lies on stage s as its round v, so each microbatch goes V times
round the ring of stages: the interleaved schedule of Narayanan et al. 2021 (arXiv:2104.04473, section 2.2), and for
V = 1 that of GPipe (Huang et al. 2019, arXiv:1811.06965). S microbatches are a group. At time t, stage s does the piece
of work j = t - s: round (j // S) % V of microbatch j % S of group j // (S * V). The first of a group comes back to
stage 0 just when the last has left it, so nothing waits between rounds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.parallel.sharding import Rules


def pipelined(run: Callable, layers, x_MBTD: jax.Array, rows, *, rounds: int, rules: Rules):
    """The layers applied to each microbatch: (x_MBTD, aux).

    layers: leaves [R, ...], sharded over rules.layers, in the order in which they are applied.
    x_MBTD: of which M is sharded over rules.layers, before and after.
    rows: leaves [M, ...] of integers: what else `run` needs to know of a microbatch. Every stage gets all of them.
    run(x_BTD, chunk, rows of the microbatch) -> (x_BTD, aux) applies a chunk of layers, leaves [R / (S * V), ...]. It
    sees all mesh axes as they are but that of the stages, which is manual: a shard_map in it must be over all others,
    as it is without axis_names (of JAX 0.12, XLA aborts on fewer). It must not close over arrays to differentiate.
    aux: of `run`, a tree of floats per layer, leaves [R / (S * V), ...]; of the whole, [M, R, ...], replicated.

    S must divide M, and S * V must divide R.

    For the backward pass each stage keeps the V * M + S - 1 inputs of its chunks, and runs a chunk again from its
    input; a remat policy in `run` decides only what is kept of that one chunk and microbatch meanwhile. Gradients of
    `layers` are summed over microbatches in the dtype of `layers`.

    A stage without work, in the first and the last S - 1 steps, computes all the same, on activations of other
    microbatches. Unlike zeros, these are as safe as real work: a gradient that nothing flows into is zero, and not NaN.
    """
    (stage,) = rules.layers
    mesh = jax.typeof(x_MBTD).sharding.mesh
    schedule = _Schedule(stage, mesh.shape[stage], rounds, x_MBTD.shape[0])
    # Around `run` the other axes are automatic: over explicit ones, JAX 0.10 gathers all that enters or leaves a
    # shard_map that is not manual over them.
    others = tuple(axis for axis in mesh.axis_names if axis != stage)
    rows = jax.tree.map(lambda leaf: jax.reshard(leaf, jax.P(None, *jax.typeof(leaf).sharding.spec[1:])), rows)
    x_spec, rows_spec = jax.tree.map(lambda leaf: jax.P(*jax.typeof(leaf).sharding.spec[1:]), (x_MBTD, rows))
    chunk_spec = jax.tree.map(lambda leaf: jax.P(None, *jax.typeof(leaf).sharding.spec[1:]), layers)
    run = jax.sharding.explicit_axes(run, axes=others, in_sharding=(x_spec, chunk_spec, rows_spec))

    def of_stage(layers, x_CBTD, rows):
        layers = jax.tree.map(schedule.to_rounds, layers)
        x_CBTD, x_BTD, aux = _flow(run, schedule, layers, x_CBTD, x_CBTD[0], rows)
        x_CBTD, _ = schedule.exchange(x_CBTD, x_BTD, schedule.num_steps)
        return jnp.roll(x_CBTD, -1, axis=0), jax.tree.map(schedule.by_microbatch, aux)

    mapped = jax.shard_map(
        of_stage,
        in_specs=(jax.P(stage), jax.P(stage), jax.P()),
        out_specs=(jax.P(stage), jax.P(None, None, stage)),
        axis_names={stage},
        check_vma=False,  # with it, JAX 0.10 and 0.12 fail to differentiate shard_maps in `run`
    )
    out_sharding = (jax.P(stage, *x_spec), jax.P())
    x_MBTD, aux = jax.sharding.auto_axes(axes=others, out_sharding=out_sharding)(mapped)(layers, x_MBTD, rows)
    return x_MBTD, jax.tree.map(lambda sums: sums.reshape(schedule.num_microbatches, -1, *sums.shape[4:]), aux)


def bubble_fraction(stages: int, rounds: int, microbatches: int) -> float:
    """The share of its time steps in which a stage has no work (Narayanan et al. 2021, section 2.2)."""
    return (stages - 1) / (rounds * microbatches + stages - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flow(run, schedule, layers, x_CBTD, x_BTD, rows):
    """All steps in a stage; x_BTD: what it begins with, and what arrives after the last step. aux of each step.

    With a backward pass of its own, in which a gradient is added to the one chunk it belongs to: the transpose of the
    index would add a whole stage's, in each step.
    """
    return _flow_forward(run, schedule, layers, x_CBTD, x_BTD, rows)[0]


def _flow_forward(run, schedule, layers, x_CBTD, x_BTD, rows):
    def step(carry, t):
        x_CBTD, x_BTD = schedule.exchange(*carry, t)
        v, microbatch = schedule.work(t)
        y_BTD, aux = run(x_BTD, _at(layers, v), _at(rows, microbatch))
        return (x_CBTD, schedule.send(y_BTD)), (aux, x_BTD)

    (x_CBTD, x_BTD), (aux, inputs) = jax.lax.scan(step, (x_CBTD, x_BTD), jnp.arange(schedule.num_steps))
    return (x_CBTD, x_BTD, aux), (layers, rows, inputs)


def _flow_backward(run, schedule, saved, gradients):
    layers, rows, inputs = saved
    dx_CBTD, dx_BTD, daux = gradients

    def step(carry, at_t):
        dlayers, dx_CBTD, dx_BTD = carry
        t, x_BTD, daux = at_t
        v, microbatch = schedule.work(t)
        _, pull = jax.vjp(lambda x_BTD, chunk: run(x_BTD, chunk, _at(rows, microbatch)), x_BTD, _at(layers, v))
        dx_BTD, dchunk = pull((schedule.send(dx_BTD, back=True), daux))
        dlayers = jax.tree.map(lambda leaf, d: leaf.at[v].add(d), dlayers, dchunk)
        exchange = jax.linear_transpose(lambda *x: schedule.exchange(*x, t), dx_CBTD, dx_BTD)
        return (dlayers, *exchange((dx_CBTD, dx_BTD))), None

    dlayers = jax.tree.map(jnp.zeros_like, layers)
    steps = (jnp.arange(schedule.num_steps), inputs, daux)
    (dlayers, dx_CBTD, dx_BTD), _ = jax.lax.scan(step, (dlayers, dx_CBTD, dx_BTD), steps, reverse=True)
    return dlayers, dx_CBTD, dx_BTD, None


_flow.defvjp(_flow_forward, _flow_backward)


def _at(tree, index):
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What happens when. To be called where the mesh axis `stage` is manual."""

    stage: str
    num_stages: int
    rounds: int
    num_microbatches: int

    @property
    def num_steps(self) -> int:
        return self.rounds * self.num_microbatches + self.num_stages - 1

    @property
    def num_slots(self) -> int:
        return self.num_microbatches // self.num_stages

    def work(self, t):
        """The round that this stage works on at time t, and the microbatch's place in M."""
        j = t - jax.lax.axis_index(self.stage)
        # Group g is what the stages have in slot g, in the order of the stages.
        slot = j // (self.num_stages * self.rounds) % self.num_slots
        return j // self.num_stages % self.rounds, j % self.num_stages * self.num_slots + slot

    def send(self, x, back: bool = False):
        ring = [(s, (s + 1) % self.num_stages) for s in range(self.num_stages)]
        return jax.lax.ppermute(x, self.stage, [(target, source) for source, target in ring] if back else ring)

    def exchange(self, x_CBTD, x_BTD, t):
        """What waits on this stage after time t, and what it works on then, of what waits and what has just arrived.

        While a group is at work its slot goes round the stages, one a step, and comes to rest where it was. In the
        first turn stage 0 takes from it the microbatches that begin, and leaves those of the group before, done.
        """
        slot = t // (self.num_stages * self.rounds) % self.num_slots
        waiting_BTD = jax.lax.dynamic_index_in_dim(x_CBTD, slot, keepdims=False)
        begins = (jax.lax.axis_index(self.stage) == 0) & (t // self.num_stages % self.rounds == 0)
        waits_BTD = self.send(jnp.where(begins, x_BTD, waiting_BTD), back=True)
        x_CBTD = jax.lax.dynamic_update_index_in_dim(x_CBTD, waits_BTD, slot, axis=0)
        return x_CBTD, jnp.where(begins, waiting_BTD, x_BTD)

    def by_microbatch(self, steps):
        """[time, ...] -> [M, V, 1, ...]: of this stage's work on each microbatch in each of its chunks."""
        s = jax.lax.axis_index(self.stage)
        work = jax.lax.dynamic_slice_in_dim(steps, s, self.rounds * self.num_microbatches)
        work = work.reshape(self.num_slots, self.rounds, 1, self.num_stages, *steps.shape[1:])
        return jnp.moveaxis(work, 3, 0).reshape(self.num_microbatches, self.rounds, 1, *steps.shape[1:])

    def to_rounds(self, layers):
        """This stage's share [R / S, ...] of consecutive layers -> the chunks it works on, [V, R / (S * V), ...].

        Chunks are exchanged in V turns; in each, every stage sends one and receives one.
        """
        chunks = layers.reshape(self.rounds, -1, *layers.shape[1:])
        if self.rounds == 1:
            return chunks
        sends, receives = np.zeros((2, self.num_stages, self.rounds), np.int32)
        turns = [[] for _ in range(self.rounds)]
        for c in range(self.num_stages * self.rounds):
            # Of the chunks of a source c % V differs; of a target c // S, and c // lcm(S, V) where c % V does not.
            turn = (c + c // math.lcm(self.num_stages, self.rounds)) % self.rounds
            source, target = c // self.rounds, c % self.num_stages
            turns[turn].append((source, target))
            sends[source, turn] = c % self.rounds
            receives[target, c // self.num_stages] = turn
        s = jax.lax.axis_index(self.stage)
        sent = chunks[jnp.asarray(sends)[s]]
        received = [jax.lax.ppermute(sent[turn], self.stage, pairs) for turn, pairs in enumerate(turns)]
        return jnp.stack(received)[jnp.asarray(receives)[s]]
