"""The decoder-only Transformer language model: token ids to hidden states, and hidden states to logits.

B batch, T position, S key position, D width, K key/value heads, H head width, V vocabulary, L layers, M microbatch,
R repetitions of the pattern of layers

Modules hold parameters and numbers. Layers are stacked on a leading dimension: one parameter tree, one checkpoint
format, whether they run as a scan, unrolled or as a pipeline. Where layers are of different kinds, these follow each
other in a pattern that is repeated: each place of the pattern has a stack of its own.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm_jax.kernels.splash_attention import RESULTS
from llm_jax.model.attention import Attention
from llm_jax.model.feed_forward import FeedForward
from llm_jax.model.moe import MixtureOfExperts
from llm_jax.model.norm import Norm
from llm_jax.model.parameter import PROJECTED, UP, gathered, weight
from llm_jax.model.position import RopeScaling, sinusoidal
from llm_jax.parallel.pipeline import pipelined
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
    activation: str  # swiglu | geglu | gelu
    layer_norm: bool
    norm_epsilon: float
    position: str  # rope | learned | sinusoidal
    rope_theta: float
    rope_scaling: RopeScaling | None
    local_rope_theta: float | None  # of local layers, without scaling; None: as in the others
    window: int | None  # of all layers, or of the local ones alone if there are any
    score_width: int | None
    attention_soft_cap: float | None
    use_bias: bool
    use_qkv_bias: bool
    qk_norm: str | None  # head | heads: each by itself, or all together
    norm_placement: str  # pre | post | both
    scale_embeddings: bool
    tie_embeddings: bool
    logit_soft_cap: float | None
    pattern: tuple[str, ...]  # the kinds of the layers, repeated: dense | local | moe
    num_experts: int  # 0 without moe layers
    experts_per_token: int
    num_shared_experts: int
    expert_width: int
    normalize_gates: bool

    @property
    def gated(self) -> bool:
        return self.activation != "gelu"

    def window_of(self, kind: str) -> int | None:
        return self.window if kind == "local" or "local" not in self.pattern else None

    def letters(self) -> dict[str, int]:
        """The sizes of dimensions by their letters; F is that of a routed expert where all layers are mixtures."""
        return {
            "D": self.width,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_width,
            "F": self.expert_width if set(self.pattern) == {"moe"} else self.feed_forward_width,
            "V": self.vocab_size,
            "T": self.max_length,
            "L": self.num_layers,
            "E": self.num_experts,
        }


def keep_all_but_gathered(primitive, *_, **__) -> bool:
    """Remat policy: everything is kept for the backward pass but what was gathered, which is gathered again.

    Without it each block's gathered weights would live until its backward pass, the whole model on each device, and so
    would whole sequences, where they are sharded between blocks. Scanned on 8 simulated devices, 8 blocks of 12.6 MB:
    47 MB of temporaries against 148 MB.
    """
    return primitive.name not in ("reshard", "all_gather")


REMATS = {
    "none": None,
    "gathers": keep_all_but_gathered,
    # What splash attention made, too: a byte of it costs as many FLOPs as there are keys, one of a product D.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESULTS),
    ),
    # The same without the gate's product, and without all of the feed-forward layers: for models that would not fit.
    "gate": jax.checkpoint_policies.save_only_these_names(PROJECTED, RESULTS, UP),
    "feed_forward": jax.checkpoint_policies.save_only_these_names(PROJECTED, RESULTS),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """Residual block with norms before its layers (Radford et al. 2019, section 2.3), behind them, before the sums
    (OLMo 2, arXiv:2501.00656, section 3.2), or both (Gemma 2, arXiv:2408.00118, section 2.4)."""

    def __init__(self, shape: Shape, kind: str, *, attention: str, dtype: jnp.dtype, rules: Rules, key: jax.Array):
        attention_key, feed_forward_key = jax.random.split(key)
        make_norm = functools.partial(
            Norm, centred=shape.layer_norm, use_bias=shape.use_bias, epsilon=shape.norm_epsilon
        )

        def make_head_norm(num_heads: int) -> Norm:
            if shape.qk_norm == "head":
                return make_norm(shape.head_width)
            return make_norm(num_heads, shape.head_width, spec=rules.spec("heads", None))

        before, behind = shape.norm_placement != "post", shape.norm_placement != "pre"
        unscaled = kind == "local" and shape.local_rope_theta is not None
        theta = shape.local_rope_theta if unscaled else shape.rope_theta
        # The variance of the residual stream does not grow with depth at the start (Radford et al. 2019, section 2.3).
        out_scale = 1 / math.sqrt(2 * shape.num_layers)
        self.attention_norm = make_norm(shape.width) if before else None
        self.attention_out_norm = make_norm(shape.width) if behind else None
        self.attention = Attention(
            width=shape.width,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_width=shape.head_width,
            out_scale=out_scale,
            rope_theta=theta if shape.position == "rope" else None,
            rope_scaling=None if unscaled else shape.rope_scaling,
            window=shape.window_of(kind),
            score_width=shape.score_width,
            soft_cap=shape.attention_soft_cap,
            use_bias=shape.use_bias,
            use_qkv_bias=shape.use_qkv_bias,
            make_head_norm=make_head_norm if shape.qk_norm else None,
            implementation=attention,
            dtype=dtype,
            rules=rules,
            key=attention_key,
        )
        self.feed_forward_norm = make_norm(shape.width) if before else None
        self.feed_forward_out_norm = make_norm(shape.width) if behind else None
        sizes = {"width": shape.width, "out_scale": out_scale}
        if kind == "moe":
            self.feed_forward = MixtureOfExperts(
                **sizes,
                expert_width=shape.expert_width,
                num_experts=shape.num_experts,
                experts_per_token=shape.experts_per_token,
                num_shared_experts=shape.num_shared_experts,
                gated=shape.gated,
                normalize_gates=shape.normalize_gates,
                dtype=dtype,
                rules=rules,
                key=feed_forward_key,
            )
        else:
            self.feed_forward = FeedForward(
                **sizes,
                feed_forward_width=shape.feed_forward_width,
                activation=shape.activation,
                use_bias=shape.use_bias,
                dtype=dtype,
                rules=rules,
                key=feed_forward_key,
            )
        self.rules = rules

    def __call__(self, x_BTD, segments_BT, positions_BT, order=None, cache=None):
        """(x_BTD, cache, router sums of a moe layer, else None). `order` and `cache`: see Attention."""
        # Between layers, norms and sums are computed by parts of the sequence on the devices that share a layer's
        # weights: nothing is kept twice (Korthikanti et al. 2022, arXiv:2205.05198). A few new tokens have no parts.
        within = self.rules.spec("batch", None if cache is not None else "length", None)
        between = within if cache is not None else self.rules.spec("batch", "sequence", None)
        with jax.named_scope("attention"):
            into_BTD = jax.reshard(_normed(self.attention_norm, x_BTD), within)
            out_BTD, cache = self.attention(into_BTD, segments_BT, positions_BT, between, order, cache)
            x_BTD += _normed(self.attention_out_norm, out_BTD)
        with jax.named_scope("feed_forward"):
            into_BTD, sums = jax.reshard(_normed(self.feed_forward_norm, x_BTD), within), None
            if isinstance(self.feed_forward, FeedForward):
                out_BTD = self.feed_forward(into_BTD, between)
            else:
                counted_BT = (segments_BT > 0).astype(jnp.float32)
                out_BTD, sums = self.feed_forward(into_BTD, counted_BT, between)
            return x_BTD + _normed(self.feed_forward_out_norm, out_BTD), cache, sums


def _normed(norm: Norm | None, x_BTD: jax.Array) -> jax.Array:
    return x_BTD if norm is None else norm(x_BTD)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding remembers: keys and values of each layer, and the segment of each position (0: nothing there)."""

    kv: tuple[tuple[jax.Array, jax.Array], ...]  # [R, B, S, K, H]; a pair for each place of the pattern
    segments_BS: jax.Array
    length: jax.Array  # positions written so far, the same for all rows


class Stacks(nnx.Module):
    """The stacked blocks of each place of the pattern, by its number."""

    def __init__(self, stacks: list[Block]):
        for place, stack in enumerate(stacks):
            setattr(self, str(place), stack)


def _places(blocks: Block | Stacks) -> list[Block]:
    if isinstance(blocks, Block):
        return [blocks]
    names = sorted((name for name in vars(blocks) if name.isdigit()), key=int)
    return [getattr(blocks, name) for name in names]


def _shard_layers(leaf, *, rules: Rules):
    return jax.reshard(leaf, jax.P(*rules.spec("layers"), *jax.typeof(leaf).sharding.spec[1:]))


def _whole_layers(stacks):
    """With all layers on each device, as a loop over them needs."""
    return jax.tree.map(lambda leaf: jax.reshard(leaf, jax.P(None, *jax.typeof(leaf).sharding.spec[1:])), stacks)


class Transformer(nnx.Module):
    def __init__(
        self,
        shape: Shape,
        *,
        attention: str,
        dtype: jnp.dtype,
        unroll: bool,
        remat: str,
        rounds: int,
        rules: Rules,
        key: jax.Array,
    ):
        """`dtype` is the computation's; parameters are float32. How it runs changes no result: `attention` (see
        kernels.attention), `unroll`, `remat` (in REMATS), `rounds` (see parallel.pipeline)."""
        embed_key, position_key, blocks_key, head_key = jax.random.split(key, 4)
        table, head = rules.spec("vocab", "table_embed"), rules.spec("table_embed", "vocab")
        self.embed = weight(embed_key, (shape.vocab_size, shape.width), table, width=shape.width)
        learned = shape.position == "learned"
        table_shape = (shape.max_length, shape.width)
        position = rules.spec(None, "table_embed")
        self.position_embed = weight(position_key, table_shape, position, width=shape.width) if learned else None
        keys_LK = jax.random.split(blocks_key, shape.num_layers)
        stacks = []
        for i, kind in enumerate(shape.pattern):
            make_block = functools.partial(Block, shape, kind, attention=attention, dtype=dtype, rules=rules)
            stack = jax.vmap(lambda block_key, make=make_block: make(key=block_key))(keys_LK[i :: len(shape.pattern)])
            stacks.append(jax.tree.map(functools.partial(_shard_layers, rules=rules), stack))
        self.blocks = stacks[0] if len(stacks) == 1 else Stacks(stacks)
        self.final_norm = Norm(
            shape.width, centred=shape.layer_norm, use_bias=shape.use_bias, epsilon=shape.norm_epsilon
        )
        tied = shape.tie_embeddings
        self.head = None if tied else weight(head_key, (shape.width, shape.vocab_size), head, width=shape.width)
        self.shape = shape
        self.dtype = dtype
        self.unroll = unroll
        self.remat = remat
        self.rounds = rounds
        self.rules = rules

    def __call__(self, tokens_BT, segments_BT, positions_BT, order: np.ndarray | None = None):
        """(hidden states [B, T, D] after the final norm in the computation's dtype, router sums).

        A token attends to itself and to the tokens before it with the same segment id. positions_BT count from the
        start of the token's document. The rows' tokens stand in the given order [T]; None: their own. All are sharded
        as rules.spec("batch", "length").

        With a leading dimension M of microbatches, these go through the pipeline one behind the other, and come out
        sharded over it. Router sums: for each place of the pattern, RouterSums with a leading [R], in a pipeline
        [M, R], or None.
        """
        if tokens_BT.ndim == 3:
            x_MBTD = self._embed(tokens_BT, positions_BT, leading=("microbatches",))
            rows = (segments_BT, positions_BT)
            run = functools.partial(self._run_layers, order=order)
            x_MBTD, sums = pipelined(run, self.blocks, x_MBTD, rows, rounds=self.rounds, rules=self.rules)
            spec = self.rules.spec("microbatches", "batch", "length", None)
            return jax.reshard(self.final_norm(x_MBTD), spec), sums
        x_BTD = self._embed(tokens_BT, positions_BT)
        x_BTD, sums = self._run_layers(x_BTD, _whole_layers(self.blocks), (segments_BT, positions_BT), order=order)
        return jax.reshard(self.final_norm(x_BTD), self.rules.spec("batch", "length", None)), sums

    def _run_layers(self, x_BTD, stacks, rows, *, order):
        segments_BT, positions_BT = rows

        def run_group(x_BTD, blocks):
            sums = []
            for block in _places(blocks):
                x_BTD, _, of_block = block(x_BTD, segments_BT, positions_BT, order)
                sums.append(of_block)
            return x_BTD, tuple(sums)

        if self.remat != "none":
            run_group = jax.checkpoint(run_group, policy=REMATS[self.remat], prevent_cse=self.unroll)
        return self._over_layers(run_group, x_BTD, stacks)

    def extend(self, tokens_BT, segments_BT, positions_BT, cache: Cache) -> tuple[jax.Array, Cache]:
        """As __call__ for tokens that follow those in the cache; returns hidden states and the longer cache."""
        segments_BS = jax.lax.dynamic_update_slice_in_dim(cache.segments_BS, segments_BT, cache.length, axis=1)

        def run_group(x_BTD, group):
            blocks, kv = group
            new_kv = []
            for block, (k_BSKH, v_BSKH) in zip(_places(blocks), kv, strict=True):
                old = (k_BSKH, v_BSKH, segments_BS, cache.length)
                x_BTD, new, _ = block(x_BTD, segments_BT, positions_BT, cache=old)
                new_kv.append(new)
            return x_BTD, tuple(new_kv)

        x_BTD = self._embed(tokens_BT, positions_BT, decoding=True)
        x_BTD, kv = self._over_layers(run_group, x_BTD, (_whole_layers(self.blocks), cache.kv))
        return self.final_norm(x_BTD), Cache(kv, segments_BS, cache.length + tokens_BT.shape[1])

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        repetitions = self.shape.num_layers // len(self.shape.pattern)
        shape = (repetitions, batch_size, length, self.shape.num_kv_heads, self.shape.head_width)
        zeros_RBSKH = jnp.zeros(shape, self.dtype, out_sharding=self.rules.spec(None, "batch", None, "heads", None))
        return Cache(
            ((zeros_RBSKH, zeros_RBSKH),) * len(self.shape.pattern),
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

    def _embed(self, tokens_BT, positions_BT, leading: tuple[str, ...] = (), decoding: bool = False):
        spec = self.rules.spec(*leading, "batch", None if decoding else "length", None)
        # Gather the table over D first: a lookup sharded over both B and D makes XLA copy whole activations.
        table_VD = gathered(self.embed, self.rules.spec("vocab", None), self.dtype)
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=spec)
        if self.shape.scale_embeddings or self.shape.position == "sinusoidal":
            # Vaswani et al. 2017, section 3.4; or sines would drown the small initial embeddings.
            x_BTD *= math.sqrt(self.shape.width)
        if self.position_embed is not None:
            table_TD = gathered(self.position_embed, self.rules.spec(None, None), self.dtype)
            x_BTD += table_TD.at[positions_BT].get(out_sharding=spec)
        elif self.shape.position == "sinusoidal":
            x_BTD += sinusoidal(positions_BT, self.shape.width).astype(self.dtype)
        return x_BTD if decoding else jax.reshard(x_BTD, self.rules.spec(*leading, "batch", "sequence", None))

    def _over_layers(self, run, x_BTD, layers):
        if not self.unroll:
            return jax.lax.scan(run, x_BTD, layers)
        outputs = []
        for i in range(jax.tree.leaves(layers)[0].shape[0]):
            x_BTD, output = run(x_BTD, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
            outputs.append(output)
        return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
