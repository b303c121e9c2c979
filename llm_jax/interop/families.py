"""The families of models on Hugging Face that are ours by another name: their config.json, and their tensors.

In a family's table a row is one of our parameters: its name and dimensions, and those of their tensor, where letters
that stand together are one dimension. {L} is the number of the layer and {E} that of the expert: ours are stacked.

D width, N query heads, K key/value heads, H head width, F feed-forward width of a layer or an expert, V vocabulary,
T positions, L layers, E experts
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from llm_jax.config import Model, UserError
from llm_jax.model.transformer import Shape


@dataclasses.dataclass(frozen=True)
class Tensor:
    ours: str
    dims: str
    theirs: str | None  # None: zeros, which other libraries do not have
    their_dims: str = ""
    part: int = 0  # of the 3 that are one tensor of theirs
    plus: int = 0  # ours is theirs plus this


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    name: str  # model_type in config.json
    architecture: str
    tensors: tuple[Tensor, ...]
    read: Callable[[dict], Model]  # from config.json; every field that defines the numbers is set
    write: Callable[[Model, Shape], dict]  # to config.json; what it cannot say, `read` does not find there


def rows(*table: tuple) -> tuple[Tensor, ...]:
    return tuple(Tensor(*row) for row in table)


LAYER = "model.layers.{L}"
EMBEDDINGS = rows(
    ("embed", "V D", "model.embed_tokens.weight", "V D"),
    ("final_norm/scale", "D", "model.norm.weight", "D"),
    ("head", "D V", "lm_head.weight", "V D"),
)
ATTENTION = rows(
    ("blocks/attention/wq", "D N H", f"{LAYER}.self_attn.q_proj.weight", "NH D"),
    ("blocks/attention/wk", "D K H", f"{LAYER}.self_attn.k_proj.weight", "KH D"),
    ("blocks/attention/wv", "D K H", f"{LAYER}.self_attn.v_proj.weight", "KH D"),
    ("blocks/attention/wo", "N H D", f"{LAYER}.self_attn.o_proj.weight", "D NH"),
)
QKV_BIAS = rows(
    ("blocks/attention/bq", "N H", f"{LAYER}.self_attn.q_proj.bias", "NH"),
    ("blocks/attention/bk", "K H", f"{LAYER}.self_attn.k_proj.bias", "KH"),
    ("blocks/attention/bv", "K H", f"{LAYER}.self_attn.v_proj.bias", "KH"),
)
HEAD_NORMS = rows(
    ("blocks/attention/q_norm/scale", "H", f"{LAYER}.self_attn.q_norm.weight", "H"),
    ("blocks/attention/k_norm/scale", "H", f"{LAYER}.self_attn.k_norm.weight", "H"),
)
NORMS_OVER_HEADS = rows(
    ("blocks/attention/q_norm/scale", "N H", f"{LAYER}.self_attn.q_norm.weight", "NH"),
    ("blocks/attention/k_norm/scale", "K H", f"{LAYER}.self_attn.k_norm.weight", "KH"),
)
NORMS = rows(
    ("blocks/attention_norm/scale", "D", f"{LAYER}.input_layernorm.weight", "D"),
    ("blocks/feed_forward_norm/scale", "D", f"{LAYER}.post_attention_layernorm.weight", "D"),
)
NORMS_BEHIND = rows(
    ("blocks/attention_out_norm/scale", "D", f"{LAYER}.post_attention_layernorm.weight", "D"),
    ("blocks/feed_forward_out_norm/scale", "D", f"{LAYER}.post_feedforward_layernorm.weight", "D"),
)
NORMS_BEFORE = rows(
    ("blocks/attention_norm/scale", "D", f"{LAYER}.input_layernorm.weight", "D"),
    ("blocks/feed_forward_norm/scale", "D", f"{LAYER}.pre_feedforward_layernorm.weight", "D"),
)
SWIGLU = rows(
    ("blocks/feed_forward/w_gate", "D F", f"{LAYER}.mlp.gate_proj.weight", "F D"),
    ("blocks/feed_forward/w_up", "D F", f"{LAYER}.mlp.up_proj.weight", "F D"),
    ("blocks/feed_forward/w_down", "F D", f"{LAYER}.mlp.down_proj.weight", "D F"),
)
EXPERTS = rows(
    ("blocks/feed_forward/w_router", "D E", f"{LAYER}.mlp.gate.weight", "E D"),
    ("blocks/feed_forward/b_router", "E", None),
    ("blocks/feed_forward/w_gate", "E D F", f"{LAYER}.mlp.experts.{{E}}.gate_proj.weight", "F D"),
    ("blocks/feed_forward/w_up", "E D F", f"{LAYER}.mlp.experts.{{E}}.up_proj.weight", "F D"),
    ("blocks/feed_forward/w_down", "E F D", f"{LAYER}.mlp.experts.{{E}}.down_proj.weight", "D F"),
)
MIXTRAL_EXPERTS = rows(
    ("blocks/feed_forward/w_router", "D E", f"{LAYER}.block_sparse_moe.gate.weight", "E D"),
    ("blocks/feed_forward/b_router", "E", None),
    ("blocks/feed_forward/w_gate", "E D F", f"{LAYER}.block_sparse_moe.experts.{{E}}.w1.weight", "F D"),
    ("blocks/feed_forward/w_up", "E D F", f"{LAYER}.block_sparse_moe.experts.{{E}}.w3.weight", "F D"),
    ("blocks/feed_forward/w_down", "E F D", f"{LAYER}.block_sparse_moe.experts.{{E}}.w2.weight", "D F"),
)
GEMMA = tuple(
    dataclasses.replace(row, plus=1) if row.ours.endswith("/scale") else row
    for row in EMBEDDINGS + NORMS_BEFORE + NORMS_BEHIND + HEAD_NORMS + ATTENTION + SWIGLU
)
GPT2_LAYER = "transformer.h.{L}"
GPT2 = rows(
    ("embed", "V D", "transformer.wte.weight", "V D"),
    ("position_embed", "T D", "transformer.wpe.weight", "T D"),
    ("blocks/attention_norm/scale", "D", f"{GPT2_LAYER}.ln_1.weight", "D"),
    ("blocks/attention_norm/bias", "D", f"{GPT2_LAYER}.ln_1.bias", "D"),
    ("blocks/attention/wq", "D N H", f"{GPT2_LAYER}.attn.c_attn.weight", "D 3NH", 0),
    ("blocks/attention/wk", "D N H", f"{GPT2_LAYER}.attn.c_attn.weight", "D 3NH", 1),
    ("blocks/attention/wv", "D N H", f"{GPT2_LAYER}.attn.c_attn.weight", "D 3NH", 2),
    ("blocks/attention/bq", "N H", f"{GPT2_LAYER}.attn.c_attn.bias", "3NH", 0),
    ("blocks/attention/bk", "N H", f"{GPT2_LAYER}.attn.c_attn.bias", "3NH", 1),
    ("blocks/attention/bv", "N H", f"{GPT2_LAYER}.attn.c_attn.bias", "3NH", 2),
    ("blocks/attention/wo", "N H D", f"{GPT2_LAYER}.attn.c_proj.weight", "NH D"),
    ("blocks/attention/bo", "D", f"{GPT2_LAYER}.attn.c_proj.bias", "D"),
    ("blocks/feed_forward_norm/scale", "D", f"{GPT2_LAYER}.ln_2.weight", "D"),
    ("blocks/feed_forward_norm/bias", "D", f"{GPT2_LAYER}.ln_2.bias", "D"),
    ("blocks/feed_forward/w_up", "D F", f"{GPT2_LAYER}.mlp.c_fc.weight", "D F"),
    ("blocks/feed_forward/b_up", "F", f"{GPT2_LAYER}.mlp.c_fc.bias", "F"),
    ("blocks/feed_forward/w_down", "F D", f"{GPT2_LAYER}.mlp.c_proj.weight", "F D"),
    ("blocks/feed_forward/b_down", "D", f"{GPT2_LAYER}.mlp.c_proj.bias", "D"),
    ("final_norm/scale", "D", "transformer.ln_f.weight", "D"),
    ("final_norm/bias", "D", "transformer.ln_f.bias", "D"),
    ("head", "D V", "lm_head.weight", "V D"),
)


def read_gpt2(c: dict) -> Model:
    refuse_others(
        c, activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,), reorder_and_upcast_attn=(False, True), add_cross_attention=(False,),
    )  # fmt: skip
    return Model(
        num_layers=c["n_layer"],
        width=c["n_embd"],
        num_heads=c["n_head"],
        num_kv_heads=c["n_head"],
        head_width=c["n_embd"] // c["n_head"],
        feed_forward_width=c.get("n_inner") or 4 * c["n_embd"],
        activation="gelu",
        norm="layernorm",
        norm_epsilon=c.get("layer_norm_epsilon", 1e-5),
        position="learned",
        use_bias=True,
        tie_embeddings=c.get("tie_word_embeddings", True),
    )


def write_gpt2(m: Model, s: Shape) -> dict:
    return {
        "n_layer": m.num_layers,
        "n_embd": m.width,
        "n_head": m.num_heads,
        "n_positions": s.max_length,
        "n_inner": m.feed_forward_width,
        "layer_norm_epsilon": m.norm_epsilon,
        "activation_function": "gelu_new",
        "tie_word_embeddings": m.tie_embeddings,
    }


def read_llama(c: dict, **others: Any) -> Model:
    """What all families but GPT-2 and Gemma have in common; others: fields of the family's own."""
    refuse_others(c, hidden_act=("silu",))
    return read_decoder(c, **others)


def read_decoder(c: dict, **others: Any) -> Model:
    refuse_others(c, attention_bias=(False,), mlp_bias=(False,), partial_rotary_factor=(1.0,))
    heads, width = c["num_attention_heads"], c["hidden_size"]
    return Model(**{
        "num_layers": c["num_hidden_layers"],
        "width": width,
        "num_heads": heads,
        "num_kv_heads": c.get("num_key_value_heads") or heads,
        "head_width": c.get("head_dim") or width // heads,
        "feed_forward_width": c["intermediate_size"],
        "norm_epsilon": c.get("rms_norm_eps", 1e-6),
        "tie_embeddings": c.get("tie_word_embeddings", False),
        **read_rope(c),
        **others,
    })  # fmt: skip


def write_llama(m: Model, s: Shape) -> dict:
    return {
        "num_hidden_layers": m.num_layers,
        "hidden_size": m.width,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_width,
        "intermediate_size": m.feed_forward_width,
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_epsilon,
        "tie_word_embeddings": m.tie_embeddings,
        "max_position_embeddings": s.max_length,
        **write_rope(m),
    }


def read_rope(c: dict) -> dict[str, Any]:
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    refuse_others(rope, partial_rotary_factor=(1.0,))
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = {"rope_theta": float(rope.get("rope_theta", c.get("rope_theta", 10_000.0)))}
    if kind == "default":
        return fields
    fields |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])} if kind in ("linear", "llama3") else {}
    if kind == "llama3":
        return fields | {
            "rope_low_turns": float(rope["low_freq_factor"]),
            "rope_high_turns": float(rope["high_freq_factor"]),
            "rope_original_length": rope["original_max_position_embeddings"],
        }
    if kind != "linear":
        raise UserError(f"config.json: rope_type={kind!r} is not supported; default, linear and llama3 are")
    return fields


def write_rope(m: Model) -> dict:
    scaling = None
    if m.rope_scaling is not None:
        scaling = {"rope_type": m.rope_scaling, "factor": m.rope_factor}
    if m.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": m.rope_low_turns,
            "high_freq_factor": m.rope_high_turns,
            "original_max_position_embeddings": m.rope_original_length,
        }
    return {"rope_theta": m.rope_theta, "rope_scaling": scaling}


def read_mistral(c: dict) -> Model:
    return read_llama(c, window=c.get("sliding_window"))


def write_mistral(m: Model, s: Shape) -> dict:
    return write_llama(m, s) | {"sliding_window": m.window}


def read_qwen2(c: dict) -> Model:
    refuse_others(c, use_sliding_window=(False,))
    return read_llama(c, use_qkv_bias=True)


def read_qwen3(c: dict) -> Model:
    refuse_others(c, use_sliding_window=(False,))
    return read_llama(c, qk_norm=True)


def read_olmo2(c: dict) -> Model:
    return read_llama(c, qk_norm=True, qk_norm_over_heads=True, norm_placement="post")


def read_mixtral(c: dict) -> Model:
    return read_llama(
        c,
        window=c.get("sliding_window"),
        pattern=("moe",),
        num_experts=c["num_local_experts"],
        experts_per_token=c["num_experts_per_tok"],
        expert_width=c["intermediate_size"],
        feed_forward_width=None,
    )


def write_mixtral(m: Model, s: Shape) -> dict:
    return write_mistral(m, s) | {
        "intermediate_size": s.expert_width,
        "num_local_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "router_aux_loss_coef": 0.0,
    }


def read_qwen3_moe(c: dict) -> Model:
    refuse_others(c, use_sliding_window=(False,), decoder_sparse_step=(1,), mlp_only_layers=([], None))
    return read_llama(
        c,
        qk_norm=True,
        pattern=("moe",),
        num_experts=c["num_experts"] if "num_experts" in c else c["num_local_experts"],
        experts_per_token=c["num_experts_per_tok"],
        normalize_gates=c.get("norm_topk_prob", False),
        expert_width=c["moe_intermediate_size"],
        feed_forward_width=None,
    )


def write_qwen3_moe(m: Model, s: Shape) -> dict:
    return write_llama(m, s) | {
        "intermediate_size": s.expert_width,
        "moe_intermediate_size": s.expert_width,
        "num_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "norm_topk_prob": m.normalize_gates,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.0,
    }


def read_olmoe(c: dict) -> Model:
    refuse_others(c, clip_qkv=(None,))
    return read_llama(
        c,
        qk_norm=True,
        qk_norm_over_heads=True,
        pattern=("moe",),
        num_experts=c["num_experts"],
        experts_per_token=c["num_experts_per_tok"],
        normalize_gates=c.get("norm_topk_prob", False),
        expert_width=c["intermediate_size"],
        feed_forward_width=None,
    )


def read_gemma2(c: dict) -> Model:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | c
    return read_gemma(caps, every=2, attention_soft_cap=caps["attn_logit_softcapping"])


def write_gemma2(m: Model, s: Shape) -> dict:
    return write_gemma(m, s) | {"attn_logit_softcapping": m.attention_soft_cap}


def read_gemma3(c: dict) -> Model:
    refuse_others(c, attn_logit_softcapping=(None,))
    rope = c.get("rope_parameters") or {}
    others = read_rope({"rope_theta": 1e6} | c | {"rope_parameters": rope.get("full_attention")})
    local = {"rope_theta": c.get("rope_local_base_freq", 10_000.0)} | rope.get("sliding_attention", {})
    refuse_others(local, rope_type=("default",), partial_rotary_factor=(1.0,))
    theta = {"rope_theta": float(local["rope_theta"])}
    others["local_rope_theta"] = None if others == theta else theta["rope_theta"]
    return read_gemma(c, every=c.get("sliding_window_pattern", 6), qk_norm=True, **others)


def write_gemma3(m: Model, s: Shape) -> dict:
    return write_gemma(m, s) | {"rope_local_base_freq": m.local_rope_theta or m.rope_theta}


def read_gemma(c: dict, *, every: int, **others: Any) -> Model:
    """every: of so many layers one sees all keys, if layer_types does not say which do."""
    refuse_others(c, hidden_activation=("gelu_pytorch_tanh",), use_bidirectional_attention=(False, None))
    kinds = {"sliding_attention": "local", "full_attention": "dense"}
    count, head_width = c["num_hidden_layers"], c.get("head_dim", 256)
    types = c.get("layer_types") or [list(kinds)[i % every == every - 1] for i in range(count)]
    for kind in types:
        refuse_others({"layer_types": kind}, layer_types=tuple(kinds))
    layers = tuple(kinds[kind] for kind in types)
    repeated = min(n for n in range(1, count + 1) if layers == layers[:n] * (count // n))
    score_width = c.get("query_pre_attn_scalar", 256)
    return read_decoder(
        c,
        head_width=head_width,
        activation="geglu",
        norm_placement="both",
        window=c.get("sliding_window", 4096) if "local" in layers else None,
        score_width=None if score_width == head_width else score_width,
        scale_embeddings=True,
        tie_embeddings=c.get("tie_word_embeddings", True),
        logit_soft_cap=c.get("final_logit_softcapping"),
        pattern=layers[:repeated],
        **others,
    )


def write_gemma(m: Model, s: Shape) -> dict:
    pattern = ["sliding_attention" if kind == "local" else "full_attention" for kind in m.pattern]
    return write_llama(m, s) | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": pattern * (m.num_layers // len(pattern)),
        "sliding_window": m.window,
        "query_pre_attn_scalar": m.score_width or m.head_width,
        "final_logit_softcapping": m.logit_soft_cap,
    }


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            tensors=EMBEDDINGS + NORMS + ATTENTION + SWIGLU,
            read=read_llama,
            write=write_llama,
        ),
        Family(
            name="gpt2",
            architecture="GPT2LMHeadModel",
            tensors=GPT2,
            read=read_gpt2,
            write=write_gpt2,
        ),
        Family(
            name="mistral",
            architecture="MistralForCausalLM",
            tensors=EMBEDDINGS + NORMS + ATTENTION + SWIGLU,
            read=read_mistral,
            write=write_mistral,
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            tensors=EMBEDDINGS + NORMS + ATTENTION + QKV_BIAS + SWIGLU,
            read=read_qwen2,
            write=write_llama,
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            tensors=EMBEDDINGS + NORMS + ATTENTION + HEAD_NORMS + SWIGLU,
            read=read_qwen3,
            write=write_llama,
        ),
        Family(
            name="olmo2",
            architecture="Olmo2ForCausalLM",
            tensors=EMBEDDINGS + NORMS_BEHIND + ATTENTION + NORMS_OVER_HEADS + SWIGLU,
            read=read_olmo2,
            write=write_llama,
        ),
        Family(
            name="mixtral",
            architecture="MixtralForCausalLM",
            tensors=EMBEDDINGS + NORMS + ATTENTION + MIXTRAL_EXPERTS,
            read=read_mixtral,
            write=write_mixtral,
        ),
        Family(
            name="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            tensors=EMBEDDINGS + NORMS + ATTENTION + HEAD_NORMS + EXPERTS,
            read=read_qwen3_moe,
            write=write_qwen3_moe,
        ),
        Family(
            name="olmoe",
            architecture="OlmoeForCausalLM",
            tensors=EMBEDDINGS + NORMS + ATTENTION + NORMS_OVER_HEADS + EXPERTS,
            read=read_olmoe,
            write=write_qwen3_moe,
        ),
        Family(
            name="gemma2",
            architecture="Gemma2ForCausalLM",
            tensors=GEMMA,
            read=read_gemma2,
            write=write_gemma2,
        ),
        Family(
            name="gemma3_text",
            architecture="Gemma3ForCausalLM",
            tensors=GEMMA,
            read=read_gemma3,
            write=write_gemma3,
        ),
    )
}  # fmt: skip


def refuse_others(c: dict, **known: tuple) -> None:
    """UserError for a field of config.json with another value than these; a missing one is fine."""
    for field, values in known.items():
        if field in c and c[field] not in values:
            raise UserError(
                f"config.json: {field}={c[field]!r} is not supported, only {' or '.join(map(repr, values))}; such a "
                "model would compute something else here"
            )


def family_of(c: dict) -> Family:
    """By config.json. UserError for those we do not have."""
    if c.get("quantization_config"):
        method = c["quantization_config"].get("quant_method")
        raise UserError(f"config.json: the weights are quantised ({method}); import the unquantised model instead")
    name = c.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"config.json: model_type={name!r} is not supported; these are: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def nearest(model: Model, shape: Shape) -> tuple[Family, dict]:
    """(the family that computes the same, its config.json without what belongs to the tokenizer). UserError with the
    fields that have no counterpart, in the family where they are fewest."""
    wanted = dataclasses.asdict(canonical(model, shape))
    unmatched = {}
    for family in FAMILIES.values():
        c = family.write(canonical(model, shape), shape)
        found = dataclasses.asdict(family.read(c))
        unmatched[family.name] = [field for field in wanted if found[field] != wanted[field]]
        if not unmatched[family.name]:
            names = {"model_type": family.name, "architectures": [family.architecture], "vocab_size": shape.vocab_size}
            return family, names | c
    name = min(unmatched, key=lambda name: len(unmatched[name]))
    fields = ", ".join(f"model.{field}={wanted[field]!r}" for field in unmatched[name])
    raise UserError(
        f"{fields} has no counterpart in any family of Hugging Face that we know; the nearest is {name}, without it"
    )


def canonical(model: Model, shape: Shape) -> Model:
    """With every None resolved, and the defaults for what does not change the numbers."""
    default = Model()
    fields: dict[str, Any] = {
        "num_kv_heads": shape.num_kv_heads,
        "head_width": shape.head_width,
        "feed_forward_width": None if set(shape.pattern) == {"moe"} else shape.feed_forward_width,
        "expert_width": shape.expert_width if "moe" in shape.pattern else None,
        "score_width": None if shape.score_width == shape.head_width else shape.score_width,
    }
    if model.rope_scaling is None and model.local_rope_theta == model.rope_theta:
        fields["local_rope_theta"] = None
    unused = ["attention", "dtype", "layers", "remat"]
    unused += [] if model.position == "rope" else ["rope_theta"]
    unused += [] if model.rope_scaling else ["rope_factor"]
    unused += [] if model.rope_scaling == "llama3" else ["rope_low_turns", "rope_high_turns", "rope_original_length"]
    unused += [] if "moe" in shape.pattern else ["experts_per_token"]
    return dataclasses.replace(model, **fields, **{field: getattr(default, field) for field in unused})
