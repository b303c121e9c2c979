import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.parallel.chips import find
from llm_jax.plan.hlo import Collective, collectives, estimate, windowed_einsums
from llm_jax.plan.topology import parse

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
SIZES, NAMES = (2, 2, 2), ("a", "b", "c")
PAIR = [(0, 1), (1, 0)]
ROWS, COLUMNS = 8, 32  # of one device
BYTES = ROWS * COLUMNS * 4


def loop(body, x, length):
    return jax.lax.scan(lambda x, _: (body(x), None), x, None, length=length)[0]


@pytest.mark.parametrize(
    "body, expected",
    [
        (lambda x: jax.lax.psum(x, "b"), [("all-reduce", "b", BYTES, 1, 2 * BYTES / 2)]),
        (lambda x: jax.lax.psum(x, ("a", "c")), [("all-reduce", "ac", BYTES, 1, 2 * BYTES * 3 / 4)]),
        (lambda x: jax.lax.psum(x, NAMES), [("all-reduce", "abc", BYTES, 1, 2 * BYTES * 7 / 8)]),
        (lambda x: jax.lax.all_gather(x, "c"), [("all-gather", "c", 2 * BYTES, 1, BYTES)]),
        (lambda x: jax.lax.all_gather(x, ("b", "c")), [("all-gather", "bc", 4 * BYTES, 1, 3 * BYTES)]),
        (lambda x: jax.lax.psum_scatter(x, "b", tiled=True), [("reduce-scatter", "b", BYTES, 1, BYTES / 2)]),
        (lambda x: jax.lax.all_to_all(x, ("a", "b"), 0, 1, tiled=True), [("all-to-all", "ab", BYTES, 1, 0.75 * BYTES)]),
        (lambda x: jax.lax.ppermute(x, "a", PAIR), [("collective-permute", "a", BYTES, 1, BYTES)]),
        (lambda x: jax.lax.ppermute(x, "c", [(0, 1)]), [("collective-permute", "c", BYTES, 1, BYTES)]),
        (lambda x: loop(lambda x: jax.lax.psum(x, "b"), x, 7), [("all-reduce", "b", BYTES, 7, 7 * BYTES)]),
        (
            lambda x: loop(
                lambda x: loop(lambda x: jax.lax.psum(x, "b"), jax.lax.ppermute(x, "a", PAIR), 3), x, 5
            ),
            [("all-reduce", "b", BYTES, 15, 15 * BYTES), ("collective-permute", "a", BYTES, 5, 5 * BYTES)],
        ),
        (lambda x: x * 2, []),
    ],
)  # fmt: skip
def test_collectives_of_programs_that_say_what_they_send(body, expected):
    mesh = jax.make_mesh(SIZES, NAMES)
    spec = jax.P(NAMES)
    x = jax.ShapeDtypeStruct((8 * ROWS, COLUMNS), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.shard_map(body, in_specs=spec, out_specs=spec, check_vma=False))
        text = program.lower(x).compile().as_text()
    found = collectives(text, mesh)
    assert [(c.kind, "".join(c.axes), c.bytes, c.count, c.sent) for c in found] == expected
    assert not any(c.asynchronous or c.across_slices for c in found)
    assert windowed_einsums(text) == []


def program(*lines: str, partitions: int = 8, shape: str = "f32[16]{0}") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, num_partitions={partitions}\n\nENTRY %main (p: f32[16]) -> f32[16] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    "groups, axes, devices",
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", "b", 2),
        ("{{0,1,2,3},{4,5,6,7}}", "bc", 4),
        ("{}", "abc", 8),
        ("[4,2]<=[8]", "c", 2),
        ("[2,4]<=[8]", "bc", 4),
        ("[2,4]<=[4,2]T(1,0)", "ab", 4),
        ("[4,2]<=[2,2,2]T(0,2,1)", "b", 2),
        ("mesh['x'=2,'y'=4] {'y'}", "bc", 4),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", "ac", 4),
        ("mesh[axis_0=4,axis_1=2] {axis_0}", "ab", 4),
        ("mesh['x'=8] {'x':(2)2}", "b", 2),
        ("mesh['x'=4,'y'=2] {'x':(1)2}", "a", 2),
        ("mesh['x'=2,'y'=4], device_ids=([2,4]0,4,1,5,2,6,3,7) {'x'}", "b", 2),
        ("mesh['x'=4,'y'=2], device_ids=([4,2]<=[2,4]T(1,0)) {'y'}", "a", 2),
    ],
)
def test_groups_in_all_ways_of_writing_them(groups, axes, devices):
    text = program(
        "%p = f32[16]{0} parameter(0)",
        f"ROOT %r = f32[16]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add",
    )
    (found,) = collectives(text, jax.make_mesh(SIZES, NAMES))
    assert ("".join(found.axes), found.devices, found.bytes) == (axes, devices, 64)


def test_a_device_by_itself_exchanges_nothing():
    text = program("ROOT %r = f32[16]{0} all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add")
    assert collectives(text, jax.make_mesh(SIZES, NAMES)) == []


def test_sizes_of_tuples_and_of_what_is_started_and_done():
    text = program(
        "%p = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)",
        "%r = (bf16[4,8]{1,0:T(8,128)(2,1)}, /*index=1*/s4[16]{0}, pred[]) all-reduce(%p, %p, %p), replica_groups={}",
        "%g = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[32,8]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8]",
        "%h = bf16[32,8]{1,0} all-gather-done(%g)",
        "ROOT %s = f8e4m3fn[2]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}",
    )
    mesh = jax.make_mesh(SIZES, NAMES)
    found = {c.kind: (c.bytes, c.asynchronous) for c in collectives(text, mesh)}
    assert found == {
        "all-reduce": (64 + 8 + 1, False), "all-gather": (512, True), "reduce-scatter": (4, False),
    }  # fmt: skip


def test_what_fusions_and_other_cores_send_for_a_tpu():
    """A gather in a chain of fusions, two scatters that fusions are, with the same channel, and one on a SparseCore."""
    gather = "%{} = bf16[32]{{0}} all-gather(%x), channel_id=7, replica_groups=[4,2]<=[8]"
    reduce = "%{} = bf16[64]{{0}} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8]"
    scatter = "ROOT %{} = bf16[8]{{0}} reduce-scatter(%x), channel_id=9, replica_groups=[1,8]<=[8]"
    inner = {
        "fused_computation.1": gather.format("g1"), "async_collective_fusion.2": gather.format("g2"),
        "fused_computation.3": gather.format("g3"), "all-reduce-scatter.4": reduce.format("r4"),
        "all-reduce-scatter.5.clone": reduce.format("r5"), "called_computation": scatter.format("s"),
    }  # fmt: skip
    header, _, *main = program(
        "%start = (bf16[16], bf16[32]) fusion(%p), kind=kCustom, calls=%fused_computation.1",
        "%middle = (bf16[16], bf16[32]) fusion(%start), kind=kOutput, calls=%async_collective_fusion.2",
        "%end = bf16[32] fusion(%middle), kind=kCustom, calls=%fused_computation.3",
        "%one = bf16[16] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.4",
        "%other = bf16[16] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.5.clone",
        '%s = ((bf16[64]), bf16[8]) call-start(%p), async_execution_thread="sparsecore", to_apply=%called_computation',
        "ROOT %d = bf16[8] call-done(%s)",
    ).splitlines()
    computations = [f"%{name} (x: bf16[16]) -> bf16[16] {{\n  {line}\n}}" for name, line in inner.items()]
    found = collectives("\n".join([header, *computations, *main]), jax.make_mesh(SIZES, NAMES))
    assert {(c.kind, "".join(c.axes), c.bytes, c.count, c.asynchronous) for c in found} == {
        ("all-gather", "c", 64, 1, True), ("reduce-scatter", "bc", 128, 2, False),
        ("reduce-scatter", "abc", 128, 1, True),
    }  # fmt: skip


def test_a_device_that_the_mesh_lacks():
    text = program("ROOT %r = f32[16]{0} all-reduce(%p), replica_groups={{0,8}}")
    with pytest.raises(ValueError, match="names device 8, and the mesh has 8"):
        collectives(text, jax.make_mesh(SIZES, NAMES))


def test_a_windowed_einsum_is_found():
    text = program(
        "%w = (s32[], f32[16]{0}) while(%t), condition=%wide.windowed_dot_general_cond_ag.1.clone, "
        'body=%wide.windowed_dot_general_body_ag.1.clone.sunk, metadata={op_name="jit(f)/BTD,DF->BTF/dot_general"}',
        '%v = (s32[], f32[16]{0}) while(%t), condition=%c, body=%wide.region_0.5, metadata={op_name="jit(f)/while"}',
    )
    assert windowed_einsums(text) == ["jit(f)/BTD,DF->BTF/dot_general"]


def topology_mesh(name: str, sizes: tuple[int, ...], slices: int = 1) -> jax.sharding.Mesh:
    axes = ("data", "model")[: len(sizes)]
    devices = sorted(parse(name, slices).devices(), key=lambda d: (getattr(d, "slice_index", 0), *d.coords, d.id))
    return jax.sharding.Mesh(np.array(devices).reshape(sizes), axes, (jax.sharding.AxisType.Explicit,) * len(axes))


def cycles(count: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


@needs_libtpu
def test_an_estimate_overlaps_what_the_schedule_overlaps():
    """v5e at 1.5 GHz; a chain of 4 chips has one link of 45 GB/s each way."""
    mesh, chip = topology_mesh("v5e:2x2", (2, 2)), find("v5e")
    size = 90_000_000
    gather = f"(u8[{size // 2}], u8[{size}]) all-gather-start(%p), channel_id=1, replica_groups=[2,2]<=[4]"
    seconds = size / 2 / chip.link + 1e-6  # of the gather

    def estimated(*lines):
        found = estimate(program(*lines, partitions=4), mesh, chip)
        assert found.seconds == pytest.approx(found.compute + sum(found.waits.values()))
        return found

    compute = [f"%f = f32[16]{{0}} fusion(%p), kind=kLoop, calls=%c, {cycles(600_000)}"]  # 0.4 ms
    wait = ["ROOT %d = u8[1] all-gather-done(%g)"]
    found = estimated(f"%g = {gather}", *compute, *wait)
    assert (found.seconds, found.compute) == pytest.approx((seconds, 0.4e-3))
    assert found.waits == {"all-gather model": pytest.approx(seconds - 0.4e-3)}
    found = estimated(f"%g = {gather}", *compute, *compute, *compute, *wait)
    assert found.seconds == pytest.approx(1.2e-3) and found.waits == {}
    found = estimated(f"%g = u8[{size}] all-gather(%p), channel_id=1, replica_groups=[2,2]<=[4]", *compute)
    assert found.seconds == pytest.approx(seconds + 0.4e-3)


@needs_libtpu
@pytest.mark.parametrize(
    "kernel, batch, products", [("fwd", "3,", 2), ("fwd", "", 2), ("dq", "3,", 3), ("dkv", "3,", 4)]
)
def test_attention_kernels_take_the_flops_of_a_causal_mask(kernel, batch, products):
    mesh, chip = topology_mesh("v5e:2x2", (4,)), find("v5e")
    shapes = (
        f"s8[1,4,4]{{2,1,0}}, bf16[{batch}32,1024,64]{{2,1,0}}, bf16[{batch}8,4096,64]{{2,1,0}}, s32[8,4096]{{1,0}}"
    )
    call = (
        '(bf16[1]) custom-call(%p), custom_call_target="tpu_custom_call", '
        f"operand_layout_constraints={{{shapes}}}, frontend_attributes={{kernel_metadata={{"
    )
    found = estimate(program(f"%splash_mha_{kernel}_segmented.1 = {call}", partitions=4), mesh, chip)
    rows = 3 if batch else 1
    flops = products * 2 * rows * 32 * 1024 * 4096 * 128 / 2  # heads of 64 leave half of the matrix unit idle
    assert found.seconds == found.kernels == pytest.approx(flops / (0.6 * chip.flops)) and found.unpriced == ()
    found = estimate(program(f"%other_kernel.12 = {call}", partitions=4), mesh, chip)
    assert found.seconds == 0 and found.unpriced == ("other_kernel",)
    stated = call + '}}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1180000000000"}}}'
    found = estimate(program(f"%ragged-dot-none.1 = {stated}", partitions=4), mesh, chip)
    assert found.seconds == pytest.approx(0.01, rel=0.01) and found.unpriced == ()


@needs_libtpu
def test_a_loop_is_as_long_as_its_condition_says():
    lines = program("%p = s32[] parameter(0)", partitions=4).splitlines()
    text = "\n".join([
        lines[0],
        "%body (x: (s32[], f32[16])) -> (s32[], f32[16]) {",
        f"  ROOT %f = f32[16]{{0}} fusion(%x), kind=kLoop, calls=%c, {cycles(1500)}",
        "}",
        "%condition (x: (s32[], f32[16])) -> pred[] {",
        "  %bound = s32[]{:T(128)} constant(12)",
        "  %counter = s32[] get-tuple-element(%x), index=0",
        "  ROOT %less = pred[] compare(%counter, %bound), direction=LT",
        "}",
        "ENTRY %main (p: f32[16]) -> f32[16] {",
        "  %first = s32[] constant(2)",
        "  %copied = s32[] copy(%first)",
        "  %t = (s32[], f32[16]) tuple(%copied, /*index=1*/%p)",
        "  ROOT %w = (s32[], f32[16]) while(%t), condition=%condition, body=%body",
        "}",
    ])  # fmt: skip
    mesh, chip = topology_mesh("v5e:2x2", (4,)), find("v5e")
    assert estimate(text, mesh, chip).seconds == pytest.approx(10 * 1e-6)
    found = estimate(text.replace("constant(12)", "get-tuple-element(%x), index=1"), mesh, chip)
    assert found.seconds == pytest.approx(1e-6) and found.unpriced == ("all but one round of w",)


def lower(function, mesh, *arrays):
    types = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
        for shape, spec in arrays
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*types).compile().as_text()


@needs_libtpu
def test_a_matrix_product_takes_what_the_peak_allows():
    mesh, chip, size = topology_mesh("v5e:1x1", (1,)), find("v5e"), 8192
    text = lower(jnp.matmul, mesh, *[((size, size), ())] * 2)
    found = estimate(text, mesh, chip)
    ideal = 2 * size**3 / chip.flops
    assert ideal < found.seconds < 1.25 * ideal and found.waits == {} and found.kernels == 0


@needs_libtpu
def test_collectives_of_layers_on_tpus():
    """Two weights gathered a layer, forward and again backward, and their gradients scattered; 5 layers."""
    layers, width, rows = 5, 512, 1024
    mesh = topology_mesh("v5e:2x2", (2, 2))

    def loss(weights, x):
        def layer(x, weights):
            up, down = (jax.reshard(w, jax.P(None, "model")) for w in weights)
            hidden = jax.nn.relu(jnp.einsum("bd,df->bf", x, up))
            return jnp.einsum("bf,df->bd", hidden, down, out_sharding=jax.P("data", None)), None

        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, weights)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    weights = ((layers, width, 4 * width), (None, "data", "model"))
    text = lower(lambda a, b, x: jax.grad(loss)((a, b), x), mesh, weights, weights, ((rows, width), ("data", None)))
    found = collectives(text, mesh)
    moved = {}
    for c in found:
        key = (c.kind, c.axes)
        moved[key] = moved.get(key, 0) + c.count * c.bytes
    weight, activation = width * 4 * width // 2 * 2, rows // 2 * width * 2  # bytes of one, of a device when gathered
    assert moved[("all-gather", ("data",))] == 2 * 2 * layers * weight
    assert moved[("reduce-scatter", ("data",))] == 2 * layers * weight
    assert moved[("all-reduce", ("model",))] == pytest.approx(2 * layers * activation, rel=0.2)
    assert not any(c.across_slices for c in found) and windowed_einsums(text) == []


@needs_libtpu
def test_what_goes_between_slices():
    mesh = topology_mesh("v5e:2x2", (2, 4), slices=2)
    text = lower(lambda x: jnp.einsum("bd->d", x, out_sharding=jax.P("model")), mesh, ((64, 4096), ("data", "model")))
    found = [c for c in collectives(text, mesh) if c.across_slices]
    assert [(c.kind, c.axes, c.devices, c.count) for c in found] == [("all-reduce", ("data",), 2, 1)]
    assert found[0].bytes >= 4096 // 4 * 2 and math.isclose(found[0].sent, found[0].bytes)
    seconds = estimate(text, mesh, find("v5e")).seconds
    assert seconds > found[0].bytes / find("v5e").dcn


def test_sent_counts_all_executions():
    one = Collective(kind="all-reduce", axes=("a",), devices=4, bytes=100, asynchronous=False, across_slices=False)
    assert one.sent == 150
