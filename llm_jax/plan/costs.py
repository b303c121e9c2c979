"""How long an update takes on hardware that need not be there: rooflines of products, memory and exchanges.

docs/planning.md states the formulas with their sources, and what is assumed. FLOPs, bytes and seconds are those of one
JAX device and one update.

D width, N heads, K key/value heads, H head width, F feed-forward width, V vocabulary
"""

import dataclasses

from llm_jax.kernels.splash_attention import LANES
from llm_jax.measure.flops import flops_per_token, mean_keys
from llm_jax.model.transformer import Shape
from llm_jax.parallel.pipeline import bubble_fraction
from llm_jax.plan.memory import (
    HALF,
    KEEPING,
    RULES,
    SINGLE,
    Job,
    Memory,
    Sizes,
    arrays,
    attention_in_effect,
    gathered,
    local_work,
    memory,
    moments,
    remat_in_effect,
    shards,
    stored_elements,
)
from llm_jax.plan.network import Network, network
from llm_jax.plan.topology import Topology

# The share of the peak that an attention kernel reaches: between its two products stands the softmax.
ATTENTION = 0.6


def parameter_count(shape: Shape) -> int:
    return sum(array.size for array in arrays(shape))


def active_count(shape: Shape) -> int:
    """Parameters that one token meets: of the routed experts only those it goes to."""
    total, routed = 0, 0
    for array in arrays(shape):
        if array.kind == "expert":
            routed += array.size
        else:
            total += array.size
    return total + routed * shape.experts_per_token // max(1, shape.num_experts)


def model_flops(shape: Shape, sequence_length: int, *, causal: bool) -> float:
    """Of training, per token; see measure.flops."""
    return flops_per_token(
        num_layers=shape.num_layers, width=shape.width, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
        head_width=shape.head_width, feed_forward_width=shape.feed_forward_width, gated=shape.gated,
        vocab_size=shape.vocab_size, sequence_length=sequence_length, causal=causal,
        num_moe_layers=shape.num_layers // len(shape.pattern) * shape.pattern.count("moe"),
        num_experts=shape.num_experts, experts_per_token=shape.experts_per_token,
        num_shared_experts=shape.num_shared_experts, expert_width=shape.expert_width,
        windows=tuple(map(shape.window_of, shape.pattern)),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """What devices along some mesh axes send each other, in one update."""

    axes: tuple[str, ...]
    what: str
    bytes: float  # of the larger side: of what is gathered, or of what is reduced
    seconds: float
    over: str  # ici | nvlink | dcn
    hidden: bool  # assumed to run while the layers compute


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of an update, by what is waited for."""

    products: float  # matrix products of the layers and of the head
    attention: float
    elementwise: float  # norms, residual sums, activation functions: bound by the memory's bandwidth
    optimizer: float  # bound by it, too
    exchanges: tuple[Exchange, ...]
    bubble: float  # in which a stage of the pipeline has no work
    ideal: float  # model FLOPs at the published peak
    hbm: float  # all traffic of the memory: a bound of its own

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.elementwise

    def room(self, exchange: Exchange) -> float:
        """Seconds in which it may hide: while the layers compute; gradients, while the backward pass does, two thirds
        of that."""
        return self.compute * (2 / 3 if exchange.what.startswith("gradients") else 1)

    def bound(self, exchange: Exchange) -> bool:
        """Whether it takes longer than all the computing it could run beside."""
        return exchange.seconds > self.room(exchange)

    @property
    def exposed(self) -> float:
        """What of the exchanges is waited for; those of one network that are hidden share the time to hide in."""
        waited = sum(e.seconds for e in self.exchanges if not e.hidden)
        excess = [0.0]
        for over in OVER:
            hidden = [e for e in self.exchanges if e.hidden and e.over == over]
            if hidden:
                excess.append(sum(e.seconds for e in hidden) - max(map(self.room, hidden)))
        return waited + max(excess)

    @property
    def step(self) -> float:
        return self.compute + self.bubble + self.optimizer + self.exposed

    @property
    def unhidden(self) -> float:
        """The same if no exchange were hidden: what a bad schedule costs at most."""
        return self.compute + self.bubble + self.optimizer + sum(e.seconds for e in self.exchanges)

    @property
    def between(self) -> float:
        """In the middle of the two: by this meshes are ranked, so that a guess about overlap decides nothing alone."""
        return (self.step + self.unhidden) / 2


OVER = ("ici", "nvlink", "dcn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a job on a mesh over a machine."""

    job: Job
    topology: Topology
    sizes: Sizes
    memory: Memory
    times: Times

    @property
    def available(self) -> float:
        return self.topology.chip.hbm / self.topology.chip.devices

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.available

    @property
    def tokens_per_second(self) -> float:
        return self.job.tokens / self.times.step

    @property
    def limit(self) -> str:
        """What keeps the update from the model's FLOPs at the peak, most."""
        t = self.times
        useful = t.ideal / self.topology.chip.product
        losses = {
            "recomputation and attention": t.products + t.attention - useful,
            "memory bandwidth": t.elementwise + t.optimizer,
            "exchanges": t.exposed,
            "pipeline bubble": t.bubble,
        }
        worst = max(losses, key=lambda name: losses[name])
        return f"{losses[worst] / t.step:.0%} of it {worst}"

    def mfu(self, *, causal: bool) -> float:
        flops = model_flops(self.job.shape, self.job.sequence_length, causal=causal) * self.job.tokens
        return flops / self.times.step / (self.topology.chip.flops * self.topology.num_chips)


def estimate(job: Job, topology: Topology, sizes: Sizes) -> Estimate:
    return Estimate(
        job=job,
        topology=topology,
        sizes=sizes,
        memory=memory(job, sizes, topology),
        times=times(job, topology, sizes),
    )


def times(job: Job, topology: Topology, sizes: Sizes) -> Times:
    s, chip, work = job.shape, topology.chip, local_work(job, sizes)
    remat, kernel = remat_in_effect(job, sizes), attention_in_effect(job, sizes, topology)
    stages = shards(sizes, "layers")
    peak, bandwidth = chip.flops / chip.devices, chip.hbm_bandwidth / chip.devices
    tokens = job.tokens / topology.num_devices  # whose products a device computes

    head = s.width * s.vocab_size
    block = (model_flops(s, 0, causal=True) / 6) - head  # weights that a token meets in the layers
    # Backward each product becomes two. Remat computes products again, but for the last, whose result nobody needs.
    up = _up(s)
    again = {"full": block - _last(s), "gate": s.gated * up, "feed_forward": (1 + s.gated) * up}.get(remat, 0)
    repeated = again + (block if stages > 1 else 0)
    product_flops = 2 * tokens * (3 * (block + head) + repeated)

    # Forward scores and weighted values; backward 4 products, and in the kernels 3 more: splash computes scores and
    # their gradients for queries and keys apart, cuDNN's scores again and its forward pass.
    by_blocks = kernel != "reference"
    windows = tuple(map(s.window_of, s.pattern))
    keys = 2 * mean_keys(job.sequence_length, windows) if by_blocks else job.sequence_length
    causal = 2 * s.num_layers * s.num_heads * s.head_width * keys  # both products of a token, forward
    forward, backward = (1, 3.5) if by_blocks else (2, 4)
    runs = 1 + (remat == "full" or (remat in KEEPING and not by_blocks)) + (stages > 1)
    attention_flops = tokens * causal * (forward * runs + backward)
    narrow = min(1, s.head_width / LANES) if kernel == "splash" else 1
    attention_rate = peak * (ATTENTION * narrow if by_blocks else chip.product)

    touched = _elementwise(job, kernel)
    passes = 3 + (remat == "full" or remat in KEEPING) + (stages > 1)
    elementwise = tokens * touched * passes / bandwidth
    weights = HALF * (gathered(s, sizes, "dense") + gathered(s, sizes, "expert")) * work.layers * work.passes
    operands = passes * (weights + tokens * HALF * _operands(s)) / bandwidth
    products = max(product_flops / (peak * chip.product), operands)
    attention = attention_flops / attention_rate

    stored = stored_elements(s, sizes)
    # Gradients are read for their norm and for the update, parameters for their norms, the update and the result.
    optimizer = SINGLE * stored * (2 + 3 + (2 if job.ema else 0)) + 2 * moments(job, sizes)
    if work.passes > 1 and stages == 1:
        optimizer += 3 * SINGLE * stored * work.passes
    optimizer /= bandwidth

    in_layers = products * (1 - 3 * head / (3 * (block + head) + repeated)) + attention + elementwise
    idle = bubble_fraction(stages, job.rounds, job.microbatches)
    return Times(
        products=products,
        attention=attention,
        elementwise=elementwise,
        optimizer=optimizer,
        exchanges=tuple(_exchanges(job, network(topology, sizes), sizes)),
        bubble=in_layers * idle / (1 - idle),
        ideal=model_flops(s, job.sequence_length, causal=True) * tokens / peak,
        hbm=operands + elementwise + optimizer,
    )


def _last(s: Shape) -> int:
    """Weights of the last product of all repetitions of the pattern."""
    return s.num_layers // len(s.pattern) * s.width * (s.feed_forward_width if s.pattern[-1] != "moe" else 0)


def _up(s: Shape) -> int:
    """Weights of w_up, and of w_gate where there is one, of all dense layers."""
    dense = sum(kind != "moe" for kind in s.pattern) * s.num_layers // len(s.pattern)
    return dense * s.width * s.feed_forward_width


def _elementwise(job: Job, kernel: str) -> float:
    """Bytes a token, forward, of what is not a product: each result written and read once. Norms and residual sums are
    4 and 6 elements of D a layer, the rotation of queries and keys 2, the gated activation 3 of F."""
    s = job.shape
    elements = 0.0
    for kind in s.pattern:
        inner = s.feed_forward_width if kind != "moe" else _met(s) * s.expert_width
        elements += 10 * s.width + 2 * (s.num_heads + s.num_kv_heads) * s.head_width + (3 if s.gated else 2) * inner
        if kind == "moe":  # rows copied to their experts and added back
            elements += 4 * s.experts_per_token * s.width
        if kernel == "reference":  # scores in float32: written, masked, and through the softmax
            elements += 8 * s.num_heads * job.sequence_length
    return HALF * elements * s.num_layers / len(s.pattern)


def _operands(s: Shape) -> float:
    """Elements a token that the products of all layers read and write, forward."""
    elements = 0.0
    for kind in s.pattern:
        inner = s.feed_forward_width if kind != "moe" else _met(s) * s.expert_width
        met = 1 if kind != "moe" else _met(s)
        elements += 2 * s.width + 2 * (s.num_heads + s.num_kv_heads) * s.head_width + 2 * met * s.width + 3 * inner
    return elements * s.num_layers / len(s.pattern)


def _met(s: Shape) -> int:
    return s.experts_per_token + s.num_shared_experts


def _exchanges(job: Job, network: Network, sizes: Sizes) -> list[Exchange]:
    s, work = job.shape, local_work(job, sizes)
    remat, stages = remat_in_effect(job, sizes), shards(sizes, "layers")
    layers = work.layers * len(s.pattern)
    # A stage without work computes, and sends, all the same.
    passes = work.passes / (1 - bubble_fraction(stages, job.rounds, job.microbatches))
    found = []

    def used(*names: str) -> tuple[str, ...]:
        return tuple(axis for name in names for axis in getattr(RULES, name) if getattr(sizes, axis) > 1)

    def add(axes: tuple[str, ...], what: str, size: float, times: float, hidden: bool = False) -> None:
        if axes and size:
            fast = "ici" if network.topology.chip.torus else "nvlink"
            found.append(
                Exchange(
                    axes=axes,
                    what=what,
                    bytes=size * times,
                    seconds=network.seconds(axes, size) * times,
                    over="dcn" if network.crosses(axes) else fast,
                    hidden=hidden,
                )
            )

    # Weights: gathered forward and backward (once more by a pipeline), gradients scattered, in bfloat16.
    times = (3 + (stages > 1)) * passes * work.layers
    add(used("embed"), "weights", HALF * gathered(s, sizes, "dense"), times, hidden=True)
    add(used("expert_embed"), "experts' weights", HALF * gathered(s, sizes, "expert"), times, hidden=True)
    copies = tuple(axis for axis in used("batch") if axis not in RULES.embed)
    for kind, name in (("dense", "embed"), ("expert", "expert_embed")):
        local = HALF * gathered(s, sizes, kind) / shards(sizes, name)
        add(copies, "gradients", local, 2 * passes * work.layers, hidden=True)

    # Embedding and head: gathered, their gradients scattered (in bfloat16: the compiler rounds before it sends).
    head = s.width * s.vocab_size // shards(sizes, "vocab")
    rounds = 1 if stages > 1 else work.passes
    add(used("table_embed"), "tables", HALF * head, rounds * 4)
    add(copies, "gradients of tables", HALF * head / shards(sizes, "table_embed"), 2 * rounds * 2)

    # Tensor parallelism: the sequence is gathered into each layer and scattered out of it, twice; backward the same;
    # remat gathers again, and if it keeps nothing scatters once more. Embedding and loss: three all-reduces.
    within = HALF * s.width * work.tokens
    count = 8 + 2 + (remat == "full") + (4 if stages > 1 else 0)
    add(used("heads"), "activations", within, count * layers * passes)
    add(used("vocab"), "embedding and loss", within, 6 * rounds)

    # Context parallelism: keys and values gathered forward and backward, their gradients scattered.
    keys = HALF * 2 * work.rows * job.sequence_length * s.num_kv_heads * s.head_width / shards(sizes, "heads")
    add(used("length"), "keys and values", keys, (3 + (stages > 1)) * layers * passes)

    # Expert parallelism: tokens gathered and results scattered; backward tokens again, and the gradients of both.
    exchanged = within * shards(sizes, "experts") if "moe" in s.pattern else 0.0
    places = s.pattern.count("moe")
    add(used("experts"), "tokens", exchanged, (5 + (stages > 1)) * places * work.layers * passes)

    if stages > 1:
        (axis,) = RULES.layers
        size = HALF * s.width * work.between
        # Each step of the pipeline sends activations on and turns the waiting room; forward, again, and backward.
        steps = 6 * (job.rounds * job.microbatches + stages - 1)
        fast = "ici" if network.topology.chip.torus else "nvlink"
        found.append(
            Exchange(
                axes=(axis,),
                what="activations",
                bytes=size * steps,
                seconds=network.hop(axis, size) * steps,
                over="dcn" if network.crosses((axis,)) else fast,
                hidden=False,
            )
        )
    return found
