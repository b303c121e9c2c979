"""What a run is at a step: exactly what is saved, and how it is made from the config."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from llm_jax import config
from llm_jax.kernels.attention import choose_implementation
from llm_jax.kernels.matmul import has_fast_bfloat16_on_cpu
from llm_jax.model.position import RopeScaling
from llm_jax.model.transformer import Shape, Transformer
from llm_jax.parallel.sharding import Rules, blocks_gather, num_shards, require_divisible
from llm_jax.training import spikes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32: batches taken, which are the updates finished but for those skipped
    parameters: Transformer  # float32
    optimizer: optax.OptState
    ema: Transformer | None  # float32, sharded as the parameters: their exponential moving average; None: not kept
    history: spikes.History


def model_shape(model: config.Model, *, vocab_size: int, sequence_length: int) -> Shape:
    """The config with every None resolved."""
    gated = model.activation != "gelu"
    # A gate makes three matrices of two: 8/3 keeps the parameters (Shazeer 2020, arXiv:2002.05202, section 2).
    feed_forward_width = -(-8 * model.width // 3 // 32) * 32 if gated else 4 * model.width
    scaling = None
    if model.rope_scaling == "linear":
        scaling = RopeScaling(factor=model.rope_factor)
    elif model.rope_scaling == "llama3":
        scaling = RopeScaling(
            factor=model.rope_factor,
            low=model.rope_low_turns,
            high=model.rope_high_turns,
            original_length=model.rope_original_length,
        )
    return Shape(
        vocab_size=vocab_size,
        max_length=sequence_length,
        num_layers=model.num_layers,
        width=model.width,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_width=model.head_width or model.width // model.num_heads,
        feed_forward_width=model.feed_forward_width or feed_forward_width,
        activation=model.activation,
        layer_norm=model.norm == "layernorm",
        norm_epsilon=model.norm_epsilon,
        position=model.position,
        rope_theta=model.rope_theta,
        rope_scaling=scaling,
        local_rope_theta=model.local_rope_theta,
        window=model.window,
        score_width=model.score_width,
        attention_soft_cap=model.attention_soft_cap,
        use_bias=model.use_bias,
        use_qkv_bias=model.use_bias or model.use_qkv_bias,
        qk_norm=None if not model.qk_norm else "heads" if model.qk_norm_over_heads else "head",
        norm_placement=model.norm_placement,
        scale_embeddings=model.scale_embeddings,
        tie_embeddings=model.tie_embeddings,
        logit_soft_cap=model.logit_soft_cap,
        pattern=model.pattern,
        num_experts=model.num_experts or 0,
        experts_per_token=model.experts_per_token,
        num_shared_experts=model.num_shared_experts,
        expert_width=model.expert_width or model.feed_forward_width or feed_forward_width,
        normalize_gates=model.normalize_gates,
    )


def compute_dtype(model: config.Model, mesh: jax.sharding.Mesh) -> jnp.dtype:
    """That of model.dtype; auto: float32 on CPUs that are not known to be faster in bfloat16, else bfloat16."""
    if model.dtype != "auto":
        return jnp.dtype(model.dtype)
    platform = mesh.devices.flat[0].platform
    half = platform != "cpu" or (has_fast_bfloat16_on_cpu(mesh) and "moe" not in model.pattern)
    return jnp.dtype(jnp.bfloat16 if half else jnp.float32)


def choose_attention(
    model: config.Model, shape: Shape, mesh: jax.sharding.Mesh, rules: Rules
) -> tuple[str, str | None]:
    """(what computes attention, why it is not the kernel of this platform; None: it is, or was asked for).

    Raises UserError if model.attention names one that cannot serve.
    """
    device = mesh.devices.flat[0]
    return choose_implementation(
        model.attention,
        device.platform,
        length=shape.max_length,
        length_shards=num_shards(mesh, rules.length),
        head_width=shape.head_width,
        dtype=compute_dtype(model, mesh),
        soft_cap=shape.attention_soft_cap,
        capability=getattr(device, "compute_capability", None),
        num_devices=mesh.size,
    )


def make_init(
    model: config.Model,
    shape: Shape,
    optimizer: optax.GradientTransformation,
    *,
    mesh: jax.sharding.Mesh,
    rules: Rules,
    seed: int,
    window: int,
    ema: bool,
    rounds: int = 1,
):
    """A function of nothing that makes the state of step 0 in its sharding; jit it, or eval_shape it for its types.

    window: config.Spikes.window; ema: whether an average of the parameters is kept. It starts at the first ones;
    rounds: config.Parallel.rounds.

    Raises UserError if a dimension does not divide by its shards, or as choose_attention does.
    """
    require_divisible(
        mesh,
        rules,
        {
            "model.width": (shape.width, "table_embed"),
            "model.num_heads": (shape.num_heads, "heads"),
            "model.num_kv_heads": (shape.num_kv_heads, "heads"),
            "model.feed_forward_width": (shape.feed_forward_width, "feed_forward"),
            "tokenizer.vocab_size": (shape.vocab_size, "vocab"),
            **({"model.num_experts": (shape.num_experts, "experts")} if shape.num_experts else {}),
            **({"model.expert_width": (shape.expert_width, "feed_forward")} if shape.num_experts else {}),
        },
    )
    platform = mesh.devices.flat[0].platform
    gathers = blocks_gather(mesh, rules)
    # Unrolled is 12-18 % faster on CPU, but XLA then gathers all layers early: 222 MB of temporaries against 47 MB.
    unroll = model.layers == "unroll" or (model.layers == "auto" and platform == "cpu" and not gathers)
    remat = "gathers" if model.remat == "none" and gathers else model.remat
    make_model = functools.partial(
        Transformer,
        shape,
        attention=choose_attention(model, shape, mesh, rules)[0],
        dtype=compute_dtype(model, mesh),
        unroll=unroll,
        remat=remat,
        rounds=rounds,
        rules=rules,
    )

    def init() -> TrainState:
        return begin(make_model(key=jax.random.key(seed)), optimizer, window=window, ema=ema)

    return init


def begin(parameters: Transformer, optimizer: optax.GradientTransformation, *, window: int, ema: bool) -> TrainState:
    """The state of step 0 with these parameters; jit it. window, ema: as of make_init."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        optimizer=optimizer.init(parameters),
        ema=parameters if ema else None,  # under jit, in memory of its own
        history=spikes.empty(window),
    )


def abstract_state(init, mesh: jax.sharding.Mesh):
    """Shapes, dtypes and shardings of what `init` makes, without making it: the target of a restore."""

    def with_mesh(leaf):
        spec = leaf.sharding.spec if leaf.sharding is not None else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(with_mesh, jax.eval_shape(init))
