import importlib.util

import pytest

from llm_jax.config import UserError
from llm_jax.plan import topology
from llm_jax.plan.topology import parse

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize(
    "text, slices, chip, chips, hosts, devices, wraps",
    [
        ("v5e:4x4", 1, "v5e", 16, 4, 16, (False, False)),
        ("v5litepod:16x16", 2, "v5e", 512, 128, 512, (True, True)),
        ("v6e:8x16", 1, "v6e", 128, 32, 128, (False, True)),
        ("V5P:4x4x8", 1, "v5p", 128, 32, 128, (True, True, True)),
        ("v4:2x2x4", 3, "v4", 48, 12, 48, (False, False, False)),
        ("tpu7x:4x4x4", 1, "v7x", 64, 16, 128, (True, True, True)),
        ("v5e:1x1", 1, "v5e", 1, 1, 1, (False, False)),
        ("h100:64", 1, "h100", 64, 8, 64, (False,)),
        ("h200:4", 1, "h200", 4, 1, 4, (False,)),
    ],
)
def test_what_a_name_means(text, slices, chip, chips, hosts, devices, wraps):
    found = parse(text, slices)
    assert (found.chip.name, found.num_chips, found.num_hosts, found.num_devices) == (chip, chips, hosts, devices)
    assert found.wraps == wraps
    assert parse(found.name.split()[0], slices) == found


@pytest.mark.parametrize(
    "text, rule",
    [
        ("v5p", "must be CHIP:SHAPE, such as v5e:4x4"),
        ("v5p:4x4xfour", "must be CHIP:SHAPE"),
        ("h1000:4", "no chip of the name h1000; try h100; known: v4, v5e, v5p"),
        ("v5p:4x4x3", "the nearest are v5p:4x4x4, "),
        ("v5p:8x4x4", "the nearest are v5p:4x4x8, "),  # sizes go up
        ("v5e:32x32", "the nearest are v5e:16x16, "),
        ("v5e:4x4x4", "the nearest are v5e:8x8, "),  # as many chips
        ("v4:1x1x1", "the nearest are v4:2x2x1, "),
        ("v6e:0x4", "the nearest are v6e:1x1, "),
        ("h100:12", "the nearest are h100:16, "),  # whole hosts of 8
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(text, rule):
    with pytest.raises(UserError) as error:
        parse(text)
    assert f"--topology={text}" in str(error.value) and rule in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, slices", [("v5e:4x4", 0), ("h100:64", 2)])
def test_slices_that_cannot_be(text, slices):
    with pytest.raises(UserError, match=f"--slices={slices} must be 1"):
        parse(text, slices)


@needs_libtpu
@pytest.mark.parametrize(
    "text, slices, kind",
    [
        ("v4:2x2x4", 1, "TPU v4"), ("v5e:1x1", 1, "TPU v5 lite"), ("v5e:4x4", 2, "TPU v5 lite"),
        ("v5p:4x4x4", 1, "TPU v5"), ("v6e:16x16", 1, "TPU v6 lite"), ("v7x:2x2x2", 2, "TPU7x"),
    ],
)  # fmt: skip
def test_devices_are_those_that_libtpu_knows(text, slices, kind):
    found = parse(text, slices)
    devices = found.devices()
    assert len(devices) == found.num_devices and {device.device_kind for device in devices} == {kind}
    assert len({device.process_index for device in devices}) == found.num_hosts
    places = {(getattr(device, "slice_index", 0), *device.coords) for device in devices}
    assert len(places) == found.num_chips and len({place[0] for place in places}) == slices
    extent = [1 + max(place[i + 1] for place in places) for i in range(3)]
    assert tuple(extent[: len(found.shape)]) == found.shape


def test_only_tpus_are_compiled_for():
    with pytest.raises(UserError, match=r"h100:64.*TPU topologies only.*leave --compile out"):
        parse("h100:64").devices()


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llm-jax\[tpu\]'"):
        parse("v5e:4x4").devices()
