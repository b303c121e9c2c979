"""Which mesh: those that can be, and of these the one whose update is predicted to be fastest."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax

from llm_jax.config import REMATS, Config, Parallel, UserError
from llm_jax.kernels.splash_attention import LANES
from llm_jax.parallel.chips import Chip
from llm_jax.parallel.sharding import AXES, Rules, mesh_sizes, require_balanced, require_divisible
from llm_jax.plan.costs import Estimate, estimate
from llm_jax.plan.memory import Job, Sizes, make_job, memory, shards
from llm_jax.plan.topology import Topology


def dimensions(job: Job) -> dict[str, tuple[int, str]]:
    """{field: (value, logical dimension)}: what must divide by its shards, as the run itself asks for it."""
    s = job.shape
    rows = "train.batch_size / train.microbatches" if job.microbatches > 1 else "train.batch_size"
    found = {
        rows: (job.batch_size // job.microbatches, "batch"),
        "train.sequence_length": (job.sequence_length, "sequence"),
        "model.width": (s.width, "table_embed"),
        "model.num_heads": (s.num_heads, "heads"),
        "model.num_kv_heads": (s.num_kv_heads, "heads"),
        "model.feed_forward_width": (s.feed_forward_width, "feed_forward"),
        "tokenizer.vocab_size": (s.vocab_size, "vocab"),
    }
    if s.num_experts:
        found["model.num_experts"] = (s.num_experts, "experts")
        found["model.expert_width"] = (s.expert_width, "feed_forward")
    return found


def resolve(job: Job, parallel: Parallel, topology: Topology) -> Sizes:
    """The sizes of the mesh axes on this machine. Raises UserError if the mesh cannot be."""
    sizes = Sizes(**mesh_sizes(parallel, topology.num_devices, topology.slices))
    mesh = jax.sharding.AbstractMesh(tuple(sizes), AXES)
    require_divisible(mesh, Rules(), dimensions(job))
    require_balanced(mesh, Rules(), job.sequence_length)
    return sizes


def possible(job: Job, sizes: Sizes) -> bool:
    """What resolve and config.validate ask for, as yes or no."""
    s, stages, lengths = job.shape, shards(sizes, "layers"), shards(sizes, "length")
    return (
        all(value % shards(sizes, name) == 0 for value, name in dimensions(job).values())
        and (lengths == 1 or job.sequence_length % (2 * lengths) == 0)
        and (s.num_experts > 0 or shards(sizes, "experts") == 1)
        and s.num_layers // len(s.pattern) % (stages * job.rounds) == 0
        and (stages == 1 or job.microbatches % stages == 0)
        and (stages > 1 or job.rounds == 1)
        and (stages == 1 or job.microbatches > 1)
    )


def meshes(job: Job, num_devices: int, slices: int = 1) -> Iterator[Sizes]:
    """All meshes over so many devices in which no axis is larger than what it cuts."""
    s = job.shape
    most = {
        "replica": job.batch_size,
        "stage": s.num_layers // len(s.pattern),
        "fsdp": job.batch_size,
        "expert": max(1, s.num_experts),
        "context": max(1, job.sequence_length // LANES),
        "tensor": s.num_kv_heads,
    }

    def split(axes: tuple[str, ...], left: int) -> Iterator[tuple[int, ...]]:
        if len(axes) == 1:
            if left <= most[axes[0]]:
                yield (left,)
            return
        for size in _divisors(left):
            if size <= most[axes[0]]:
                for rest in split(axes[1:], left // size):
                    yield size, *rest

    for found in split(AXES, num_devices):
        sizes = Sizes(*found)
        if sizes.replica % slices == 0 or sizes.stage % slices == 0:
            yield sizes


def search(job: Job, topology: Topology, *, count: int = 10) -> list[Estimate]:
    """The fastest meshes, the fastest first, each with the best remat policy and microbatches that fit.

    Microbatches of a mesh without stages are the fewest that fit: more of them only gather weights more often.
    """
    job, found = dataclasses.replace(job, rounds=1), []
    for sizes in meshes(job, topology.num_devices, topology.slices):
        if not possible(dataclasses.replace(job, microbatches=sizes.stage), sizes):
            continue
        rows = job.batch_size // shards(sizes, "batch")
        variants = []
        for remat in REMATS:
            ways = (
                dataclasses.replace(job, remat=remat, microbatches=n) for n in _divisors(rows) if n % sizes.stage == 0
            )
            fitting = (way for way in ways if _fits(way, sizes, topology))
            fewest = itertools.islice(fitting, 1 if sizes.stage == 1 else None)
            variants += [estimate(way, topology, sizes) for way in fewest]
        if variants:
            found.append(min(variants, key=_rank))
    return sorted(found, key=_rank)[:count]


def ways_to_fit(found: Estimate) -> dict[str, Estimate]:
    """{flag: what it leads to}: the smallest changes, each by itself, after which a job that does not fit does."""
    job, topology, sizes = found.job, found.topology, found.sizes
    ways = {}

    def first(variants: Iterator[tuple[str, Job, Topology, Sizes]]) -> None:
        for flags, job, topology, sizes in variants:
            if possible(job, sizes) and _fits(job, sizes, topology):
                ways[flags] = estimate(job, topology, sizes)
                return

    remats = REMATS[REMATS.index(job.remat) + 1 :]
    more = [n for n in _divisors(job.batch_size) if n > job.microbatches]
    chip, chips = topology.chip, math.prod(topology.shape)
    larger = [(compact(chip, chips * n), n) for n in (2, 4, 8, 16, 32, 64)]
    first((f"--config.model.remat={r}", dataclasses.replace(job, remat=r), topology, sizes) for r in remats)
    first((f"--config.train.microbatches={n}", dataclasses.replace(job, microbatches=n), topology, sizes) for n in more)
    first(
        (f"--topology={t.name.split()[0]}", job, t, sizes._replace(fsdp=sizes.fsdp * n))
        for t, n in ((dataclasses.replace(topology, shape=shape), n) for shape, n in larger if chip.fits(shape))
    )
    if not ways:
        first(
            (f"--config.model.remat=full --config.train.microbatches={n}", job, topology, sizes)
            for n, job in ((n, dataclasses.replace(job, remat="full", microbatches=n)) for n in more)
        )
    return ways


def choose(
    config: Config, num_devices: int, chip: Chip | None, slices: int = 1, vocab_size: int | None = None
) -> tuple[Parallel, str]:
    """(the mesh for config.parallel.auto, why this one). Of the chip None nothing is known, as of a CPU: all devices
    then share parameters and batch, as far as the batch divides. Raises UserError if no mesh can be."""
    job = make_job(config, vocab_size)
    candidates = [sizes for sizes in meshes(job, num_devices, slices) if possible(job, sizes)]
    if not candidates:
        step = num_devices * job.microbatches
        raise UserError(
            f"parallel.auto: no mesh over {num_devices} devices divides train.batch_size={job.batch_size} in "
            f"train.microbatches={job.microbatches}, and the model; try train.batch_size="
            f"{max(1, round(job.batch_size / step)) * step}"
        )
    if chip is None:
        sizes = min(candidates, key=_simplest)
        return _parallel(config, sizes), f"{mesh_name(sizes)}: parameters and batch sharded as far as the batch divides"
    topology = Topology(chip=chip, shape=compact(chip, max(1, num_devices // chip.devices // slices)), slices=slices)
    fitting = [sizes for sizes in candidates if _fits(job, sizes, topology)]
    if not fitting:
        sizes = min(candidates, key=lambda sizes: (memory(job, sizes, topology).peak, _simplest(sizes)))
        needed = memory(job, sizes, topology).peak / 2**30
        why = f"needs least memory, {needed:.1f} GiB, and is not expected to fit"
    else:
        best = min((estimate(job, topology, sizes) for sizes in fitting), key=_rank)
        sizes = best.sizes
        why = f"fastest of {len(fitting)} that fit by the planner's formulas, {best.times.step:.3g} s a step"
    return _parallel(config, sizes), f"{mesh_name(sizes)}: {why}"


def mesh_name(sizes: Sizes) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes._asdict().items() if size > 1) or "one device"


def compact(chip: Chip, chips: int) -> tuple[int, ...]:
    """The slice of so many chips whose sides are most alike; (chips,) if there is none."""
    if not chip.torus:
        return (chips,)
    sides = itertools.combinations_with_replacement(_divisors(chips), chip.torus)
    shapes = {shape for side in sides for shape in itertools.permutations(side) if math.prod(shape) == chips}
    return min(filter(chip.fits, shapes), key=lambda shape: (max(shape), shape), default=(chips,))


def _fits(job: Job, sizes: Sizes, topology: Topology) -> bool:
    return memory(job, sizes, topology).peak <= topology.chip.hbm / topology.chip.devices


def _simplest(sizes: Sizes) -> tuple[int, ...]:
    """Smallest of the meshes with the fewest axes, and those in the order in which they cost."""
    return (sizes.stage, sizes.tensor, sizes.context, sizes.expert, sizes.replica)


def _rank(found: Estimate) -> tuple:
    """Of what is predicted equally fast, to a hundredth, the plainest."""
    return (
        round(100 * math.log(found.times.between)),
        *_simplest(found.sizes),
        REMATS.index(found.job.remat),
        found.job.microbatches,
    )


def _parallel(config: Config, sizes: Sizes) -> Parallel:
    return dataclasses.replace(config.parallel, auto=False, **sizes._asdict())


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
