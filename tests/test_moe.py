"""B batch, T position, D width, E experts, K choices of a token, N tokens, L layers"""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from tiny_model import FAST, RULES

from llm_jax.model.moe import MixtureOfExperts, RouterSums, load_balance_loss, max_load, router_z_loss
from llm_jax.parallel.sharding import AXES

BATCH, LENGTH, WIDTH, EXPERTS, CHOICES = 8, 4, 8, 8, 2
NUM_TOKENS = 27.0
TRAINING, DECODING = RULES.spec("batch", "sequence", None), RULES.spec("batch", None, None)

MESHES = [
    {},
    {"fsdp": 8},
    {"expert": 8},
    {"expert": 4, "fsdp": 2},
    {"expert": 2, "tensor": 2, "context": 2},
    {"replica": 2, "stage": 2, "tensor": 2},
]


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, devices=jax.devices()[: math.prod(shape)])


def make_layer(*, dtype=jnp.float32, **changes) -> MixtureOfExperts:
    sizes = {"width": WIDTH, "expert_width": 4, "num_experts": EXPERTS, "experts_per_token": CHOICES}
    settings = {**sizes, "num_shared_experts": 1, "out_scale": 0.5, "gated": True, **changes}
    return MixtureOfExperts(**settings, dtype=dtype, rules=RULES, key=jax.random.key(0))


@functools.cache
def values(**changes) -> MixtureOfExperts:
    """A layer as numpy arrays."""
    with jax.set_mesh(make_mesh()):
        return jax.tree.map(np.asarray, jax.jit(functools.partial(make_layer, **changes), compiler_options=FAST)())


def put(layer: MixtureOfExperts) -> MixtureOfExperts:
    """On the mesh that is set, sharded as a layer that is made there."""
    made = functools.partial(
        make_layer,
        gated=layer.w_gate is not None,
        num_shared_experts=0 if layer.shared is None else 1,
        experts_per_token=layer.experts_per_token,
        dtype=layer.dtype,
    )
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, jax.eval_shape(made))
    return jax.tree.map(jax.device_put, layer, specs)


def biased(layer: MixtureOfExperts, bias_E) -> MixtureOfExperts:
    leaves, tree = jax.tree.flatten(layer)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(layer)]
    at = next(i for i, path in enumerate(paths) if "b_router" in path)
    leaves[at] = np.asarray(bias_E, np.float32)
    return jax.tree.unflatten(tree, leaves)


def inputs(length=LENGTH):
    """(x_BTD, counted_BT with NUM_TOKENS tokens, a cotangent)."""
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(BATCH, length, WIDTH)).astype(np.float32)
    counted_BT = np.ones((BATCH, length), np.float32)
    counted_BT.flat[:: BATCH * length // 5 + 1] = 0.0
    return x_BTD, counted_BT, rng.normal(size=x_BTD.shape).astype(np.float32)


def reference(layer, x_BTD, counted_BT):
    """Every expert computes every token; the choices are weights, most of them zero."""
    x_ND, counted_N = x_BTD.reshape(-1, WIDTH), counted_BT.reshape(-1)
    router_DE, bias_E = layer.w_router[...], layer.b_router[...]
    weights_NE = jnp.exp(x_ND @ router_DE)
    z_N = jnp.log(weights_NE.sum(1))
    probability_NE = weights_NE / weights_NE.sum(1, keepdims=True)
    ranking_NE = jnp.argsort(jnp.argsort(jax.lax.stop_gradient(-probability_NE - bias_E)))
    chosen_NE = (ranking_NE < layer.experts_per_token) * 1.0
    gate_NE = probability_NE * chosen_NE
    if layer.experts_per_token > 1:
        gate_NE = gate_NE / gate_NE.sum(1, keepdims=True)

    def expert(x_ND, w_gate_DF, w_up_DF, w_down_FD):
        if w_gate_DF is None:
            return jax.nn.gelu(x_ND @ w_up_DF) @ w_down_FD
        return (x_ND @ w_gate_DF * jax.nn.sigmoid(x_ND @ w_gate_DF) * (x_ND @ w_up_DF)) @ w_down_FD

    out_ND = 0.0
    for e in range(layer.w_up.shape[0]):
        w_gate = None if layer.w_gate is None else layer.w_gate[e]
        y_ND = expert(x_ND, w_gate, layer.w_up[e], layer.w_down[e])
        out_ND += y_ND * (gate_NE[:, e] * counted_N)[:, None]
    if layer.shared is not None:
        gate = None if layer.shared.w_gate is None else layer.shared.w_gate[...]
        out_ND += expert(x_ND, gate, layer.shared.w_up[...], layer.shared.w_down[...])
    sums = RouterSums(counted_N @ chosen_NE, counted_N @ probability_NE, counted_N @ z_N**2)
    return out_ND.reshape(x_BTD.shape), sums


def objective(out_BTD, sums, d_out_BTD, num_choices):
    losses = load_balance_loss(sums, num_choices, NUM_TOKENS) + 0.1 * router_z_loss(sums, NUM_TOKENS)
    return jnp.sum(out_BTD * d_out_BTD) + 3.0 * losses


@functools.partial(jax.jit, static_argnames="spec", compiler_options=FAST)
def value_and_gradients(layer, x_BTD, counted_BT, d_out_BTD, spec):
    def loss(layer, x_BTD):
        out_BTD, sums = layer(x_BTD, counted_BT, spec)
        return objective(out_BTD, sums, d_out_BTD, layer.experts_per_token), (out_BTD, sums)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x_BTD)


def run(layer, x_BTD, counted_BT, d_out_BTD, spec=TRAINING):
    """((gradients of layer and x), (out_BTD, sums)) on the mesh that is set."""
    length = None if spec[1] is None else "length"
    x_BTD = jax.device_put(x_BTD, RULES.spec("batch", length, None))
    counted_BT = jax.device_put(counted_BT, RULES.spec("batch", length))
    return value_and_gradients(put(layer), x_BTD, counted_BT, jax.device_put(d_out_BTD, spec), spec)


@functools.partial(jax.jit, compiler_options=FAST)
def expected(layer, x_BTD, counted_BT, d_out_BTD):
    def loss(layer, x_BTD):
        out_BTD, sums = reference(layer, x_BTD, counted_BT)
        return objective(out_BTD, sums, d_out_BTD, layer.experts_per_token), (out_BTD, sums)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, x_BTD)


def assert_close(actual, wanted):
    wanted_paths = jax.tree.leaves_with_path(wanted)
    for (path, b), a in zip(wanted_paths, jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=jax.tree_util.keystr(path))


BIASES = {
    "none": np.zeros(EXPERTS),
    "some": np.linspace(0, 0.2, EXPERTS),
    "all tokens to two experts": 9.0 * (np.arange(EXPERTS) < 2),
}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_value_sums_and_gradients_equal_those_of_the_definition(sizes):
    loads = []
    for bias_E in BIASES.values():
        layer = biased(values(), bias_E)
        wanted = expected(layer, *inputs())
        with jax.set_mesh(make_mesh(**sizes)):
            (d_layer, d_x_BTD), (out_BTD, sums) = actual = run(layer, *inputs())
        assert_close(actual, wanted)
        assert out_BTD.sharding.spec == TRAINING and all(leaf.sharding.is_fully_replicated for leaf in vars_of(sums))
        assert not np.any(d_layer.b_router[...])
        loads.append(np.asarray(sums.load_E))
    assert np.any(loads[0] != loads[1])
    np.testing.assert_array_equal(loads[2], [NUM_TOKENS, NUM_TOKENS] + [0] * (EXPERTS - 2))


def vars_of(sums):
    return [getattr(sums, field.name) for field in dataclasses.fields(sums)]


@pytest.mark.parametrize(
    "changes",
    [{"gated": False, "num_shared_experts": 0, "experts_per_token": 1}, {"experts_per_token": 3}],
    ids=str,
)
def test_other_layers(changes):
    layer = values(**changes)
    wanted = expected(layer, *inputs())
    assert np.any(wanted[0][0].w_router[...])
    with jax.set_mesh(make_mesh(expert=4, tensor=2)):
        assert_close(run(layer, *inputs()), wanted)


def test_decoding_of_one_position():
    wanted = expected(values(), *inputs(length=1))
    with jax.set_mesh(make_mesh(expert=4, tensor=2)):
        actual = run(values(), *inputs(length=1), DECODING)
    assert actual[1][0].sharding.spec == DECODING
    assert_close(actual, wanted)


def test_within_a_shard_map_over_stages():
    x_BTD, counted_BT, d_out_BTD = inputs()
    layers = [values(), biased(values(), BIASES["some"])]
    wanted = [expected(layer, x_BTD, counted_BT, d_out_BTD) for layer in layers]

    def loss(layers, x_BTD, counted_BT, d_out_BTD):
        def stage(layers, x_BTD, counted_BT, d_out_BTD):
            layer = jax.tree.map(lambda leaf: leaf[0], layers)
            out_BTD, sums = layer(x_BTD, counted_BT, TRAINING)
            value = objective(out_BTD, sums, d_out_BTD, CHOICES)
            return jax.tree.map(lambda leaf: leaf[None], (value, sums))

        specs = {"in_specs": (jax.P("stage"), *[jax.P()] * 3), "out_specs": jax.P("stage")}
        run = jax.shard_map(stage, **specs, axis_names={"stage"}, check_vma=False)
        value_L, sums = run(layers, x_BTD, counted_BT, d_out_BTD)
        return jnp.sum(value_L), sums

    mesh = make_mesh(stage=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        stacked = jax.tree.map(
            lambda a, b: jax.device_put(np.stack([a, b]), jax.P("stage", *jax.typeof(a).sharding.spec)),
            *[put(layer) for layer in layers],
        )
        x_BTD = jax.device_put(x_BTD, RULES.spec("batch", "length", None))
        counted_BT = jax.device_put(counted_BT, RULES.spec("batch", None))
        d_out_BTD = jax.device_put(d_out_BTD, TRAINING)
        gradients, sums = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=FAST)(
            stacked, x_BTD, counted_BT, d_out_BTD
        )
    for i, ((d_layer, _), (_, wanted_sums)) in enumerate(wanted):
        assert_close(jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], (gradients[0], sums)), (d_layer, wanted_sums))
    np.testing.assert_allclose(gradients[1], wanted[0][0][1] + wanted[1][0][1], rtol=1e-5, atol=2e-6)


def test_padding_counts_nothing_even_if_it_is_absurd():
    layer = values(num_shared_experts=0)
    x_BTD, counted_BT, d_out_BTD = inputs()
    absurd_BTD = np.where(counted_BT[..., None] > 0, x_BTD, np.float32(1e6))
    with jax.set_mesh(make_mesh(expert=4, tensor=2)):
        (d_layer, d_x_BTD), (out_BTD, sums) = run(layer, absurd_BTD, counted_BT, d_out_BTD)
        (wanted, _), (_, wanted_sums) = run(layer, x_BTD, counted_BT, d_out_BTD)
    assert_close((d_layer, sums), (wanted, wanted_sums))
    assert np.sum(sums.load_E) == CHOICES * NUM_TOKENS
    assert not np.any(np.asarray(out_BTD)[counted_BT == 0]) and not np.any(np.asarray(d_x_BTD)[counted_BT == 0])


def test_bfloat16_is_as_exact_as_its_rounding():
    """The router is not rounded: the choices, and so the sums, are those of float32."""
    x_BTD, counted_BT, d_out_BTD = inputs()
    rounded_BTD = jnp.asarray(x_BTD, jnp.bfloat16)
    (d_wanted, _), (wanted_BTD, wanted_sums) = expected(
        values(), np.asarray(rounded_BTD, np.float32), counted_BT, d_out_BTD
    )
    with jax.set_mesh(make_mesh(expert=4, tensor=2)):
        layer = values(dtype=jnp.bfloat16)
        (d_layer, _), (out_BTD, sums) = run(layer, rounded_BTD, counted_BT, d_out_BTD)
    assert out_BTD.dtype == jnp.bfloat16 and d_layer.w_up[...].dtype == jnp.float32
    np.testing.assert_array_equal(sums.load_E, wanted_sums.load_E)
    np.testing.assert_allclose(sums.probability_E, wanted_sums.probability_E, rtol=1e-5)
    for actual, wanted in ((out_BTD, wanted_BTD), (d_layer.w_up[...], d_wanted.w_up[...])):
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(np.asarray(actual, np.float32), wanted, atol=2**-6 * largest)


def test_losses():
    even = RouterSums(np.full(4, 5.0), np.full(4, 2.5), np.float32(90.0))  # 10 tokens, 2 choices
    np.testing.assert_allclose(load_balance_loss(even, 2, 10.0), 1.0)
    np.testing.assert_allclose(router_z_loss(even, 10.0), 9.0)
    np.testing.assert_allclose(max_load(even), 1.0)
    uneven = RouterSums(np.array([20.0, 0, 0, 0]), np.array([10.0, 0, 0, 0]), np.float32(10.0))
    np.testing.assert_allclose(load_balance_loss(uneven, 2, 10.0), 4.0)
    np.testing.assert_allclose(max_load(uneven), 4.0)
    of_layers = jax.tree.map(lambda *leaves: np.stack(leaves), even, uneven)
    np.testing.assert_allclose(load_balance_loss(of_layers, 2, 10.0), 2.5)
    np.testing.assert_allclose(router_z_loss(of_layers, 10.0), 5.0)
    np.testing.assert_allclose(max_load(of_layers), 2.5)
    gradient = jax.grad(lambda sums: load_balance_loss(sums, 2, 10.0))(jax.tree.map(jnp.asarray, uneven))
    np.testing.assert_allclose(gradient.probability_E, [0.4, 0, 0, 0])
    assert not np.any(gradient.load_E)


def compiled(layer: dict, shape, mesh, dtype=jnp.float32, **options) -> str:
    """The program of values and gradients, for the devices of `mesh`."""

    def loss(layer, x_BTD, counted_BT):
        out_BTD, sums = layer(x_BTD, counted_BT, TRAINING)
        return jnp.sum(out_BTD.astype(jnp.float32) ** 2) + sums.z

    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: make_layer(dtype=dtype, **layer))
        x_BTD = jax.ShapeDtypeStruct(shape, dtype, sharding=RULES.spec("batch", "length", None))
        counted_BT = jax.ShapeDtypeStruct(shape[:2], jnp.float32, sharding=RULES.spec("batch", "length"))
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(abstract, x_BTD, counted_BT)
    text = lowered.compile(**options).as_text()
    assert text is not None
    return text


def test_tokens_are_exchanged_and_no_device_holds_all_experts():
    sizes = {"width": 64, "expert_width": 64, "num_experts": 8, "num_shared_experts": 0}
    text = compiled(sizes, (8, 2, 64), make_mesh(expert=4, tensor=2), compiler_options=FAST)
    experts = r"replica_groups=(?:\{\{0,2,4,6\},\{1,3,5,7\}\}|mesh\[[^]]*\] \{'expert'\})"  # JAX 0.10, 0.12
    gathers = re.findall(rf"f32\[16,64\]\S* all-gather\(.*{experts}", text)  # all 16 tokens of the 4 devices
    scatters = re.findall(rf"f32\[2,1,64\]\S* reduce-scatter\(.*{experts}", text)  # back to 2 rows, half a sequence
    assert gathers and scatters, re.findall(r"(?:all-gather|reduce-scatter)\(.*", text)
    held = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(held) < 8 * 64 * 64 / 2  # those of all experts, sharded over `tensor` alone


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_tpu_kernels_compute_no_expert_for_the_tokens_of_others(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.make_mesh((1, 1, 1, 2, 1, 2), AXES, devices=devices)
    sizes = {"width": 256, "expert_width": 256, "num_experts": 8, "num_shared_experts": 0}
    text = compiled(sizes, (4, 128, 256), mesh, jnp.bfloat16)
    # Three products forward; two of them again and three gradients by tokens backward.
    assert len(re.findall(r"%ragged-dot-none\S* = .*custom-call", text)) == 3 + 2 + 3
    chunk = math.ceil(1.25 * 2 * 128 * 2)
    assert f"[{chunk},256]" in text and f"[4,{chunk}," not in text
