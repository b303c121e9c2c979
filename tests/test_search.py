"""The meshes that the planner offers: just those that a run takes, and of them the fastest that fits."""

import dataclasses
import math
import pathlib

import pytest

from llm_jax import config
from llm_jax.config import Parallel, UserError
from llm_jax.flags import load_config_file
from llm_jax.jobs.setup import Program
from llm_jax.parallel.chips import find
from llm_jax.plan.costs import estimate
from llm_jax.plan.memory import Sizes, make_job
from llm_jax.plan.search import choose, compact, meshes, possible, resolve, search, ways_to_fit
from llm_jax.plan.topology import parse

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
MOE = config.Model(num_layers=4, width=64, num_heads=8, num_kv_heads=2, pattern=("dense", "moe"), num_experts=4)
LLAMA = config.Model(num_layers=4, width=48, num_heads=4, num_kv_heads=2, head_width=8)


def given(model: config.Model, **train) -> config.Config:
    options = {"batch_size": 8, "sequence_length": 512} | train
    return config.Config(model=model, tokenizer=config.Tokenizer(vocab_size=512), train=config.Train(**options))


def large(name: str = "llama_8b") -> config.Config:
    return load_config_file(str(CONFIGS / f"{name}.py"))


def is_accepted(conf: config.Config) -> bool:
    try:
        config.validate(conf)
        Program(conf, conf.tokenizer.vocab_size)
    except UserError:
        return False
    return True


def factors(number: int, count: int):
    """All ways to write a number as a product of so many."""
    if count == 1:
        return [(number,)]
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return [(n, *rest) for n in divisors for rest in factors(number // n, count - 1)]


@pytest.mark.parametrize(
    "model, train", [(LLAMA, {}), (MOE, {}), (LLAMA, {"microbatches": 2}), (MOE, {"sequence_length": 96})]
)
def test_just_the_meshes_that_a_run_takes(model, train):
    conf = given(model, **train)
    job = make_job(conf)
    every = [Sizes(*sizes) for sizes in factors(8, 6)]
    accepted = {
        sizes for sizes in every if is_accepted(dataclasses.replace(conf, parallel=Parallel(**sizes._asdict())))
    }
    assert {sizes for sizes in every if possible(job, sizes)} == accepted and len(accepted) > 4
    listed = {sizes for sizes in meshes(job, 8) if possible(job, sizes)}
    assert (
        listed <= accepted
        and {sizes for sizes in accepted if sizes.context <= max(1, job.sequence_length // 128)} - listed == set()
    )


def test_one_billion_on_sixteen_small_chips_needs_fsdp_only():
    found = search(make_job(large("llama_1b")), parse("v5e:4x4"))
    assert found[0].sizes == Sizes(fsdp=16)
    steps = [other.times.between for other in found]
    assert all(a <= 1.02 * b for a, b in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize("name, topology, slices", [("llama_8b", "v5e:8x8", 1), ("llama_70b", "v5p:4x4x8", 2)])
def test_what_is_found_fits_and_is_possible(name, topology, slices):
    machine, conf = parse(topology, slices), large(name)
    found = search(make_job(conf), machine, count=1000)
    assert found
    for other in found:
        assert other.fits and other.memory.peak <= other.available and possible(other.job, other.sizes)
        assert math.prod(other.sizes) == machine.num_devices
        assert slices == 1 or other.sizes.replica % slices == 0 or other.sizes.stage % slices == 0
    assert len({other.sizes for other in found}) == len(found)


def test_nothing_fits():
    assert search(make_job(large("llama_70b")), parse("v5e:2x2")) == []


@pytest.mark.parametrize(
    "remat, topology, way",
    [
        ("none", "v5e:8x8", "--config.model.remat=full"),
        ("full", "v5e:4x8", "--config.train.microbatches=2"),
        ("full", "v5e:2x4", "--topology=v5e:8x8"),
    ],
)
def test_ways_to_fit_do(remat, topology, way):
    job, machine = dataclasses.replace(make_job(large()), remat=remat), parse(topology)
    found = estimate(job, machine, Sizes(fsdp=machine.num_devices))
    ways = ways_to_fit(found)
    assert not found.fits and way in ways
    assert all(other.fits for other in ways.values())


@pytest.mark.parametrize(
    "parallel, message",
    [
        (Parallel(fsdp=3), "parallel.fsdp=64"),
        (Parallel(tensor=3), "nearest mesh that fits"),
        (Parallel(tensor=16), "model.num_kv_heads=8"),
        (Parallel(fsdp=1, context=64), "train.sequence_length=96"),
    ],
)
def test_meshes_that_cannot_be(parallel, message):
    conf = large()
    if parallel.context > 1:
        conf.train.sequence_length = 96
    with pytest.raises(UserError, match=message):
        resolve(make_job(conf), parallel, parse("v5p:4x4x4"))


def test_slices_need_an_axis_of_their_own():
    with pytest.raises(UserError, match="try parallel.replica=2"):
        resolve(make_job(large()), Parallel(), parse("v5p:4x4x4", 2))


def test_choose_for_chips():
    parallel, why = choose(large("llama_1b"), 16, find("v5e"))
    assert (parallel.fsdp, parallel.tensor, parallel.context, parallel.auto) == (16, 1, 1, False)
    assert "fsdp=16" in why
    parallel, _ = choose(large("llama_1b"), 32, find("v5e"), slices=2)
    assert parallel.replica % 2 == 0


def test_choose_more_chips_than_rows():
    """128 sequences on 256 chips: two chips share each, by an axis that the batch is not over."""
    parallel, _ = choose(large(), 256, find("v6e"))
    assert parallel.replica * (parallel.fsdp or 0) * parallel.expert <= 128
    assert parallel.context * parallel.tensor * parallel.stage >= 2


@pytest.mark.parametrize("devices, fsdp, others", [(1, 1, 1), (4, 4, 1), (8, 8, 1), (16, 8, 2)])
def test_choose_for_what_is_not_known(devices, fsdp, others):
    parallel, why = choose(given(LLAMA), devices, None)
    assert parallel.fsdp == fsdp and parallel.context * parallel.tensor == others and why


def test_choose_nothing():
    with pytest.raises(UserError, match="try train.batch_size=9"):
        choose(given(LLAMA), 3, None)


def test_choose_the_least_memory_where_none_fits():
    parallel, why = choose(large("llama_70b"), 4, find("v5e"))
    assert "not expected to fit" in why and (parallel.fsdp or 0) * parallel.tensor * parallel.context == 4


def test_compact_slices():
    assert compact(find("v5p"), 64) == (4, 4, 4) and compact(find("v5p"), 128) == (4, 4, 8)
    assert compact(find("v5e"), 32) == (4, 8) and compact(find("h100"), 24) == (24,)
    assert compact(find("v5p"), 3) == (3,)
