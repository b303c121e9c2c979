"""The decoder-only Transformer language model: token ids to hidden states, and hidden states to logits.

B batch, T position, S key position, D width, K key/value heads, H head width, V vocabulary, L layers

Modules hold parameters and numbers. Layers are stacked on a leading dimension: one parameter tree, one checkpoint
format, whether they run as a scan or unrolled.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llm_jax.model.attention import Attention
from llm_jax.model.feed_forward import FeedForward
from llm_jax.model.norm import Norm
from llm_jax.model.parameter import gathered, weight
from llm_jax.model.position import sinusoidal
from llm_jax.parallel.sharding import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers that define the model; config.Model with every choice made."""

    vocab_size: int
    max_length: int  # learned positions reach that far
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    feed_forward_width: int
    gated: bool
    layer_norm: bool
    norm_epsilon: float
    position: str  # rope | learned | sinusoidal
    rope_theta: float
    use_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    logit_soft_cap: float | None


def keep_all_but_gathered(primitive, *_, **__) -> bool:
    """Remat policy: everything is kept for the backward pass but gathered weights, which are gathered again.

    Without it each block's gathered weights would live until its backward pass: the whole model on each device. Scanned
    on 8 simulated devices, 8 blocks of 12.6 MB: 47 MB of temporaries against 148 MB.
    """
    return primitive.name != "reshard"


REMATS = {
    "none": None,
    "gathers": keep_all_but_gathered,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """Pre-norm residual block (Radford et al. 2019, section 2.3)."""

    def __init__(self, shape: Shape, *, dtype: jnp.dtype, rules: Rules, key: jax.Array):
        attention_key, feed_forward_key = jax.random.split(key)
        make_norm = functools.partial(
            Norm, centred=shape.layer_norm, use_bias=shape.use_bias, epsilon=shape.norm_epsilon
        )
        # The variance of the residual stream does not grow with depth at the start (Radford et al. 2019, section 2.3).
        out_scale = 1 / math.sqrt(2 * shape.num_layers)
        self.attention_norm = make_norm(shape.width)
        self.attention = Attention(
            width=shape.width,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_width=shape.head_width,
            out_scale=out_scale,
            rope_theta=shape.rope_theta if shape.position == "rope" else None,
            use_bias=shape.use_bias,
            make_head_norm=make_norm if shape.qk_norm else None,
            dtype=dtype,
            rules=rules,
            key=attention_key,
        )
        self.feed_forward_norm = make_norm(shape.width)
        self.feed_forward = FeedForward(
            width=shape.width,
            feed_forward_width=shape.feed_forward_width,
            out_scale=out_scale,
            gated=shape.gated,
            use_bias=shape.use_bias,
            dtype=dtype,
            rules=rules,
            key=feed_forward_key,
        )

    def __call__(self, x_BTD, segments_BT, positions_BT, cache=None):
        with jax.named_scope("attention"):
            attended_BTD, cache = self.attention(self.attention_norm(x_BTD), segments_BT, positions_BT, cache)
            x_BTD += attended_BTD
        with jax.named_scope("feed_forward"):
            return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD)), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding remembers: keys and values of each layer, and the segment of each position (0: nothing there)."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    segments_BS: jax.Array
    length: jax.Array  # positions written so far, the same for all rows


class Transformer(nnx.Module):
    def __init__(self, shape: Shape, *, dtype: jnp.dtype, unroll: bool, remat: str, rules: Rules, key: jax.Array):
        """`dtype` is the computation's; parameters are float32. `unroll` and `remat` (in REMATS) change no result."""
        embed_key, position_key, blocks_key, head_key = jax.random.split(key, 4)
        table, head = rules.spec("vocab", "embed"), rules.spec("embed", "vocab")
        self.embed = weight(embed_key, (shape.vocab_size, shape.width), table, width=shape.width)
        learned = shape.position == "learned"
        table_shape = (shape.max_length, shape.width)
        position = rules.spec(None, "embed")
        self.position_embed = weight(position_key, table_shape, position, width=shape.width) if learned else None
        make_block = functools.partial(Block, shape, dtype=dtype, rules=rules)
        self.blocks = jax.vmap(lambda block_key: make_block(key=block_key))(
            jax.random.split(blocks_key, shape.num_layers)
        )
        self.final_norm = Norm(
            shape.width, centred=shape.layer_norm, use_bias=shape.use_bias, epsilon=shape.norm_epsilon
        )
        tied = shape.tie_embeddings
        self.head = None if tied else weight(head_key, (shape.width, shape.vocab_size), head, width=shape.width)
        self.shape = shape
        self.dtype = dtype
        self.unroll = unroll
        self.remat = remat
        self.rules = rules

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] after the final norm, in the computation's dtype.

        A token attends to itself and to the tokens before it with the same segment id. positions_BT count from the
        start of the token's document.
        """

        def run_block(x_BTD, block):
            x_BTD, _ = block(x_BTD, segments_BT, positions_BT)
            return x_BTD, None

        if self.remat != "none":
            run_block = jax.checkpoint(run_block, policy=REMATS[self.remat], prevent_cse=self.unroll)
        x_BTD, _ = self._over_layers(run_block, self._embed(tokens_BT, positions_BT), self.blocks)
        return self.final_norm(x_BTD)

    def extend(self, tokens_BT, segments_BT, positions_BT, cache: Cache) -> tuple[jax.Array, Cache]:
        """As __call__ for tokens that follow those in the cache; returns hidden states and the longer cache."""
        segments_BS = jax.lax.dynamic_update_slice_in_dim(cache.segments_BS, segments_BT, cache.length, axis=1)

        def run_block(x_BTD, layer):
            block, k_BSKH, v_BSKH = layer
            return block(x_BTD, segments_BT, positions_BT, (k_BSKH, v_BSKH, segments_BS, cache.length))

        layers = (self.blocks, cache.k_LBSKH, cache.v_LBSKH)
        x_BTD, (k_LBSKH, v_LBSKH) = self._over_layers(run_block, self._embed(tokens_BT, positions_BT), layers)
        cache = Cache(k_LBSKH, v_LBSKH, segments_BS, cache.length + tokens_BT.shape[1])
        return self.final_norm(x_BTD), cache

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        shape = (self.shape.num_layers, batch_size, length, self.shape.num_kv_heads, self.shape.head_width)
        spec = self.rules.spec(None, "batch", None, "heads", None)
        return Cache(
            jnp.zeros(shape, self.dtype, out_sharding=spec),
            jnp.zeros(shape, self.dtype, out_sharding=spec),
            jnp.zeros((batch_size, length), jnp.int32, out_sharding=self.rules.spec("batch", None)),
            jnp.zeros((), jnp.int32),
        )

    def head_DV(self) -> jax.Array:
        """The output matrix in the computation's dtype, sharded as it is stored."""
        head_DV = self.embed[...].T if self.head is None else self.head[...]
        return head_DV.astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]. For a few positions; training uses kernels.cross_entropy instead."""
        head_DV = jax.reshard(self.head_DV(), self.rules.spec(None, "vocab"))
        logits = jnp.einsum("...D,DV->...V", hidden, head_DV, preferred_element_type=jnp.float32)
        cap = self.shape.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _embed(self, tokens_BT, positions_BT):
        spec = self.rules.spec("batch", None, None)
        # Gather the table over D first: a lookup sharded over both B and D makes XLA copy whole activations.
        table_VD = gathered(self.embed, self.rules.spec("vocab", None), self.dtype)
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=spec)
        if self.position_embed is not None:
            table_TD = gathered(self.position_embed, self.rules.spec(None, None), self.dtype)
            x_BTD += table_TD.at[positions_BT].get(out_sharding=spec)
        elif self.shape.position == "sinusoidal":
            # Scaled as in Vaswani et al. 2017, section 3.4, or the sines would drown the small initial embeddings.
            x_BTD = x_BTD * math.sqrt(self.shape.width) + sinusoidal(positions_BT, self.shape.width).astype(self.dtype)
        return x_BTD

    def _over_layers(self, run, x_BTD, layers):
        if not self.unroll:
            return jax.lax.scan(run, x_BTD, layers)
        outputs = []
        for i in range(self.shape.num_layers):
            x_BTD, output = run(x_BTD, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
            outputs.append(output)
        return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
