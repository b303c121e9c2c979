"""The table of chips against what JAX calls them, what their makers sell, and itself."""

import math

import pytest

from llm_jax.parallel.chips import CHIPS, find, of_device_kind


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"), ("TPU7x", "v7x"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"),
    ],
)  # fmt: skip
def test_names_that_jax_gives(kind, name):
    assert of_device_kind(kind).name == name


def test_unknown_names():
    assert of_device_kind("cpu") is None and find("v9") is None
    assert find("tpu7x").name == find("Ironwood").name == "v7x"


def test_no_name_is_given_twice():
    names = [name for chip in CHIPS for name in (chip.name, *chip.aliases)]
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_figures_have_the_right_size(chip):
    """A slip of a unit or of a zero shows in these ratios."""
    assert 100 < chip.flops / chip.hbm_bandwidth < 600  # FLOPs a byte at which memory and products balance
    assert 10e9 < chip.hbm < 300e9
    assert 3 < chip.hbm_bandwidth / chip.link < 100
    assert 3 < chip.link / chip.dcn < 20
    assert 0.5 < chip.product < 1 and chip.sources


@pytest.mark.parametrize(
    "name, shape, fits, wraps",
    [
        ("v5e", (4, 4), True, (False, False)),
        ("v5e", (8, 16), True, (False, True)),
        ("v6e", (16, 16), True, (True, True)),
        ("v6e", (16, 32), False, None),
        ("v5e", (4, 2), False, None),
        ("v5p", (2, 2, 4), True, (False, False, False)),
        ("v5p", (4, 4, 8), True, (True, True, True)),
        ("v5p", (4, 4, 6), False, None),
        ("v5p", (8, 4, 4), False, None),
        ("v5p", (16, 16, 24), True, (True, True, True)),
        ("v5p", (16, 20, 28), False, None),
        ("v7x", (16, 24, 24), True, (True, True, True)),
        ("v4", (16, 16, 16), True, (True, True, True)),
        ("h100", (4,), True, (False,)),
        ("h100", (64,), True, (False,)),
        ("h100", (12,), False, None),
    ],
)
def test_slices_that_exist(name, shape, fits, wraps):
    chip = find(name)
    assert chip.fits(shape) == fits
    assert not fits or chip.wraps(shape) == wraps


def test_published_totals_of_the_links():
    """Google's figures are of all links of a chip, both ways; the scaling book's are a tenth below but for v7x."""
    for name, total in (("v7x", 1200e9), ("v5e", 400e9), ("v5p", 1200e9), ("v6e", 800e9)):
        chip = find(name)
        assert chip.link * 2 * 2 * chip.torus == pytest.approx(total, rel=0.11)
        assert math.log2(chip.host) == 2
