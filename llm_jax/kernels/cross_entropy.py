"""Cross-entropy of the next token that never holds all logits at once.

B batch, T position, D width, V vocabulary, C chunks, N tokens of a chunk
"""

import functools
import math

import jax
import jax.numpy as jnp

from llm_jax.parallel.sharding import Rules

# Of one chunk, where none is given: as fast as one piece where all logits fit, bounded where they do not.
LOGITS_BYTES = 2**28


def reference_cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, *, z_loss=0.0, soft_cap=None):
    """The definition, all logits at once: (objective, sum of the weighted negative log-likelihoods in nats)."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits_BTV = soft_cap * jnp.tanh(logits_BTV / soft_cap)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    nll_BT = log_z_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BT * (nll_BT + z_loss * log_z_BT**2)), jnp.sum(weights_BT * nll_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    soft_cap: float | None,
    chunk: int | None,
    rules: Rules,
) -> tuple[jax.Array, jax.Array]:
    """(objective, nll): sums over all tokens, in nats, float32; the gradient flows through the objective only.

    objective = sum of weights * (nll + z_loss * log(Z)^2) (z-loss: PaLM, arXiv:2204.02311, section 5). `chunk` tokens
    per device have their logits in memory at a time (None: as many as LOGITS_BYTES hold). The hidden states are
    sharded as rules.spec("batch", "length", None), the head as rules.spec("table_embed", "vocab"). They may have a
    leading dimension "microbatches", and so do targets and weights then, not sharded.

    The gradients are computed together with the loss, chunk by chunk, so that nothing is computed twice: 3 matmuls
    instead of the 4 of a rematerialised chunk. They are kept as residuals (the size of hidden_BTD and head_DV).
    """
    return _loss(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss, soft_cap, chunk, rules, with_gradients=False)


def _forward(*arguments):
    objective, nll, *gradients = _loss(*arguments, with_gradients=True)
    return (objective, nll), gradients


def _backward(z_loss, soft_cap, chunk, rules, gradients, cotangents):
    d_objective, _ = cotangents
    d_hidden_BTD, d_head_DV = (gradient * d_objective.astype(gradient.dtype) for gradient in gradients)
    return d_hidden_BTD, d_head_DV, None, None


cross_entropy.defvjp(_forward, _backward)


def _loss(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss, soft_cap, chunk, rules, *, with_gradients):
    def shard(hidden_BTD, head_DV, targets_BT, weights_BT):
        head_DV = jax.lax.all_gather(head_DV, rules.table_embed, axis=0, tiled=True)

        def add_chunk(carry, inputs):
            objective, nll, d_head_DV = carry
            hidden_ND, targets_N, weights_N = inputs
            logits_NV, log_z_N, target_logit_N = _log_z(hidden_ND, head_DV, targets_N, soft_cap, rules)
            nll_N = log_z_N - target_logit_N
            objective += jnp.sum(weights_N * (nll_N + z_loss * log_z_N**2))
            nll += jnp.sum(weights_N * nll_N)
            if not with_gradients:
                return (objective, nll, d_head_DV), None
            is_target_NV = _local_ids(head_DV, rules) == targets_N[:, None]
            probability_NV = jnp.exp(logits_NV - log_z_N[:, None])
            d_logits_NV = probability_NV * (1 + 2 * z_loss * log_z_N[:, None]) - is_target_NV
            if soft_cap is not None:
                d_logits_NV *= 1 - (logits_NV / soft_cap) ** 2
            d_logits_NV = (weights_N[:, None] * d_logits_NV).astype(hidden_ND.dtype)
            d_hidden_ND = jnp.einsum("NV,DV->ND", d_logits_NV, head_DV)
            d_head_DV += jnp.einsum("ND,NV->DV", hidden_ND, d_logits_NV, preferred_element_type=jnp.float32)
            return (objective, nll, d_head_DV), d_hidden_ND

        inputs = _split(chunk, head_DV.shape[1], hidden_BTD, targets_BT, weights_BT)
        zero = jnp.zeros((), jnp.float32)
        start = (zero, zero, jnp.zeros(head_DV.shape, jnp.float32) if with_gradients else None)
        (objective, nll, d_head_DV), d_hidden_CND = jax.lax.scan(add_chunk, start, inputs)
        shards = rules.microbatches + rules.batch + rules.length
        sums = jax.lax.psum((objective, nll), shards)
        if not with_gradients:
            return sums
        d_hidden_BTD = _join(d_hidden_CND, targets_BT.shape)
        d_hidden_BTD = jax.lax.psum(d_hidden_BTD, rules.vocab)
        d_head_DV = jax.lax.psum(d_head_DV, tuple(axis for axis in shards if axis not in rules.table_embed))
        d_head_DV = jax.lax.psum_scatter(d_head_DV, rules.table_embed, scatter_dimension=0, tiled=True)
        # Together, so that the backward pass of the layers waits for the head's share. The TPU compiler else sums the
        # gradients after that pass, and keeps this one whole, in float32, until then.
        return *sums, *jax.lax.optimization_barrier((d_hidden_BTD, d_head_DV.astype(head_DV.dtype)))

    hidden, head, tokens = _specs(hidden_BTD, rules)
    out_specs = (jax.P(), jax.P(), *((hidden, head) if with_gradients else ()))
    return jax.shard_map(shard, in_specs=(hidden, head, tokens, tokens), out_specs=out_specs, check_vma=False)(
        hidden_BTD, head_DV, jax.reshard(targets_BT, tokens), jax.reshard(weights_BT, tokens)
    )


def token_statistics(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    soft_cap: float | None,
    chunk: int | None,
    rules: Rules,
) -> tuple[jax.Array, jax.Array]:
    """(nll_BT float32 in nats, rank_BT int32: how many tokens of the vocabulary are likelier than the target)."""

    def shard(hidden_BTD, head_DV, targets_BT):
        head_DV = jax.lax.all_gather(head_DV, rules.table_embed, axis=0, tiled=True)

        def chunk_statistics(inputs):
            hidden_ND, targets_N = inputs
            logits_NV, log_z_N, target_logit_N = _log_z(hidden_ND, head_DV, targets_N, soft_cap, rules)
            likelier_N = jnp.sum(logits_NV > target_logit_N[:, None], axis=1, dtype=jnp.int32)
            return log_z_N - target_logit_N, jax.lax.psum(likelier_N, rules.vocab)

        statistics = jax.lax.map(chunk_statistics, _split(chunk, head_DV.shape[1], hidden_BTD, targets_BT))
        return tuple(_join(values_CN, targets_BT.shape) for values_CN in statistics)

    hidden, head, tokens = _specs(hidden_BTD, rules)
    return jax.shard_map(shard, in_specs=(hidden, head, tokens), out_specs=(tokens, tokens), check_vma=False)(
        hidden_BTD, head_DV, jax.reshard(targets_BT, tokens)
    )


def _specs(hidden_BTD, rules):
    """How hidden states, head and tokens are sharded."""
    leading = ("microbatches",) * (hidden_BTD.ndim - 3)
    tokens = (*leading, "batch", "length")
    return rules.spec(*tokens, None), rules.spec("table_embed", "vocab"), rules.spec(*tokens)


def _log_z(hidden_ND, head_DV, targets_N, soft_cap, rules):
    """(logits of this device's part of the vocabulary, log of the partition sum over all, logit of the target)."""
    logits_NV = jnp.einsum("ND,DV->NV", hidden_ND, head_DV, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits_NV = soft_cap * jnp.tanh(logits_NV / soft_cap)
    largest_N = jax.lax.pmax(jnp.max(logits_NV, axis=1), rules.vocab)
    sum_N = jax.lax.psum(jnp.sum(jnp.exp(logits_NV - largest_N[:, None]), axis=1), rules.vocab)
    first_id = jax.lax.axis_index(rules.vocab) * head_DV.shape[1]
    local_N = targets_N - first_id
    mine_N = (local_N >= 0) & (local_N < head_DV.shape[1])
    picked_N = jnp.take_along_axis(logits_NV, jnp.where(mine_N, local_N, 0)[:, None], axis=1)[:, 0]
    target_logit_N = jax.lax.psum(jnp.where(mine_N, picked_N, 0.0), rules.vocab)
    return logits_NV, largest_N + jnp.log(sum_N), target_logit_N


def _local_ids(head_DV, rules):
    """The token ids of this device's part of the vocabulary, [1, V]."""
    return (jax.lax.axis_index(rules.vocab) * head_DV.shape[1] + jnp.arange(head_DV.shape[1]))[None, :]


def _split(chunk, local_vocab_size, *arrays):
    """[B, T, ...] -> [C, N, ...], padded with zeros, whose weight is zero. The second array is [B, T]."""
    num_tokens = arrays[1].size
    chunk = min(chunk or max(1, LOGITS_BYTES // (4 * local_vocab_size)), num_tokens)
    num_chunks = -(-num_tokens // chunk)
    chunk = -(-num_tokens // num_chunks)  # even chunks pad least

    def split(array):
        flat = array.reshape(num_tokens, *array.shape[arrays[1].ndim :])
        padding = [(0, num_chunks * chunk - num_tokens)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(num_chunks, chunk, *flat.shape[1:])

    return tuple(split(array) for array in arrays)


def _join(array_CN, shape):
    """The inverse of _split: [C, N, ...] -> [*shape, ...]."""
    flat = array_CN.reshape(-1, *array_CN.shape[2:])
    return flat[: math.prod(shape)].reshape(*shape, *flat.shape[1:])
