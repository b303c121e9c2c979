"""One update: pure, jitted once.

A microbatch, B batch, U = T + 1 tokens of a row, L layers
"""

import jax
import jax.numpy as jnp
import optax

from llm_jax.training.losses import Batch, loss_sums
from llm_jax.training.state import TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    num_microbatches: int,
    z_loss: float,
    chunk: int | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one update, and what happened.

    Loss and gradient are means over the targets of the whole batch, however it is cut into microbatches. Metrics, all
    of the parameters before the update: loss (nats per token), tokens (targets), grad_norm (before clipping),
    learning_rate, gradient_norms: a tree like the parameters with a norm per layer of each, and batch: a digest of the
    tokens.
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

    with jax.named_scope("optimizer"):
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
    metrics = {
        "loss": counts["nll"] / num_tokens,
        "tokens": counts["tokens"],
        "grad_norm": optax.tree.norm(gradient),
        "learning_rate": schedule(state.step),
        "gradient_norms": layer_norms(gradient),
        "batch": batch_digest(batch["tokens"]),
    }
    return TrainState(state.step + 1, parameters, optimizer_state), metrics


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
