"""Every knob of a run on one page: what it means, its unit, and the rules it must keep.

A file in configs/ returns a Config; flags override single fields (`--config.train.steps=200`); validate() then reports
every broken rule at once, before a device is touched. None always means "off" or "chosen for you", as the comment says.
"""

import dataclasses
import json
import typing

ATTENTIONS = ("auto", "reference", "splash", "cudnn", "blocks")
ACTIVATIONS = ("swiglu", "geglu", "gelu")
DTYPES = ("auto", "bfloat16", "float32")
KINDS = ("dense", "local", "moe")
LAYERS = ("auto", "scan", "unroll")
MOMENT_DTYPES = ("float32", "bfloat16")
NORMS = ("rmsnorm", "layernorm")
NORM_PLACEMENTS = ("pre", "post", "both")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd", "muon")
POSITIONS = ("rope", "learned", "sinusoidal")
REMATS = ("none", "dots", "gate", "feed_forward", "full")
ROPE_SCALINGS = ("linear", "llama3")
SPIKES = ("stop", "skip", "rewind")
SCHEDULES = ("cosine", "wsd", "linear", "rsqrt", "constant")
TOKENIZERS = ("unigram", "bpe")
NUM_SPECIAL_TOKENS = 4  # unk, bos, eos, pad
NUM_BYTE_TOKENS = 256  # byte fallback


@dataclasses.dataclass(kw_only=True, slots=True)
class Model:
    """A decoder-only Transformer. The defaults are the Llama shape; GPT-2 is norm, position, activation, bias."""

    num_layers: int = 6
    width: int = 256
    num_heads: int = 8
    num_kv_heads: int | None = None  # None: as num_heads (no grouping)
    head_width: int | None = None  # None: width / num_heads
    feed_forward_width: int | None = None  # None: 4 * width for gelu, 8/3 * width up to a multiple of 32 with a gate
    activation: str = "swiglu"  # swiglu | geglu | gelu
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_epsilon: float = 1e-6
    norm_placement: str = "pre"  # pre: before each layer | post: behind it, before the sum (OLMo 2) | both (Gemma 2)
    position: str = "rope"  # rope | learned | sinusoidal
    rope_theta: float = 10_000.0
    rope_scaling: str | None = None  # frequencies for rows longer than those of the first training: linear (divided by
    # rope_factor) | llama3 (the low ones only)
    rope_factor: float = 8.0
    rope_low_turns: float = 1.0  # llama3: what turns less often in rope_original_length is divided,
    rope_high_turns: float = 4.0  # what turns more often stays, and between them is a line
    rope_original_length: int = 8192  # llama3: in tokens
    local_rope_theta: float | None = None  # of local layers, unscaled (Gemma 3); None: as in the others
    window: int | None = None  # keys that a token sees, its own with them; None: all before it. With local layers in
    # the pattern: in those alone
    score_width: int | None = None  # the scores of attention are divided by its square root; None: head_width
    attention_soft_cap: float | None = None  # scores -> cap * tanh(scores / cap)
    use_bias: bool = False
    use_qkv_bias: bool = False  # of queries, keys and values alone (Qwen2); use_bias has them, too
    qk_norm: bool = False
    qk_norm_over_heads: bool = False  # over all heads together (OLMo 2), not each by itself
    scale_embeddings: bool = False  # times sqrt(width)
    tie_embeddings: bool = False
    logit_soft_cap: float | None = None  # logits -> cap * tanh(logits / cap)
    attention: str = "auto"  # what computes it: reference | splash (TPU) | cudnn (NVIDIA GPUs) | blocks (one CPU
    # device); auto: the one of the platform, where it can serve. The run says which at start
    # Of the computation; auto: bfloat16, but float32 on CPUs without AMX, of several devices, or before JAX 0.12.
    # Parameters are float32.
    dtype: str = "auto"
    layers: str = (
        "auto"  # scan: one compiled block | unroll: compiled one by one; auto: unroll on one CPU device (faster there)
    )
    remat: str = "none"  # what the backward pass recomputes: none | dots (all but matmuls) | gate (also the gate's) |
    # feed_forward (also all of these layers) | full
    pattern: tuple[str, ...] = ("dense",)  # the layers, repeated: dense | local (with a window) | moe (a mixture of
    # experts); scanned together
    num_experts: int | None = None  # of each moe layer
    experts_per_token: int = 2  # how many of them a token goes to
    normalize_gates: bool = True  # the weights of those sum to 1, if there are several
    num_shared_experts: int = 0  # that every token goes to, besides
    expert_width: int | None = None  # feed-forward width of one expert; None: that of a dense layer


@dataclasses.dataclass(kw_only=True, slots=True)
class Tokenizer:
    """SentencePiece, trained on a weighted sample of the sources, or given."""

    kind: str = "unigram"  # unigram (several times faster to encode) | bpe
    vocab_size: int = 8192
    train_bytes: int = 10_000_000  # size of the text sample it is trained on
    model_file: str | None = None  # an existing .model; kind, vocab_size and train_bytes are then the model's own


@dataclasses.dataclass(kw_only=True, slots=True)
class Source:
    """One tfds text dataset of the mixture."""

    name: str  # as in tfds: "c4/en", "wikipedia/20230601.en"; "python_docs" is built in
    weight: float = 1.0  # share of the training tokens; the weights of all sources are normalised to 1
    split: str = "train"  # tfds split or slice: "train", "train[:98%]"
    held_out: str = "validation"  # the split evaluated on: "validation", "train[98%:]"
    text_key: str = "text"  # the feature that holds the text


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
    sources: tuple[Source, ...] = dataclasses.field(default_factory=lambda: (Source(name="python_docs"),))
    data_dir: str | None = None  # where tfds datasets lie; None: TFDS_DATA_DIR, else ~/tensorflow_datasets
    cache_dir: str | None = (
        None  # tokenizers and token stores, shared by runs; None: LLM_JAX_CACHE, else ~/.cache/llm_jax
    )
    num_workers: int | None = None  # processes that tokenize; None: one per core
    skip_bad_documents: bool = False  # count and skip a document that is not UTF-8, instead of stopping


@dataclasses.dataclass(kw_only=True, slots=True)
class Optimizer:
    """An optax optimizer and its learning-rate schedule, which spans train.steps."""

    name: str = "adamw"  # adamw | adafactor | lion | sgd | muon (of the blocks' matrices; adamw of all else)
    peak_learning_rate: float = 3e-4
    schedule: str = "cosine"  # after the warm-up: cosine | wsd | linear | rsqrt | constant
    warmup_steps: int = 100
    decay_steps: int | None = None  # wsd only: length of the final linear decay; None: a tenth of train.steps
    final_fraction: float = 0.1  # of the peak, at the last step (cosine, linear, wsd)
    moment_dtype: str = "float32"  # float32 | bfloat16: half the memory, for models that would not fit
    beta1: float = 0.9  # of adamw and lion; momentum of sgd
    beta2: float = 0.95  # of adamw and lion
    epsilon: float = 1e-8  # of adamw
    weight_decay: float = 0.1  # decoupled, on matrices only
    clip_norm: float | None = 1.0  # global norm of the gradient; None: off


@dataclasses.dataclass(kw_only=True, slots=True)
class Parallel:
    """The mesh: sizes of its axes. Their product is the number of devices."""

    auto: bool = False  # the planner picks all sizes for the devices there are, and says which and why
    replica: int = 1  # copies of the parameters; across slices
    stage: int = 1  # layers sharded: a pipeline, through which train.microbatches go one behind the other
    rounds: int = 1  # groups of layers that each stage holds: how often a microbatch goes round the pipeline
    fsdp: int | None = None  # parameters and batch sharded; None: all devices the other axes leave
    expert: int = 1  # experts sharded, tokens exchanged; parameters and batch of other layers as by fsdp
    context: int = 1  # sequence sharded, keys and values gathered; parameters as by fsdp
    tensor: int = 1  # heads, feed-forward and vocabulary sharded, and the sequence between blocks
    heartbeat_seconds: int | None = None  # a process that the others have not heard of for so long ends the run; None:
    # 4 on CPU, 60 elsewhere
    num_cpu_devices: int | None = None  # simulate that many devices on CPU


@dataclasses.dataclass(kw_only=True, slots=True)
class Train:
    steps: int = 1000  # updates of the whole run
    batch_size: int = 16  # global, in sequences
    sequence_length: int = 256  # in tokens
    microbatches: int = 1  # the batch is computed in that many parts, weighted by tokens
    seed: int = 0  # of the parameters and of the data order
    z_loss: float = 0.0  # weight of log(Z)^2, PaLM section 5; 0: off
    loss_chunk: int | None = (
        None  # tokens per device whose logits exist at once; None: as many as 256 MiB of logits allow
    )
    load_balance_loss: float = 0.01  # weight of the loss that evens out the load of experts; 0: off
    router_z_loss: float = 0.001  # weight of log(Z)^2 of the routers; 0: off
    router_bias_rate: float | None = None  # so much a step moves the bias that evens out the load without a loss
    ema_decay: float | None = None  # an exponential moving average of the parameters is kept and saved; None: off


@dataclasses.dataclass(kw_only=True, slots=True)
class Checkpoint:
    every: int = 100  # steps
    recompute_every: int | None = None  # steps between repetitions of an update that must agree bit for bit, which
    # finds failing hardware at the price of that update and twice the memory of the state; None: off
    keep: int = 3  # the newest ones
    keep_every: int | None = None  # and one each that many steps, for ever; None: off
    keep_best: int | None = None  # and so many of the lowest held-out loss; None: off
    max_failures: int = 3  # saves in a row that fail: the run stops; fewer are reported, and the next one is tried
    notice_seconds: float = 30.0  # from SIGTERM to the end of the machine; the run says at start whether it can save
    allow_other_data: bool = False  # resume although the data are not those of the checkpoint


@dataclasses.dataclass(kw_only=True, slots=True)
class Evaluate:
    every: int | None = 100  # steps between evaluations of the fixed subset during training; None: off
    batch_size: int = 16  # in sequences; changes no result
    subset: int = 64  # sequences per source of the fixed subset; the end of the run evaluates everything


@dataclasses.dataclass(kw_only=True, slots=True)
class Log:
    every: int = 1  # steps between lines of metrics.jsonl
    tensorboard: bool = True
    sample_prompt: str | None = "The"  # continued at the end of the run; None: no sample
    sample_tokens: int = 64


@dataclasses.dataclass(kw_only=True, slots=True)
class Spikes:
    """What is done about an update whose loss or gradient norm is not finite, or far above those before."""

    action: str = "stop"  # stop: what is not finite stops the run, a spike is only recorded | skip: leave the update
    # out | rewind: go back to a checkpoint and past some batches (PaLM, arXiv:2204.02311, section 5.1)
    threshold: float = 10.0  # robust standard deviations (1.4826 x MAD) above the median of the window
    window: int = 64  # updates; nothing is a spike until it is full
    limit: int = 10  # updates skipped, or rewinds, in the whole run; one more stops it
    rewind_steps: int = 100  # at least so many updates back
    rewind_batches: int = 200  # are left out from there


@dataclasses.dataclass(kw_only=True, slots=True)
class Watchdog:
    """Seconds that a part of a run may take without progress; then every thread's stack is written to the workdir, and
    the run ends with exit code 70. None: no limit."""

    start: float | None = 1800.0  # until the first compilation: devices, restore
    compile: float | None = 3600.0
    step: float | None = 600.0  # or ten times the median step, if that is more
    checkpoint: float | None = 1800.0  # while the loop waits for a save
    evaluation: float | None = 1800.0


def section(cls):
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
    model: Model = section(Model)
    tokenizer: Tokenizer = section(Tokenizer)
    data: Data = section(Data)
    optimizer: Optimizer = section(Optimizer)
    parallel: Parallel = section(Parallel)
    train: Train = section(Train)
    checkpoint: Checkpoint = section(Checkpoint)
    evaluate: Evaluate = section(Evaluate)
    spikes: Spikes = section(Spikes)
    watchdog: Watchdog = section(Watchdog)
    log: Log = section(Log)


class UserError(ValueError):
    """Bad input: names the field, the value, the rule and the way out in one line. Ends a command with exit code 78."""


class RunFailed(RuntimeError):
    """What is wrong with the run is known, and no fault of the input: one line, and exit code 70."""


def validate(config: Config) -> None:
    """Raises UserError with every broken rule, one a line."""
    problems = []

    def require(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    def one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
        require(value in choices, f"{field}={value!r} must be one of {', '.join(choices)}")

    def at_least(minimum: float, **fields: float | None) -> None:
        for field, value in fields.items():
            field = field.replace("__", ".")
            require(value is None or value >= minimum, f"{field}={value} must be at least {minimum}")

    m, t, o = config.model, config.train, config.optimizer
    one_of("model.activation", m.activation, ACTIVATIONS)
    one_of("model.attention", m.attention, ATTENTIONS)
    one_of("model.dtype", m.dtype, DTYPES)
    one_of("model.layers", m.layers, LAYERS)
    one_of("model.norm", m.norm, NORMS)
    one_of("model.norm_placement", m.norm_placement, NORM_PLACEMENTS)
    one_of("model.position", m.position, POSITIONS)
    one_of("model.remat", m.remat, REMATS)
    if m.rope_scaling is not None:
        one_of("model.rope_scaling", m.rope_scaling, ROPE_SCALINGS)
    require(len(m.pattern) > 0, "model.pattern is empty; give at least one kind of layer, such as dense")
    for kind in m.pattern:
        one_of("model.pattern", kind, KINDS)
    one_of("optimizer.name", o.name, OPTIMIZERS)
    one_of("optimizer.moment_dtype", o.moment_dtype, MOMENT_DTYPES)
    one_of("optimizer.schedule", o.schedule, SCHEDULES)
    one_of("spikes.action", config.spikes.action, SPIKES)
    one_of("tokenizer.kind", config.tokenizer.kind, TOKENIZERS)
    smallest_vocabulary = NUM_SPECIAL_TOKENS + NUM_BYTE_TOKENS + 2
    at_least(
        1,
        model__num_layers=m.num_layers, model__width=m.width, model__num_heads=m.num_heads,
        model__num_kv_heads=m.num_kv_heads, model__head_width=m.head_width,
        model__feed_forward_width=m.feed_forward_width, data__num_workers=config.data.num_workers,
        optimizer__decay_steps=o.decay_steps, parallel__replica=config.parallel.replica,
        parallel__fsdp=config.parallel.fsdp, parallel__tensor=config.parallel.tensor,
        parallel__stage=config.parallel.stage, parallel__rounds=config.parallel.rounds,
        parallel__expert=config.parallel.expert, parallel__context=config.parallel.context,
        model__window=m.window, model__rope_original_length=m.rope_original_length, model__rope_factor=m.rope_factor,
        model__num_experts=m.num_experts, model__experts_per_token=m.experts_per_token,
        model__expert_width=m.expert_width, model__score_width=m.score_width,
        parallel__num_cpu_devices=config.parallel.num_cpu_devices, train__steps=t.steps,
        train__batch_size=t.batch_size, train__sequence_length=t.sequence_length, train__microbatches=t.microbatches,
        train__loss_chunk=t.loss_chunk, checkpoint__every=config.checkpoint.every,
        checkpoint__keep=config.checkpoint.keep, checkpoint__keep_every=config.checkpoint.keep_every,
        checkpoint__keep_best=config.checkpoint.keep_best, checkpoint__max_failures=config.checkpoint.max_failures,
        checkpoint__recompute_every=config.checkpoint.recompute_every,
        parallel__heartbeat_seconds=config.parallel.heartbeat_seconds,
        spikes__rewind_steps=config.spikes.rewind_steps, spikes__rewind_batches=config.spikes.rewind_batches,
        spikes__limit=config.spikes.limit,
        evaluate__every=config.evaluate.every,
        evaluate__batch_size=config.evaluate.batch_size, evaluate__subset=config.evaluate.subset,
        log__every=config.log.every, log__sample_tokens=config.log.sample_tokens,
        tokenizer__train_bytes=config.tokenizer.train_bytes,
    )  # fmt: skip
    at_least(0, optimizer__warmup_steps=o.warmup_steps, optimizer__weight_decay=o.weight_decay, train__seed=t.seed,
             train__z_loss=t.z_loss, train__load_balance_loss=t.load_balance_loss,
             train__router_z_loss=t.router_z_loss, model__num_shared_experts=m.num_shared_experts)  # fmt: skip
    at_least(8, spikes__window=config.spikes.window)
    at_least(smallest_vocabulary, tokenizer__vocab_size=config.tokenizer.vocab_size)

    for field, value in {
        "model.norm_epsilon": m.norm_epsilon, "model.rope_theta": m.rope_theta,
        "model.rope_low_turns": m.rope_low_turns,
        "model.local_rope_theta": m.local_rope_theta, "model.attention_soft_cap": m.attention_soft_cap,
        "model.logit_soft_cap": m.logit_soft_cap, "optimizer.peak_learning_rate": o.peak_learning_rate,
        "optimizer.epsilon": o.epsilon,
        "optimizer.clip_norm": o.clip_norm, "train.router_bias_rate": t.router_bias_rate,
        "spikes.threshold": config.spikes.threshold,
        "checkpoint.notice_seconds": config.checkpoint.notice_seconds,
        **{f"watchdog.{field}": seconds for field, seconds in dataclasses.asdict(config.watchdog).items()},
    }.items():  # fmt: skip
        require(value is None or 0 < value < float("inf"), f"{field}={value} must be a positive number")
    for field, value in {"optimizer.beta1": o.beta1, "optimizer.beta2": o.beta2}.items():
        require(0 <= value < 1, f"{field}={value} must lie in [0, 1)")
    require(
        t.ema_decay is None or 0 < t.ema_decay < 1,
        f"train.ema_decay={t.ema_decay} must lie between 0 and 1, or be none",
    )
    require(0 <= o.final_fraction <= 1, f"optimizer.final_fraction={o.final_fraction} must lie in [0, 1]")

    if not problems:  # rules between fields make sense only once each field does
        require(
            m.head_width is not None or m.width % m.num_heads == 0,
            f"model.width={m.width} must divide by model.num_heads={m.num_heads}; or set model.head_width",
        )
        kv_heads = m.num_kv_heads or m.num_heads
        require(
            m.num_heads % kv_heads == 0,
            f"model.num_heads={m.num_heads} must divide by model.num_kv_heads={kv_heads}",
        )
        head_width = m.head_width or m.width // m.num_heads
        require(
            m.position != "rope" or head_width % 2 == 0,
            f"model.position='rope' turns pairs, so the head width {head_width} must be even; "
            "change model.head_width or model.num_heads",
        )
        require(
            m.position == "rope" or m.rope_scaling is None,
            f"model.rope_scaling={m.rope_scaling!r} has an effect only with model.position='rope'",
        )
        require(
            m.rope_low_turns < m.rope_high_turns,
            f"model.rope_low_turns={m.rope_low_turns} must be less than model.rope_high_turns={m.rope_high_turns}",
        )
        require(
            not (m.use_bias and m.use_qkv_bias),
            "model.use_qkv_bias=true has no effect with model.use_bias=true, which has these, too; leave one out",
        )
        require(
            m.qk_norm or not m.qk_norm_over_heads,
            "model.qk_norm_over_heads=true has an effect only with model.qk_norm=true",
        )
        require(
            m.position != "sinusoidal" or m.width % 2 == 0,
            f"model.position='sinusoidal' needs an even model.width, not {m.width}",
        )
        require(
            m.num_layers % len(m.pattern) == 0,
            f"model.num_layers={m.num_layers} must be a multiple of the {len(m.pattern)} layers of model.pattern; try "
            f"{-(-m.num_layers // len(m.pattern)) * len(m.pattern)}",
        )
        require(
            not (m.scale_embeddings and m.position == "sinusoidal"),
            "model.scale_embeddings=true has no effect with model.position='sinusoidal', which scales them, too; leave "
            "it out",
        )
        require(
            "local" not in m.pattern or m.window is not None,
            f"model.pattern={m.pattern} has local layers, which need a window: set model.window",
        )
        require(
            m.local_rope_theta is None or ("local" in m.pattern and m.position == "rope"),
            f"model.local_rope_theta={m.local_rope_theta} has an effect only with local layers in model.pattern and "
            "model.position='rope'",
        )
        routed = "moe" in m.pattern
        require(
            not routed or m.activation != "geglu",
            "model.activation='geglu' is not there for layers of the kind moe; use swiglu or gelu",
        )
        require(
            routed == (m.num_experts is not None),
            f"model.num_experts={m.num_experts} and model.pattern={m.pattern} contradict each other: layers of the "
            "kind moe have experts, and no others do",
        )
        require(
            routed or (m.expert_width is None and m.num_shared_experts == 0),
            f"model.expert_width={m.expert_width} and model.num_shared_experts={m.num_shared_experts} have an effect "
            "only on layers of the kind moe",
        )
        require(
            m.normalize_gates or (routed and m.experts_per_token > 1),
            "model.normalize_gates=false has an effect only on layers of the kind moe, with several experts a token",
        )
        require(
            not routed or m.num_experts != 1,
            "model.num_experts=1 leaves nothing to choose; use a dense layer, or at least 2",
        )
        require(
            not routed or m.experts_per_token <= (m.num_experts or 0),
            f"model.experts_per_token={m.experts_per_token} must not exceed model.num_experts={m.num_experts}",
        )
        require(
            routed or t.router_bias_rate is None,
            f"train.router_bias_rate={t.router_bias_rate} has an effect only on layers of the kind moe",
        )
        _validate_mesh(config, require)
        require(
            t.batch_size % t.microbatches == 0,
            f"train.batch_size={t.batch_size} must divide by train.microbatches={t.microbatches}",
        )
        require(
            o.warmup_steps < t.steps,
            f"optimizer.warmup_steps={o.warmup_steps} must be less than train.steps={t.steps}",
        )
        saved, evaluated = config.checkpoint.every, config.evaluate.every
        require(
            config.checkpoint.keep_best is None or (evaluated is not None and saved % evaluated == 0),
            f"checkpoint.keep_best={config.checkpoint.keep_best} needs an evaluation at every save: checkpoint.every="
            f"{saved} must be a multiple of evaluate.every={evaluated}",
        )
        require(
            o.moment_dtype == "float32" or o.name != "adafactor",
            f"optimizer.moment_dtype={o.moment_dtype} has no effect with optimizer.name=adafactor, which keeps rows "
            "and columns only; leave it out",
        )
        require(
            o.moment_dtype == "float32" or max(o.beta1, o.beta2) <= 0.99,
            f"optimizer.moment_dtype={o.moment_dtype} needs optimizer.beta1={o.beta1} and optimizer.beta2={o.beta2} of "
            "at most 0.99: a moment that changes by less than 1/256 is rounded back to what it was",
        )
        require(
            o.decay_steps is None or o.schedule == "wsd",
            f"optimizer.decay_steps={o.decay_steps} has an effect only with optimizer.schedule=wsd, not {o.schedule}",
        )
        decay_steps = o.decay_steps or max(1, t.steps // 10)
        require(
            o.schedule != "wsd" or o.warmup_steps + decay_steps <= t.steps,
            f"optimizer.warmup_steps={o.warmup_steps} + optimizer.decay_steps={decay_steps} must fit into "
            f"train.steps={t.steps}",
        )
        require(
            o.schedule != "rsqrt" or o.warmup_steps > 0,
            "optimizer.schedule='rsqrt' decays from the end of the warm-up: optimizer.warmup_steps must be at least 1",
        )

    for field, path in {
        "data.cache_dir": config.data.cache_dir,
        "data.data_dir": config.data.data_dir,
        "tokenizer.model_file": config.tokenizer.model_file,
    }.items():
        require(
            path is None or "://" not in path,
            f"{field}={path} must be a path of this machine; mount the bucket, as by `launch/setup_vm.sh "
            "--mount=BUCKET=DIR`, and give the path there",
        )
    sources = config.data.sources
    require(len(sources) > 0, "data.sources is empty; give at least one, such as Source(name='c4/en')")
    for i, source in enumerate(sources):
        require(
            source.weight > 0,
            f"data.sources[{i}].weight={source.weight} must be positive; leave the source out instead",
        )
        require(
            source.split != source.held_out,
            f"data.sources[{i}].held_out={source.held_out!r} is the training split; try split='train[:98%]', "
            "held_out='train[98%:]'",
        )
    names = [(source.name, source.split) for source in sources]
    require(len(set(names)) == len(names), f"data.sources names a dataset and split twice: {names}")
    if problems:
        raise UserError("\n".join(problems))


def _validate_mesh(config: Config, require) -> None:
    """What an axis needs of the model and of the batch to be of use. What must divide: parallel.sharding."""
    m, p, t = config.model, config.parallel, config.train
    require(
        not p.auto or (p.replica, p.stage, p.rounds, p.fsdp, p.expert, p.context, p.tensor) == (1, 1, 1, None, 1, 1, 1),
        "parallel.auto=true picks the sizes of all axes: leave them out, or set parallel.auto=false",
    )
    require(
        p.expert == 1 or m.num_experts is not None,
        f"parallel.expert={p.expert} shards the experts, and there are none; use parallel.fsdp for it, or "
        "model.pattern=moe",
    )
    require(
        p.rounds == 1 or p.stage > 1,
        f"parallel.rounds={p.rounds} has an effect only with parallel.stage above 1",
    )
    repeats = m.num_layers // len(m.pattern)
    groups = p.stage * p.rounds
    require(
        repeats % groups == 0,
        f"parallel.stage={p.stage} x parallel.rounds={p.rounds} = {groups} groups of layers must divide the {repeats} "
        f"repetitions of model.pattern in model.num_layers={m.num_layers}; these do: "
        f"{', '.join(str(n) for n in range(1, repeats + 1) if repeats % n == 0)}",
    )
    require(
        p.stage == 1 or t.microbatches % p.stage == 0,
        f"train.microbatches={t.microbatches} must be a multiple of parallel.stage={p.stage}: microbatches fill the "
        f"pipeline; try {-(-t.microbatches // p.stage) * p.stage}",
    )


def to_dict(config: Config) -> dict:
    return dataclasses.asdict(config)


def from_dict(values: dict, cls: type = Config):
    """The inverse of to_dict. A field that is missing or unknown is a UserError: the file is of another version."""
    hints = typing.get_type_hints(cls)
    if set(values) != set(hints):
        raise UserError(
            f"{cls.__name__} has the fields {sorted(hints)}, but the saved config is missing "
            f"{sorted(set(hints) - set(values))} and has unknown {sorted(set(values) - set(hints))}; use the version "
            "of llm_jax that wrote it"
        )

    def build(hint, value):
        if dataclasses.is_dataclass(hint):
            return from_dict(value, hint)
        if typing.get_origin(hint) is tuple:
            return tuple(build(typing.get_args(hint)[0], v) for v in value)
        return value

    return cls(**{name: build(hint, values[name]) for name, hint in hints.items()})


def flatten(config: Config) -> dict[str, object]:
    """{"train.steps": 1000, "data.sources[0].name": "c4/en", ...}"""
    flat = {}

    def walk(prefix: str, value) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{prefix}.{key}" if prefix else key, child)
        elif isinstance(value, list | tuple):
            for i, child in enumerate(value):
                walk(f"{prefix}[{i}]", child)
        else:
            flat[prefix] = value

    walk("", to_dict(config))
    return flat


def differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """{field: (old value, new value)} of the fields that differ; a field that one of them lacks is None there."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in sorted(a | b) if a.get(key) != b.get(key)}


def dumps(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"
