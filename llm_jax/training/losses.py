"""What is minimised, and how a batch becomes inputs and targets.

B batch, T position, U = T + 1: a row of tokens gives T inputs and T targets, L moe layers, E experts
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.cross_entropy import cross_entropy, token_statistics
from llm_jax.kernels.splash_attention import zigzag
from llm_jax.model import moe
from llm_jax.model.transformer import Shape, Transformer
from llm_jax.parallel.sharding import Rules, num_shards

# {"tokens", "segments", "positions"}: int32 [B, U], sharded over "batch"; segment 0 is padding. With a leading
# dimension of microbatches, these go through the pipeline.
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Of the terms beside the negative log-likelihood; 0: off."""

    z_loss: float = 0.0
    load_balance: float = 0.0
    router_z: float = 0.0


def target_weights(segments_BU: jax.Array) -> jax.Array:
    """float32 [..., T]: 1 where the target is in the same document as its input, else 0 (padding, first token)."""
    return ((segments_BU[..., 1:] == segments_BU[..., :-1]) & (segments_BU[..., 1:] > 0)).astype(jnp.float32)


def loss_sums(model: Transformer, batch: Batch, *, weights: Weights, chunk: int | None):
    """(objective, {"nll", "tokens", "router"}): sums over the targets of the batch, in nats; divide by tokens for a
    mean. "router" holds, for each place of model.shape.pattern, a RouterSums with leading [R], or None.

    The routers' losses are those of a microbatch: each is balanced by itself.
    """
    hidden, router = _hidden(model, batch)
    weights_BT = _placed(model, target_weights(batch["segments"]))
    with jax.named_scope("loss"):
        objective, nll = cross_entropy(
            hidden,
            model.head_DV(),
            _placed(model, batch["tokens"][..., 1:]),
            weights_BT,
            weights.z_loss,
            model.shape.logit_soft_cap,
            chunk,
            model.rules,
        )
        if any(sums is not None for sums in router):
            counted_BT = (_placed(model, batch["segments"][..., :-1]) > 0).astype(jnp.float32)
            of_microbatch = functools.partial(_router_objective, model.shape, weights)
            if counted_BT.ndim == 3:
                objective += jnp.sum(jax.vmap(of_microbatch)(router, weights_BT, counted_BT))
                router = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), router)
            else:
                objective += of_microbatch(router, weights_BT, counted_BT)
    return objective, {"nll": nll, "tokens": jnp.sum(weights_BT), "router": router}


def _router_objective(shape: Shape, weights: Weights, router, weights_BT, counted_BT):
    """The routers' losses, times the number of targets as the negative log-likelihood is."""
    sums = jax.tree.map(lambda *places: jnp.concatenate(places), *(sums for sums in router if sums is not None))
    counted = jnp.maximum(jnp.sum(counted_BT), 1)
    balance = moe.load_balance_loss(sums, shape.experts_per_token, counted)
    return jnp.sum(weights_BT) * (weights.load_balance * balance + weights.router_z * moe.router_z_loss(sums, counted))


def token_losses(
    model: Transformer, batch: Batch, *, chunk: int | None, num_microbatches: int = 1
) -> tuple[jax.Array, jax.Array]:
    """(nll_BT, rank_BT) of every target position, counted or not; see kernels.cross_entropy.token_statistics.

    Several microbatches go through the pipeline.
    """
    if num_microbatches > 1:
        batch = microbatches(batch, num_microbatches)
    statistics = token_statistics(
        _hidden(model, batch)[0],
        model.head_DV(),
        _placed(model, batch["tokens"][..., 1:]),
        soft_cap=model.shape.logit_soft_cap,
        chunk=chunk,
        rules=model.rules,
    )
    order = row_order(batch["tokens"].shape[-1] - 1, model.rules)
    back = slice(None) if order is None else np.argsort(order)

    def in_rows(values):
        """In the order of the batch's rows and tokens."""
        leading = (None,) * (values.ndim - 2)
        values = jax.reshard(values, jax.P(*leading, *model.rules.spec("batch", None)))[..., back]
        if not leading:
            return values
        spec = model.rules.spec("batch", None)
        return jnp.reshape(values.swapaxes(0, 1), (-1, values.shape[-1]), out_sharding=spec)

    return tuple(in_rows(values) for values in statistics)


def microbatches(batch: Batch, number: int) -> Batch:
    """[B, U] -> [M, B / M, U], taking M from the minor side: the sharded dimension stays where it is, nothing moves."""

    def split(rows_BU):
        batch_size, length = rows_BU.shape
        rows, *rest = jax.typeof(rows_BU).sharding.spec
        shape = (batch_size // number, number, length)
        return jnp.reshape(rows_BU, shape, out_sharding=jax.P(rows, None, *rest)).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def row_order(length: int, rules: Rules) -> np.ndarray | None:
    """The order in which the tokens of a row stand on the mesh: so that its shards have equal work; None: their own."""
    shards = num_shards(jax.sharding.get_abstract_mesh(), rules.length)
    return zigzag(length, shards) if shards > 1 else None


def _hidden(model: Transformer, batch: Batch):
    names = ("tokens", "segments", "positions")
    tokens, segments, positions = (_placed(model, batch[name][..., :-1]) for name in names)
    stages = num_shards(jax.sharding.get_abstract_mesh(), model.rules.layers)
    assert tokens.ndim == 3 or stages == 1, "a pipeline takes microbatches"
    return model(tokens, segments, positions, row_order(tokens.shape[-1], model.rules))


def _placed(model: Transformer, array: jax.Array) -> jax.Array:
    """[..., B, T] in the order and the sharding that the model wants."""
    leading = (None,) * (array.ndim - 2)
    spec = jax.P(*leading, *model.rules.spec("batch", "length"))
    order = row_order(array.shape[-1], model.rules)
    return jax.reshard(array if order is None else array[..., order], spec)
