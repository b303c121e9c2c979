"""What is minimised, and how a batch becomes inputs and targets.

B batch, T position, U = T + 1: a row of tokens gives T inputs and T targets
"""

import jax
import jax.numpy as jnp

from llm_jax.kernels.cross_entropy import cross_entropy, token_statistics
from llm_jax.model.transformer import Transformer

# {"tokens", "segments", "positions"}: int32 [B, U], sharded over "batch"; segment 0 is padding.
Batch = dict[str, jax.Array]


def target_weights(segments_BU: jax.Array) -> jax.Array:
    """float32 [B, T]: 1 where the target is in the same document as its input, else 0 (padding, first token)."""
    return ((segments_BU[:, 1:] == segments_BU[:, :-1]) & (segments_BU[:, 1:] > 0)).astype(jnp.float32)


def loss_sums(model: Transformer, batch: Batch, *, z_loss: float, chunk: int | None):
    """(objective, {"nll", "tokens"}): sums over the targets of the batch, in nats; divide by tokens for a mean."""
    weights_BT = target_weights(batch["segments"])
    hidden_BTD = _hidden(model, batch)
    with jax.named_scope("loss"):
        objective, nll = cross_entropy(
            hidden_BTD,
            model.head_DV(),
            batch["tokens"][:, 1:],
            weights_BT,
            z_loss,
            model.shape.logit_soft_cap,
            chunk,
            model.rules,
        )
    return objective, {"nll": nll, "tokens": jnp.sum(weights_BT)}


def token_losses(model: Transformer, batch: Batch, *, chunk: int | None) -> tuple[jax.Array, jax.Array]:
    """(nll_BT, rank_BT) of every target position, counted or not; see kernels.cross_entropy.token_statistics."""
    return token_statistics(
        _hidden(model, batch),
        model.head_DV(),
        batch["tokens"][:, 1:],
        soft_cap=model.shape.logit_soft_cap,
        chunk=chunk,
        rules=model.rules,
    )


def _hidden(model: Transformer, batch: Batch) -> jax.Array:
    return model(batch["tokens"][:, :-1], batch["segments"][:, :-1], batch["positions"][:, :-1])
