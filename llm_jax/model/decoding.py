"""Generation: prompts in, sampled tokens out, with a key/value cache and one compiled loop.

B prompt, P prompt position, M new token, V vocabulary, D width
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llm_jax.model.transformer import Cache, Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 takes the likeliest token; else top_k, then top_p (Holtzman et al. 2019, arXiv:1904.09751) narrow
    the choice. top_p lies in (0, 1]."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos: int = 2  # ends a row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Rows under way. tokens_BM holds the new tokens up to `count`; after a row's end it repeats eos."""

    cache: Cache
    logits_BV: jax.Array  # of the next token
    tokens_BM: jax.Array
    count: jax.Array
    done_B: jax.Array
    lengths_B: jax.Array  # of the prompts


def start(model: Transformer, tokens_BP: jax.Array, lengths_B: jax.Array, *, max_tokens: int) -> Decoding:
    """Reads the prompts: int32, padded on the left, so that all end in the last column; lengths_B tokens each."""
    batch_size, width = tokens_BP.shape
    batch = model.rules.spec("batch")
    positions_BP = jnp.arange(width)[None, :] - (width - lengths_B)[:, None]
    segments_BP = (positions_BP >= 0).astype(jnp.int32)
    cache = model.empty_cache(batch_size, width + max_tokens)
    hidden_BPD, cache = model.extend(tokens_BP, segments_BP, jnp.maximum(positions_BP, 0), cache)
    return Decoding(
        cache,
        _last_logits(model, hidden_BPD),
        jnp.zeros((batch_size, max_tokens), jnp.int32, out_sharding=model.rules.spec("batch", None)),
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch_size,), bool, out_sharding=batch),
        lengths_B,
    )


def extend(model: Transformer, decoding: Decoding, key: jax.Array, *, sampling: Sampling, num_tokens: int) -> Decoding:
    """Up to num_tokens more tokens for each row that has not ended, and no more than tokens_BM holds.

    A row's tokens depend on its number and the key, not on the other rows.
    """
    limit = jnp.minimum(decoding.count + num_tokens, decoding.tokens_BM.shape[1])

    def step(decoding: Decoding) -> Decoding:
        token_B = _sample(decoding.logits_BV, jax.random.fold_in(key, decoding.count), sampling)
        token_B = jnp.where(decoding.done_B, sampling.eos, token_B)
        tokens_BM = jax.lax.dynamic_update_slice_in_dim(decoding.tokens_BM, token_B[:, None], decoding.count, axis=1)
        positions_BT = (decoding.lengths_B + decoding.count)[:, None]
        hidden_BTD, cache = model.extend(token_B[:, None], jnp.ones_like(positions_BT), positions_BT, decoding.cache)
        return Decoding(
            cache,
            _last_logits(model, hidden_BTD),
            tokens_BM,
            decoding.count + 1,
            decoding.done_B | (token_B == sampling.eos),
            decoding.lengths_B,
        )

    return jax.lax.while_loop(lambda d: (d.count < limit) & ~jnp.all(d.done_B), step, decoding)


def _last_logits(model, hidden_BTD):
    return jax.reshard(model.logits(hidden_BTD[:, -1]), model.rules.spec("batch", None))


def _sample(logits_BV, key, sampling):
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = narrow(logits_BV / sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    batch_size, vocab_size = logits_BV.shape
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch_size))
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,)))(keys_B)
    noise_BV = jax.reshard(noise_BV, jax.typeof(logits_BV).sharding.spec)
    return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)


def narrow(logits_BV: jax.Array, *, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits with -inf for all but the top_k likeliest, and all but the smallest set that holds top_p of what is left.

    Tokens as likely as the last one kept are kept, too.
    """
    if top_k is not None:
        kth_B1 = jnp.sort(logits_BV, axis=-1)[:, -min(top_k, logits_BV.shape[1])][:, None]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p is not None:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        # The last token kept is the first whose predecessors hold less than top_p; the likeliest always stays.
        smallest_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return logits_BV
