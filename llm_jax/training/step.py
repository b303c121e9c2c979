"""One update: pure, jitted once.

A microbatch, B batch, U = T + 1 tokens of a row, L layers
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from llm_jax.training import spikes
from llm_jax.training.losses import Batch, loss_sums
from llm_jax.training.state import TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    num_microbatches: int,
    z_loss: float,
    chunk: int | None,
    skip: bool,
    threshold: float,
    ema_decay: float | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one update, and what happened.

    Loss and gradient are means over the targets of the whole batch, however it is cut into microbatches. Metrics, all
    of the parameters before the update: loss (nats per token), tokens (targets), grad_norm (before clipping),
    learning_rate, gradient_norms and parameter_norms: trees like the parameters with a norm per layer of each, batch: a
    digest of the tokens, spike (see spikes.spike, with its threshold), and skipped.

    With `skip`, an update that spikes, or whose loss or gradient norm is not finite, is left out: state.step counts its
    batch, all else keeps its bits. Without, it is made, and the history follows where the loss goes for good. With
    ema_decay, the average follows the parameters (Polyak & Juditsky 1992): ema += (1 - ema_decay) * (parameters - ema).
    """

    def sums(batch):
        (_, counts), gradient = jax.value_and_grad(loss_sums, has_aux=True)(
            state.parameters, batch, z_loss=z_loss, chunk=chunk
        )
        return counts, gradient

    if num_microbatches == 1:
        counts, gradient = sums(batch)
    else:
        zeros = ({"nll": jnp.zeros(()), "tokens": jnp.zeros(())}, jax.tree.map(jnp.zeros_like, state.parameters))
        (counts, gradient), _ = jax.lax.scan(
            lambda so_far, batch: (jax.tree.map(jnp.add, so_far, sums(batch)), None),
            zeros,
            _split(batch, num_microbatches),
        )
    num_tokens = jnp.maximum(counts["tokens"], 1)
    gradient = jax.tree.map(lambda leaf: leaf / num_tokens, gradient)

    loss, grad_norm = counts["nll"] / num_tokens, optax.tree.norm(gradient)
    spike = spikes.spike(state.history, loss, grad_norm, threshold)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    skipped = (spike | ~finite) & skip

    with jax.named_scope("optimizer"):
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters, step=state.step)
        parameters = optax.apply_updates(state.parameters, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = jax.tree.map(lambda mean, new: mean + (1 - ema_decay) * (new - mean), ema, parameters)
    after = TrainState(
        step=state.step + 1,
        parameters=parameters,
        optimizer=optimizer_state,
        ema=ema,
        history=spikes.accept(state.history, loss, grad_norm, finite),
    )
    if skip:
        before = dataclasses.replace(state, step=after.step)
        after = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), before, after)
    metrics = {
        "loss": loss,
        "tokens": counts["tokens"],
        "grad_norm": grad_norm,
        "learning_rate": schedule(state.step),
        "gradient_norms": layer_norms(gradient),
        "parameter_norms": layer_norms(state.parameters),
        "batch": batch_digest(batch["tokens"]),
        "spike": spike,
        "skipped": skipped,
    }
    return after, metrics


def batch_digest(tokens_BU: jax.Array) -> jax.Array:
    """uint32: equal for equal tokens in equal places, on any mesh; another for nearly all others. Not cryptographic."""
    places_BU = jnp.arange(tokens_BU.size, dtype=jnp.uint32).reshape(tokens_BU.shape)
    mixed_BU = (tokens_BU.astype(jnp.uint32) + places_BU * jnp.uint32(0x9E3779B9)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum((mixed_BU ^ (mixed_BU >> 15)) * jnp.uint32(0xC2B2AE35), dtype=jnp.uint32)


def layer_norms(tree):
    """A tree like `tree`: the L2 norm of each leaf; of a stacked one ("blocks"), [L], one a layer."""

    def norm(path, leaf):
        stacked = any(getattr(key, "name", None) == "blocks" for key in path)
        squares = jnp.square(leaf).sum(axis=tuple(range(1, leaf.ndim)) if stacked else None)
        return jnp.sqrt(jax.reshard(squares, jax.P(None) if stacked else jax.P()))

    return jax.tree_util.tree_map_with_path(norm, tree)


def _split(batch: Batch, num_microbatches: int) -> Batch:
    """[B, U] -> [A, B / A, U], taking A from the minor side: the sharded dimension stays where it is, nothing moves."""

    def split(rows_BU):
        batch_size, length = rows_BU.shape
        return rows_BU.reshape(batch_size // num_microbatches, num_microbatches, length).swapaxes(0, 1)

    return jax.tree.map(split, batch)
