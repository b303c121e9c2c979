"""Attention, loss, norms and products with weights: time and error of each implementation, forward and backward.

Command:  python benchmarks/kernels.py [--config=FILE] [--config.X=VALUE ...] [--only=attention,loss,norm,product]
          [--repetitions=20] [--json=FILE]
Time:     2 minutes for configs/tiny.py of this folder on 2 cores

Sizes are those of one device in a step of the config, whose rows are cut into --documents. Implementations take turns
call by call, on one device; those that cannot run here are left out, and it says why. The first of each kind is the
plain definition. Errors are relative (norm of the difference over the norm), of the output and of the worst gradient,
against that definition in float32 with exact products, of the same inputs.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from facts import HERE, spread, write

from llm_jax import config as configs
from llm_jax.config import Config, Parallel, UserError, to_dict
from llm_jax.flags import load_config_file, override
from llm_jax.kernels.attention import attention, choose_implementation
from llm_jax.kernels.cross_entropy import cross_entropy, reference_cross_entropy
from llm_jax.kernels.matmul import matmul
from llm_jax.kernels.reference_attention import reference_attention
from llm_jax.model.norm import Norm
from llm_jax.model.transformer import Shape
from llm_jax.parallel.sharding import Rules, make_mesh
from llm_jax.training.state import model_shape

KINDS = ("attention", "loss", "norm", "product")
DTYPES = ("float32", "bfloat16")
RULES = Rules()
PASSES = ("forward", "forward and backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE / "configs" / "tiny.py"), help="as for `llm-jax train`")
    parser.add_argument("--only", default=",".join(KINDS), help="of the four kinds")
    parser.add_argument("--documents", type=int, default=4, help="in a row")
    parser.add_argument("--repetitions", type=int, default=20, help="calls that are timed")
    parser.add_argument("--json", help="file to which the figures are written")
    arguments, overrides = parser.parse_known_args()
    try:
        config = override(load_config_file(arguments.config), overrides)
    except UserError as error:
        sys.exit(str(error))
    cases = {"attention": attentions, "loss": losses, "norm": norms, "product": products}
    rows = []
    with jax.set_mesh(make_mesh(Parallel(), jax.devices()[:1])):
        shape = model_shape(
            config.model, vocab_size=config.tokenizer.vocab_size, sequence_length=config.train.sequence_length
        )
        for dtype in DTYPES:
            for kind in arguments.only.split(","):
                sizes, implementations, arrays = cases[kind](config, shape, jnp.dtype(dtype), arguments.documents)
                for row in compare(implementations, arrays, arguments.repetitions):
                    rows.append({"kind": kind, "sizes": sizes, "dtype": dtype} | row)
    print(table(rows))
    write(arguments.json, {"config": to_dict(config), "kernels": rows})


def rows_of(config: Config) -> int:
    return max(1, config.train.batch_size // config.train.microbatches // len(jax.devices()))


def random(number: int, shape: tuple[int, ...], dtype, spec: jax.P, scale: float = 1.0) -> jax.Array:
    return jax.reshard((scale * jax.random.normal(jax.random.key(number), shape)).astype(dtype), spec)


def attentions(config: Config, shape: Shape, dtype, documents: int):
    batch, length = rows_of(config), config.train.sequence_length
    q_spec, k_spec = RULES.spec("batch", "length", "heads", None), RULES.spec("batch", None, "heads", None)
    q_BTNH = random(0, (batch, length, shape.num_heads, shape.head_width), dtype, q_spec)
    k_BSKH, v_BSKH = (random(i, (batch, length, shape.num_kv_heads, shape.head_width), dtype, k_spec) for i in (1, 2))
    documents_BT = np.repeat(np.arange(length, dtype=np.int32)[None] * documents // length + 1, batch, axis=0)
    segments_BT = jax.reshard(jnp.asarray(documents_BT), RULES.spec("batch", "length"))
    key_segments_BS = jax.reshard(segments_BT, RULES.spec("batch", None))
    options = {"segments_BT": segments_BT, "key_segments_BS": key_segments_BS, "window": shape.window}
    found: dict[str, Callable] = {"reference": functools.partial(reference_attention, **options)}
    device = jax.devices()[0]
    for name in configs.ATTENTIONS:
        if name in ("auto", "reference"):
            continue
        try:
            choose_implementation(
                name, device.platform, length=length, length_shards=1, head_width=shape.head_width, dtype=dtype,
                soft_cap=None, capability=getattr(device, "compute_capability", None), num_devices=1,
            )  # fmt: skip
        except UserError as error:
            print(f"{dtype}: {error}", file=sys.stderr)
        else:
            found[name] = functools.partial(attention, **options, implementation=name, rules=RULES)
    window = "" if shape.window is None else f", window {shape.window}"
    sizes = f"{batch} x {length}, {shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_width}{window}"
    return sizes, found, (q_BTNH, k_BSKH, v_BSKH)


def losses(config: Config, shape: Shape, dtype, documents: int):
    batch, length, vocabulary = rows_of(config), config.train.sequence_length, config.tokenizer.vocab_size
    targets_BT = jax.random.randint(jax.random.key(2), (batch, length), 0, vocabulary)
    weights_BT = jnp.ones((batch, length))
    z_loss, cap, chunk = config.train.z_loss, config.model.logit_soft_cap, config.train.loss_chunk

    def plain(hidden_BTD, head_DV):
        whole = jax.reshard(hidden_BTD, jax.P(None, None, None)), jax.reshard(head_DV, jax.P(None, None))
        return reference_cross_entropy(*whole, targets_BT, weights_BT, z_loss=z_loss, soft_cap=cap)[0]

    def chunked(hidden_BTD, head_DV):
        return cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss, cap, chunk, RULES)[0]

    hidden_BTD = random(0, (batch, length, shape.width), dtype, RULES.spec("batch", "length", None))
    arrays = hidden_BTD, random(1, (shape.width, vocabulary), dtype, RULES.spec("table_embed", "vocab"), 0.02)
    sizes = f"{batch} x {length}, {shape.width} wide, {vocabulary} tokens"
    return sizes, {"reference": plain, "chunked": chunked}, arrays


def norms(config: Config, shape: Shape, dtype, documents: int):
    batch, length = rows_of(config), config.train.sequence_length
    epsilon = shape.norm_epsilon

    def plain(x_BTD):
        x = x_BTD.astype(jnp.float32)
        if shape.layer_norm:
            x -= jnp.mean(x, axis=-1, keepdims=True)
        return (x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)).astype(x_BTD.dtype)

    ours = Norm(shape.width, centred=shape.layer_norm, use_bias=False, epsilon=epsilon)
    name = "layernorm" if shape.layer_norm else "rmsnorm"
    return (
        f"{batch} x {length} x {shape.width}",
        {"reference": plain, name: ours},
        (random(0, (batch, length, shape.width), dtype, RULES.spec("batch", "length", None)),),
    )


def products(config: Config, shape: Shape, dtype, documents: int):
    batch, length, inner = rows_of(config), config.train.sequence_length, shape.feed_forward_width
    x_BTD = random(0, (batch, length, shape.width), dtype, RULES.spec("batch", "length", None))
    arrays = x_BTD, random(1, (shape.width, inner), dtype, RULES.spec(None, "feed_forward"), 0.02)
    plain = functools.partial(jnp.einsum, "BTD,DF->BTF")
    return f"{batch} x {length}, {shape.width} -> {inner}", {"reference": plain, "matmul": matmul}, arrays


def compare(implementations: dict[str, Callable], arrays: tuple, repetitions: int) -> list[dict]:
    """A row for each implementation, with its times in turns with the others, and its errors."""
    outcome = jax.eval_shape(implementations["reference"], *arrays)
    cotangent = random(9, outcome.shape, outcome.dtype, outcome.sharding.spec)

    def both(function, cotangent, *arrays):
        value, pull_back = jax.vjp(function, *arrays)
        return value, *pull_back(cotangent)

    def compiled(function, exact: bool = False) -> dict[str, Callable]:
        given = tuple(array.astype(jnp.float32) for array in arrays) if exact else arrays
        cotangents = cotangent.astype(jnp.float32) if exact else cotangent
        with jax.default_matmul_precision("highest" if exact else None):
            backward = jax.jit(functools.partial(both, function)).lower(cotangents, *given).compile()
            if exact:
                return {PASSES[1]: lambda: backward(cotangents, *given)}
            forward = jax.jit(function).lower(*given).compile()
        return {PASSES[0]: lambda: forward(*given), PASSES[1]: lambda: backward(cotangents, *given)}

    def error(found, expected) -> float:
        wanted = np.asarray(expected, np.float64)
        return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))

    truth = compiled(implementations["reference"], exact=True)[PASSES[1]]()
    calls = {name: compiled(function) for name, function in implementations.items()}
    errors = {name: [error(a, b) for a, b in zip(calls[name][PASSES[1]](), truth, strict=True)] for name in calls}
    for name in calls:
        jax.block_until_ready(calls[name][PASSES[0]]())
    seconds = {(name, which): [] for name in calls for which in PASSES}
    for _ in range(repetitions):
        for name, which in seconds:
            begin = time.perf_counter()
            jax.block_until_ready(calls[name][which]())
            seconds[name, which].append(time.perf_counter() - begin)
    return [
        {
            "implementation": name,
            "seconds": {which: spread(seconds[name, which]) for which in PASSES},
            "time over that of the reference": {
                which: statistics.median(
                    a / b for a, b in zip(seconds[name, which], seconds["reference", which], strict=True)
                )
                for which in PASSES
            },
            "error of the output": errors[name][0],
            "error of the worst gradient": max(errors[name][1:]),
        }
        for name in calls
    ]


def table(rows: list[dict]) -> str:
    lines = [
        f"one device: {jax.devices()[0].device_kind}, JAX {jax.__version__}",
        f"{'':10}{'dtype':9} {'implementation':14} {'forward ms':>11} {'ratio':>6} {'with backward':>14} {'ratio':>6} "
        f"{'error':>8} {'gradient':>9}  sizes",
    ]
    for row in rows:
        times = (f"{1e3 * row['seconds'][which]['median']:11.2f}" for which in PASSES)
        ratios = (f"{row['time over that of the reference'][which]:6.2f}" for which in PASSES)
        forward, backward = zip(times, ratios, strict=True)
        lines.append(
            f"{row['kind']:10}{row['dtype']:9} {row['implementation']:14} {' '.join(forward)}    {' '.join(backward)} "
            f"{row['error of the output']:8.1e} {row['error of the worst gradient']:9.1e}  {row['sizes']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
