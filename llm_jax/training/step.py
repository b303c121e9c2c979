"""One update: pure, jitted once.

M microbatch, B batch, U = T + 1 tokens of a row, L layers, R repetitions of the pattern of layers, E experts
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from llm_jax.model import moe
from llm_jax.training import spikes
from llm_jax.training.losses import Batch, Weights, loss_sums, microbatches
from llm_jax.training.optimizer import names
from llm_jax.training.state import TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    num_microbatches: int,
    pipelined: bool,
    weights: Weights,
    router_bias_rate: float | None,
    chunk: int | None,
    skip: bool,
    threshold: float,
    ema_decay: float | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one update, and what happened.

    Loss and gradient are means over the targets of the whole batch, however it is cut into microbatches. Metrics, all
    of the parameters before the update: loss (nats per token), tokens (targets), grad_norm (before clipping),
    learning_rate, gradient_norms and parameter_norms: trees like the parameters with a norm per layer of each stack,
    batch: a digest of the tokens, spike (see spikes.spike, with its threshold), and skipped. With experts, also
    max_load: how many times the mean load the busiest one has, averaged over layers.

    With `skip`, an update that spikes, or whose loss or gradient norm is not finite, is left out: state.step counts its
    batch, all else keeps its bits. Without, it is made, and the history follows where the loss goes for good. With
    ema_decay, the average follows the parameters (Polyak & Juditsky 1992): ema += (1 - ema_decay) * (parameters - ema).

    Microbatches are computed one after the other, or go through the pipeline together. With router_bias_rate, experts
    with less than the mean load become easier to choose (see balanced).
    """

    def sums(batch):
        (_, counts), gradient = jax.value_and_grad(loss_sums, has_aux=True)(
            state.parameters, batch, weights=weights, chunk=chunk
        )
        return counts, gradient

    digest = batch_digest(batch["tokens"])
    if num_microbatches > 1:
        batch = microbatches(batch, num_microbatches)
    if num_microbatches == 1 or pipelined:
        counts, gradient = sums(batch)
    else:
        first = jax.tree.map(lambda rows_MBU: rows_MBU[0], batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(sums, first)[0])
        (counts, gradient), _ = jax.lax.scan(
            lambda so_far, batch: (jax.tree.map(jnp.add, so_far, sums(batch)), None),
            (zeros, jax.tree.map(jnp.zeros_like, state.parameters)),
            batch,
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
        if router_bias_rate is not None:
            parameters = balanced(parameters, state.parameters, counts["router"], router_bias_rate)
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
        "batch": digest,
        "spike": spike,
        "skipped": skipped,
    }
    loads = [moe.max_load(sums) for sums in counts["router"] if sums is not None]
    if loads:
        metrics["max_load"] = sum(loads) / len(loads)
    return after, metrics


def balanced(parameters, before, router, rate: float):
    """The parameters with b_router moved by `rate` from where it was before, towards an even load of the experts.

    Loss-free balancing (Wang et al. 2024, arXiv:2408.15664, algorithm 1). router: as from losses.loss_sums.
    """

    def move(path, new, old):
        attributes = names(path)
        if attributes[-1] != "b_router":
            return new
        place = next((int(name) for name in attributes if name.isdigit()), 0)
        load_RE = router[place].load_E
        return old + rate * jnp.sign(jnp.mean(load_RE, axis=-1, keepdims=True) - load_RE)

    return jax.tree_util.tree_map_with_path(move, parameters, before)


def batch_digest(tokens_BU: jax.Array) -> jax.Array:
    """uint32: equal for equal tokens in equal places, on any mesh; another for nearly all others. Not cryptographic."""
    places_BU = jnp.arange(tokens_BU.size, dtype=jnp.uint32).reshape(tokens_BU.shape)
    mixed_BU = (tokens_BU.astype(jnp.uint32) + places_BU * jnp.uint32(0x9E3779B9)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum((mixed_BU ^ (mixed_BU >> 15)) * jnp.uint32(0xC2B2AE35), dtype=jnp.uint32)


def layer_norms(tree):
    """A tree like `tree`: the L2 norm of each leaf; of a stacked one ("blocks"), one a layer of the stack, [R]."""

    def norm(path, leaf):
        stacked = any(getattr(key, "name", None) == "blocks" for key in path)
        squares = jnp.square(leaf).sum(axis=tuple(range(1, leaf.ndim)) if stacked else None)
        return jnp.sqrt(jax.reshard(squares, jax.P(None) if stacked else jax.P()))

    return jax.tree_util.tree_map_with_path(norm, tree)
