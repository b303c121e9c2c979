"""The memory that an update needs on each device, by formulas that follow what the code keeps: no factor is fitted.

docs/planning.md explains them. Everything is in bytes of one JAX device (a TPU v7x chip is two).

D width, N heads, K key/value heads, H head width, F feed-forward width, E experts, V vocabulary
"""

import dataclasses
import functools
import math
import typing

import jax.numpy as jnp

from llm_jax.config import Config
from llm_jax.kernels.attention import choose_implementation
from llm_jax.kernels.cross_entropy import LOGITS_BYTES
from llm_jax.kernels.cudnn_attention import max_documents
from llm_jax.kernels.splash_attention import LANES
from llm_jax.model.moe import CHUNK_SHARES
from llm_jax.model.transformer import Shape
from llm_jax.parallel.sharding import Rules
from llm_jax.plan.topology import Topology
from llm_jax.training.state import model_shape

RULES = Rules()
SINGLE, HALF = 4, 2  # bytes of float32, and of bfloat16, in which is computed
KEEPING = ("dots", "gate", "feed_forward")  # remat policies that keep what some products made
# Arrays that an optimizer keeps, of the size of the matrices of the layers, and of all else; adafactor: see moments.
MOMENTS = {"adamw": (2, 2), "lion": (1, 1), "sgd": (1, 1), "muon": (1, 2)}


class Sizes(typing.NamedTuple):
    """Of the mesh axes, as in parallel.sharding.AXES."""

    replica: int = 1
    stage: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1


@functools.cache
def shards(sizes: Sizes, *names: str | None) -> int:
    """Into how many parts dimensions of these logical names are cut."""
    return math.prod(getattr(sizes, axis) for name in names if name for axis in getattr(RULES, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and how: all that the costs depend on but the mesh and the machine."""

    shape: Shape
    batch_size: int
    sequence_length: int
    microbatches: int
    steps: int
    remat: str
    rounds: int
    optimizer: str
    moment_bytes: int  # of an element
    ema: bool
    loss_chunk: int | None

    @property
    def tokens(self) -> int:
        """Of an update."""
        return self.batch_size * self.sequence_length


def make_job(config: Config, vocab_size: int | None = None) -> Job:
    """vocab_size: of the tokenizer there is; None: as the config asks for."""
    train = config.train
    vocab_size = vocab_size or config.tokenizer.vocab_size
    shape = model_shape(config.model, vocab_size=vocab_size, sequence_length=train.sequence_length)
    return Job(
        shape=shape,
        batch_size=train.batch_size,
        sequence_length=train.sequence_length,
        microbatches=train.microbatches,
        steps=train.steps,
        remat=config.model.remat,
        rounds=config.parallel.rounds,
        optimizer=config.optimizer.name,
        moment_bytes=jnp.dtype(config.optimizer.moment_dtype).itemsize,
        ema=train.ema_decay is not None,
        loss_chunk=train.loss_chunk,
    )


@dataclasses.dataclass(frozen=True)
class Array:
    """A parameter, or a stack of one for each of `layers` layers."""

    dims: tuple[int, ...]
    names: tuple[str | None, ...]
    layers: int = 0  # 0: no layer's
    kind: str = "dense"  # dense: every token meets it | expert: those that are routed to it | table: looked up

    @property
    def size(self) -> int:
        return math.prod(self.dims) * max(1, self.layers)

    def local(self, sizes: Sizes, *gathered: str) -> int:
        """Elements on a device, if the dimensions of these names are gathered."""
        cut = shards(sizes, *(name for name in self.names if name not in gathered))
        return self.size // cut // (shards(sizes, "layers") if self.layers else 1)

    @property
    def is_weight(self) -> bool:
        return any(self.names)

    @property
    def is_matrix(self) -> bool:
        """Of a layer, but no router: what training.optimizer.MATRICES names."""
        return self.layers > 0 and sum(name is not None for name in self.names) > 1


@functools.cache
def arrays(shape: Shape) -> tuple[Array, ...]:
    """All parameters, as model/ makes them."""
    s = shape
    layers = s.num_layers // len(s.pattern)
    found = []

    def add(*dims: int, names: tuple[str | None, ...] | None = None, kind: str = "dense", layers: int = layers) -> None:
        found.append(Array(dims, names or (None,) * len(dims), layers, kind))

    def add_norm(*sizes: int, names: tuple[str | None, ...] | None = None, layers: int = layers) -> None:
        for _ in range(2 if s.use_bias else 1):
            add(*sizes, names=names, layers=layers)

    def add_feed_forward(width: int, use_bias: bool) -> None:
        for _ in range(2 if s.gated else 1):
            add(s.width, width, names=("embed", "feed_forward"))
            if use_bias:
                add(width, names=("feed_forward",))
        add(width, s.width, names=("feed_forward", "embed"))
        if use_bias:
            add(s.width)

    for kind in s.pattern:
        for _ in range(4 if s.norm_placement == "both" else 2):
            add_norm(s.width)
        for heads in (s.num_heads, s.num_kv_heads, s.num_kv_heads):
            add(s.width, heads, s.head_width, names=("embed", "heads", None))
            if s.use_qkv_bias:
                add(heads, s.head_width, names=("heads", None))
        add(s.num_heads, s.head_width, s.width, names=("heads", None, "embed"))
        if s.use_bias:
            add(s.width)
        for heads in (s.num_heads, s.num_kv_heads) if s.qk_norm else ():
            if s.qk_norm == "head":
                add_norm(s.head_width)
            else:
                add_norm(heads, s.head_width, names=("heads", None))
        if kind != "moe":
            add_feed_forward(s.feed_forward_width, s.use_bias)
            continue
        add(s.width, s.num_experts, names=("embed", None))
        add(s.num_experts)
        into = (s.num_experts, s.width, s.expert_width)
        for _ in range(2 if s.gated else 1):
            add(*into, names=("experts", "expert_embed", "feed_forward"), kind="expert")
        add(s.num_experts, s.expert_width, s.width, names=("experts", "feed_forward", "expert_embed"), kind="expert")
        if s.num_shared_experts:
            add_feed_forward(s.num_shared_experts * s.expert_width, use_bias=False)
    add_norm(s.width, layers=0)
    add(s.vocab_size, s.width, names=("vocab", "table_embed"), kind="table", layers=0)
    if s.position == "learned":
        add(s.max_length, s.width, names=(None, "table_embed"), kind="table", layers=0)
    if not s.tie_embeddings:
        add(s.width, s.vocab_size, names=("table_embed", "vocab"), kind="table", layers=0)
    return tuple(found)


@functools.cache
def stored_elements(shape: Shape, sizes: Sizes) -> int:
    """Parameters that a device holds."""
    return sum(array.local(sizes) for array in arrays(shape))


@functools.cache
def gathered(shape: Shape, sizes: Sizes, kind: str) -> int:
    """Elements of one repetition of the pattern, gathered as its layers use them."""
    return sum(_gathered(shape, sizes, kind))


@functools.cache
def largest_gathered(shape: Shape, sizes: Sizes) -> int:
    """Elements of the largest of them but for experts."""
    return max(_gathered(shape, sizes, "dense"))


def _gathered(shape: Shape, sizes: Sizes, kind: str) -> list[int]:
    """Elements of each array of that kind in one repetition of the pattern."""
    found = [array for array in arrays(shape) if array.layers and array.kind == kind and array.is_weight]
    layers = shape.num_layers // len(shape.pattern) // shards(sizes, "layers")
    return [array.local(sizes, "embed", "expert_embed") // layers for array in found]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a device by what fills them."""

    parameters: int
    moments: int
    average: int  # of the parameters
    batch: int
    gradients: int
    activations: int  # kept from the forward pass for the backward pass
    layer: int  # of the layers in work: gathered weights, their gradients, what is computed again
    head: int  # gradient of the whole head, before it is shared out
    loss: int  # gathered head, logits of one chunk

    @property
    def state(self) -> int:
        """What is there between updates."""
        return self.parameters + self.moments + self.average

    @property
    def peak(self) -> int:
        """The loss is over, and the gradient of the head shared out, before the backward pass through the layers
        begins to fill the gradients (see kernels.cross_entropy)."""
        during = max(self.loss + self.head, self.gradients + self.layer)
        return self.state + self.batch + self.activations + during


@dataclasses.dataclass(frozen=True)
class Local:
    """How much of the work of one microbatch a device has."""

    passes: int  # microbatches, one after the other
    layers: int  # of each place of the pattern
    tokens: int  # within layers
    between: int  # tokens between layers
    rows: int


def local_work(job: Job, sizes: Sizes) -> Local:
    rows = job.batch_size // job.microbatches // shards(sizes, "batch")
    return Local(
        passes=job.microbatches,
        layers=job.shape.num_layers // len(job.shape.pattern) // shards(sizes, "layers"),
        tokens=rows * job.sequence_length // shards(sizes, "length"),
        between=rows * job.sequence_length // shards(sizes, "sequence"),
        rows=rows,
    )


def remat_in_effect(job: Job, sizes: Sizes) -> str:
    return "gathers" if job.remat == "none" and shards(sizes, "embed", "sequence") > 1 else job.remat


def attention_in_effect(job: Job, sizes: Sizes, topology: Topology | None) -> str:
    platform = "cpu" if topology is None else "tpu" if topology.chip.torus else "gpu"
    implementation, _ = choose_implementation(
        "auto",
        platform,
        length=job.sequence_length,
        length_shards=shards(sizes, "length"),
        head_width=job.shape.head_width,
        dtype=jnp.bfloat16,
        soft_cap=job.shape.attention_soft_cap,
    )
    return implementation


def memory(job: Job, sizes: Sizes, topology: Topology | None) -> Memory:
    s, work = job.shape, local_work(job, sizes)
    stored = stored_elements(s, sizes)
    stages = shards(sizes, "layers")
    accumulated = 2 if job.microbatches > 1 and stages == 1 else 1
    kept = _kept(job, sizes, work, remat_in_effect(job, sizes), topology)
    if stages == 1:
        activations = kept * work.layers
    else:  # only inputs of chunks; what is within one is computed again, for one microbatch at a time
        inputs = job.rounds * job.microbatches + stages - 1 + 3 * job.microbatches // stages
        activations = inputs * HALF * s.width * work.between + kept * work.layers // job.rounds
    return Memory(
        parameters=SINGLE * stored,
        moments=moments(job, sizes),
        average=SINGLE * stored if job.ema else 0,
        batch=3 * SINGLE * (job.batch_size // shards(sizes, "batch")) * (job.sequence_length + 1),
        gradients=accumulated * SINGLE * stored,
        activations=int(activations),
        layer=_layer_workspace(job, sizes, work, topology),
        head=SINGLE * s.width * s.vocab_size // shards(sizes, "vocab"),
        loss=_loss_workspace(job, sizes, work),
    )


def moments(job: Job, sizes: Sizes) -> int:
    """Bytes that the optimizer keeps. Adafactor: of what has two dimensions of 32 or more a row and a column, which are
    not sharded, and all of the rest (see training.optimizer)."""
    elements = 0
    if job.optimizer in MOMENTS:
        of_matrix, of_other = MOMENTS[job.optimizer]
        for array in arrays(job.shape):
            elements += (of_matrix if array.is_matrix else of_other) * array.local(sizes)
        return job.moment_bytes * elements
    for array in arrays(job.shape):
        *_, second, largest = sorted((1, array.layers or 1, *array.dims))
        elements += array.size // largest + array.size // second if second >= 32 else array.local(sizes)
    return SINGLE * elements


def _kept(job: Job, sizes: Sizes, work: Local, remat: str, topology: Topology | None) -> int:
    """Bytes that a repetition of the pattern leaves for its backward pass: see model.transformer.REMATS."""
    s, t = job.shape, shards(sizes, "heads")
    kernel = attention_in_effect(job, sizes, topology)
    # The forward pass of cuDNN's kernel runs once more instead.
    log_sums = 0 if kernel == "cudnn" else _scores(job, sizes, kernel)
    between, within = HALF * s.width, 0.0  # the input, which the scan keeps
    if remat == "full":
        return int(between * work.between)
    for place, kind in enumerate(s.pattern):
        matrices = 2 if s.gated else 1
        inner = s.feed_forward_width if kind != "moe" else s.num_shared_experts * s.expert_width
        heads = (s.num_heads + 2 * s.num_kv_heads) * s.head_width
        if remat in KEEPING:
            kept = {"dots": matrices, "gate": 1, "feed_forward": 0}[remat]
            within += HALF * (heads + kept * inner) / t
            if kernel != "reference":
                within += HALF * s.num_heads * _head_width(s, kernel) / t + log_sums
            between += HALF * s.width * (1 if place == len(s.pattern) - 1 else 2)
            if kind == "moe" and remat == "dots":
                within += SINGLE * s.num_experts
            continue
        # Norms: the input and two products in float32, the result in bfloat16.
        norm = 3 * SINGLE + HALF
        between += 2 * norm * s.width
        if s.qk_norm:
            within += norm * (s.num_heads + s.num_kv_heads) * s.head_width / t
        within += HALF * (heads + s.num_heads * s.head_width) / t
        within += log_sums + 4 * SINGLE * s.head_width / 2 * (s.position == "rope")
        # Gated: gate, up, three within the SiLU and their product.
        within += HALF * (6 if s.gated else 4) * inner / t
        if kind == "moe":
            within += 3 * SINGLE * (s.num_experts + s.experts_per_token)
    weights = sum(a.local(sizes) for a in arrays(s) if a.layers and a.is_weight) // work.layers
    return int(between * work.between + within * work.tokens) + HALF * weights


def _scores(job: Job, sizes: Sizes, kernel: str) -> float:
    """Bytes a token, for the backward pass of attention: the logarithm of its sum, or all scores. cuDNN's kernel has
    room for a sum in each document that a row may have."""
    heads = job.shape.num_heads / shards(sizes, "heads")
    if kernel != "reference":
        return SINGLE * heads * (max_documents(job.sequence_length) if kernel == "cudnn" else 1)
    return (2 * SINGLE + HALF + 1) * heads * job.sequence_length  # before and after the softmax, rounded, the mask


def _head_width(shape: Shape, kernel: str) -> int:
    """Of the kernel's arrays: splash attention pads them."""
    return -(-shape.head_width // LANES) * LANES if kernel == "splash" else shape.head_width


def _layer_workspace(job: Job, sizes: Sizes, work: Local, topology: Topology | None) -> int:
    """The backward pass of one repetition of the pattern: its gathered weights, the gradient of one of them before and
    after its reduction, what was not kept, and of one layer the gradients of its activations."""
    s, t = job.shape, shards(sizes, "heads")
    kernel = attention_in_effect(job, sizes, topology)
    head_width = _head_width(s, kernel)
    # The gradients of experts are there as a whole, once more for the chunk in work.
    weights = gathered(s, sizes, "dense") + 2 * largest_gathered(s, sizes) + 3 * gathered(s, sizes, "expert")
    remat, again, gradients = remat_in_effect(job, sizes), 0.0, []
    for kind in s.pattern:
        inner = s.feed_forward_width if kind != "moe" else s.num_shared_experts * s.expert_width
        result = HALF * s.num_heads * head_width / t * work.tokens
        attention = 2 * result + HALF * 2 * s.num_kv_heads * head_width / t * work.tokens
        attention += _scores(job, sizes, kernel) * work.tokens
        hidden = HALF * inner / t * work.tokens
        projected = (2 if s.gated else 1) * hidden
        if remat == "full":
            again += attention + projected
        elif remat in KEEPING:  # what products made has been kept, and what is made of it has not
            again += result + {"dots": hidden, "gate": projected, "feed_forward": hidden + projected}[remat]
        if remat == "full" or remat in KEEPING:
            whole = 2 * HALF * s.width * work.tokens if t > 1 else 0  # inputs of both, gathered over the sequence
            again += HALF * 2 * s.width * work.between + whole
        routed = _experts_workspace(job, sizes, work) if kind == "moe" else 0
        gradients.append(HALF * 2 * s.width * work.tokens + max(attention, projected + routed))
    return int(HALF * weights + again + max(gradients))


def _experts_workspace(job: Job, sizes: Sizes, work: Local) -> float:
    """Backward: tokens of all that share the experts, the gradients of their results and their own; of one chunk of
    pairs its rows and what is projected, with gradients; logits and probabilities of the router with their gradient."""
    s, t = job.shape, shards(sizes, "feed_forward")
    exchanged = 3 * HALF * s.width * work.tokens * shards(sizes, "experts")
    pairs = CHUNK_SHARES * work.tokens * s.experts_per_token
    projected = 2 * (2 if s.gated else 1) * s.expert_width / t
    router = 3 * SINGLE * work.tokens * s.num_experts
    return exchanged + pairs * HALF * (2 * s.width + projected) + router


def _loss_workspace(job: Job, sizes: Sizes, work: Local) -> int:
    """The gathered head, of tied embeddings also transposed; the hidden states and their gradient, whole and in chunks;
    of one chunk the logits, whose gradient is computed within the products that use it."""
    s = job.shape
    columns = s.vocab_size // shards(sizes, "vocab")
    stages = shards(sizes, "microbatches")  # of a pipeline, whose microbatches all come to the loss
    tokens = work.tokens * job.microbatches // stages if stages > 1 else work.tokens
    chunk = min(job.loss_chunk or max(1, LOGITS_BYTES // (SINGLE * columns)), tokens)
    head = HALF * (2 if s.tie_embeddings else 1) * s.width * columns
    return head + 4 * HALF * s.width * tokens + SINGLE * columns * chunk
