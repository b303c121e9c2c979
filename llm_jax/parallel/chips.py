"""Every accelerator that is planned for: what one chip can do by its maker, and how chips are wired.

Figures are per chip, in FLOP/s, bytes and bytes/s. A kind of chip is a fact sheet, not a promise: what a program
reaches of it is measured, or stated as an assumption by whoever plans.
"""

import dataclasses
import math

SCALING_BOOK = "https://jax-ml.github.io/scaling-book"
GOOGLE_CLOUD = "https://docs.cloud.google.com/tpu/docs"
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip.

    torus: dimensions of the grid that a slice of TPU chips is; 0: GPUs, all at the same distance through the switches
    of one host, which are then what a slice is to TPUs.
    """

    name: str
    aliases: tuple[str, ...] = ()
    device_kinds: tuple[str, ...]  # how jax.Device.device_kind begins
    devices: int = 1  # JAX devices a chip
    flops: float  # dense bfloat16
    product: float  # the share of it that a large matrix product reaches
    hbm: float  # what a program may fill
    hbm_bandwidth: float
    link: float  # one link, one way; a torus has two a dimension, a GPU counts as having one
    torus: int
    host: int  # chips
    dcn: float  # one way, the chip's share of its host's network
    max_chips: int  # of one slice; of GPUs: of one job, a network's size being no property of the chip
    shapes: tuple[tuple[int, ...], ...] = ()  # all that a slice may have; (): see fits
    sources: tuple[str, ...]

    def wraps(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which dimensions of a slice of this shape close to a ring.

        In a two-dimensional pod only one as long as the pod; in a three-dimensional one all, once the slice is made of
        whole cubes of 4 x 4 x 4, which optical switches join.
        """
        if self.torus == 2:
            return tuple(size == 16 for size in shape)
        return (self.torus == 3 and all(size % 4 == 0 for size in shape),) * len(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether one can have a slice of this shape; of GPUs: (chips,), some of one host or whole hosts."""
        if self.shapes and (shape in self.shapes or self.torus == 2):
            return shape in self.shapes
        if self.torus == 0:
            (size,) = shape
            return 1 <= size <= self.max_chips and (size % self.host == 0 or self.host % size == 0)
        whole_cubes = len(shape) == 3 and all(size >= 4 and size % 4 == 0 for size in shape)
        return whole_cubes and tuple(sorted(shape)) == shape and math.prod(shape) <= self.max_chips


# Below 4 x 4 x 4, three-dimensional slices are parts of one cube.
SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SHAPES_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

# `hbm` of TPUs is what libtpu 0.0.42 calls available when a program is too large (v5e: 15.75 GiB of 16); of GPUs, three
# quarters of what is sold: what JAX takes if not told otherwise. `product` of TPUs is what libtpu's cost model says of
# 8192 x 8192 matrices (v5p: 4.65 million cycles, at the clock that gives the published peak; v7x: at 2.2 GHz, a guess);
# of GPUs what an H200 was measured to reach, 790 TFLOP/s; the others are given the same share.
ON_CHIP = 6  # times a link: between the two devices of a v7x chip (cloud.google.com/tpu/docs/tpu7x)
CHIPS = (
    Chip(
        name="v4", device_kinds=("TPU v4",), flops=275e12, product=0.93,
        hbm=30.75 * GIB, hbm_bandwidth=1.23e12, link=45e9, dcn=6.25e9,
        torus=3, host=4, max_chips=4096, shapes=SHAPES_3D, sources=(SCALING_BOOK, f"{GOOGLE_CLOUD}/v4"),
    ),
    Chip(
        name="v5e", aliases=("v5litepod", "v5lite"), device_kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12, product=0.88, hbm=15.75 * GIB, hbm_bandwidth=0.82e12, link=45e9, dcn=3.125e9,
        torus=2, host=4, max_chips=256, shapes=SHAPES_2D, sources=(SCALING_BOOK, f"{GOOGLE_CLOUD}/v5e"),
    ),
    Chip(
        name="v5p", aliases=("v5",), device_kinds=("TPU v5",), flops=459e12, product=0.90,
        hbm=95.74 * GIB, hbm_bandwidth=2.765e12, link=90e9, dcn=6.25e9, torus=3, host=4, max_chips=6144,
        shapes=SHAPES_3D, sources=(f"{GOOGLE_CLOUD}/tpu7x", SCALING_BOOK, f"{GOOGLE_CLOUD}/v5p"),
    ),
    Chip(
        name="v6e", aliases=("trillium", "v6"), device_kinds=("TPU v6",), flops=918e12, product=0.70,
        hbm=31.25 * GIB, hbm_bandwidth=1.638e12, link=90e9, dcn=12.5e9, torus=2, host=4, max_chips=256,
        shapes=SHAPES_2D, sources=(f"{GOOGLE_CLOUD}/tpu7x", SCALING_BOOK, f"{GOOGLE_CLOUD}/v6e"),
    ),
    Chip(
        name="v7x", aliases=("tpu7x", "v7", "ironwood"), device_kinds=("TPU7x",), devices=2,
        flops=2307e12, product=0.81, hbm=189.5 * GIB, hbm_bandwidth=7.38e12, link=100e9, dcn=12.5e9,
        torus=3, host=4, max_chips=9216, shapes=SHAPES_3D, sources=(f"{GOOGLE_CLOUD}/tpu7x",),
    ),
    Chip(
        name="a100", device_kinds=("NVIDIA A100",), flops=312e12, product=0.80,
        hbm=0.75 * 80e9, hbm_bandwidth=2.04e12, link=300e9, dcn=25e9,
        torus=0, host=8, max_chips=2**16, sources=("NVIDIA A100 datasheet, SXM, 80 GB",),
    ),
    Chip(
        name="h100", device_kinds=("NVIDIA H100",), flops=989e12, product=0.80,
        hbm=0.75 * 80e9, hbm_bandwidth=3.35e12, link=450e9, dcn=50e9,
        torus=0, host=8, max_chips=2**16, sources=("NVIDIA H100 datasheet, SXM",),
    ),
    Chip(
        name="h200", device_kinds=("NVIDIA H200",), flops=989e12, product=0.80,
        hbm=0.75 * 141e9, hbm_bandwidth=4.8e12, link=450e9, dcn=50e9,
        torus=0, host=8, max_chips=2**16, sources=("NVIDIA H200 datasheet, SXM",),
    ),
    Chip(
        name="b200", device_kinds=("NVIDIA B200",), flops=2250e12, product=0.80,
        hbm=0.75 * 180e9, hbm_bandwidth=8e12, link=900e9, dcn=50e9,
        torus=0, host=8, max_chips=2**16, sources=("NVIDIA B200 datasheet",),
    ),
)  # fmt: skip


def find(name: str) -> Chip | None:
    """The chip of that name or alias."""
    return next((chip for chip in CHIPS if name.lower() in (chip.name, *chip.aliases)), None)


def of_device_kind(kind: str) -> Chip | None:
    """The chip of a jax.Device by its device_kind: that whose beginning fits longest ("TPU v5 lite" is no "TPU v5")."""
    fitting = [(len(begin), i) for i, chip in enumerate(CHIPS) for begin in chip.device_kinds if kind.startswith(begin)]
    return CHIPS[max(fitting)[1]] if fitting else None
