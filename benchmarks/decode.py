"""Speed of generation: tokens/s of reading prompts (prefill) and of making new tokens (decode), batch by batch.

Command:  python benchmarks/decode.py [--config=FILE] [--config.X=VALUE ...] [--batches=1,2,4,8,16,32,64]
          [--prompt=128] [--new=64] [--json=FILE]
Time:     2 minutes for configs/tiny.py of this folder on 2 cores

It is what `llm-jax generate` runs, on a model with fresh parameters and prompts of random tokens, none of which ends a
row. Batches take turns. Beside the rates stands the time of one new token for all rows of the batch, and how fast that
reads the parameters, which bounds small batches (as they are stored: 4 bytes each).
"""

import argparse
import functools
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from facts import HERE, spread, write

from llm_jax.config import UserError, to_dict
from llm_jax.flags import load_config_file, override
from llm_jax.jobs.setup import Program
from llm_jax.measure.flops import parameter_count
from llm_jax.model import decoding
from llm_jax.parallel import hosts

NEVER = -1  # no token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE / "configs" / "tiny.py"), help="as for `llm-jax train`")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64", help="numbers of rows")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens made for each")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", help="file to which the figures are written")
    arguments, overrides = parser.parse_known_args()
    try:
        config = override(load_config_file(arguments.config), overrides)
        config.train.sequence_length = max(config.train.sequence_length, arguments.prompt + arguments.new)
        with tempfile.TemporaryDirectory(prefix="decode-") as cache:
            hosts.start(config.parallel, compilation_cache=cache, saves_on_sigterm=False)
            program = Program(config, config.tokenizer.vocab_size)
            with jax.set_mesh(program.mesh):
                model = jax.jit(program.init)().parameters
                sizes = [int(size) for size in arguments.batches.split(",")]
                rows = measure(program, model, sizes, arguments.prompt, arguments.new, arguments.repetitions)
    except UserError as error:
        sys.exit(str(error))
    print(table(rows))
    write(arguments.json, {"config": to_dict(config), "prompt": arguments.prompt, "new": arguments.new, "decode": rows})


def measure(program: Program, model, sizes: list[int], prompt: int, new: int, repetitions: int) -> list[dict]:
    begin = jax.jit(functools.partial(decoding.start, max_tokens=new))
    sampling = decoding.Sampling(temperature=1.0, eos=NEVER)
    extend = jax.jit(functools.partial(decoding.extend, sampling=sampling, num_tokens=new), donate_argnames="decoding")
    key = jax.random.key(0)
    rng = np.random.default_rng(0)
    prompts, seconds = {}, {}
    batch_sharding = jax.NamedSharding(program.mesh, program.rules.spec("batch"))
    for size in sizes:
        tokens_BP = rng.integers(0, program.shape.vocab_size, (size, prompt), np.int32)
        prompts[size] = (
            jax.device_put(tokens_BP, program.batch_sharding),
            jax.device_put(np.full(size, prompt, np.int32), batch_sharding),
        )
        seconds[size] = {"prefill": [], "decode": []}
        jax.block_until_ready(extend(model, begin(model, *prompts[size]), key))  # compiles
    for _ in range(repetitions):
        for size in sizes:
            started = time.perf_counter()
            state = jax.block_until_ready(begin(model, *prompts[size]))
            read = time.perf_counter()
            state = jax.block_until_ready(extend(model, state, key))
            made = time.perf_counter()
            assert int(state.count) == new
            seconds[size]["prefill"].append(read - started)
            seconds[size]["decode"].append((made - read) / new)
    stored = parameter_count(model) * jnp.dtype(jnp.float32).itemsize
    rows = []
    for size in sizes:
        prefill, decode = (spread(seconds[size][what]) for what in ("prefill", "decode"))
        rows.append({
            "batch": size,
            "prefill, tokens/s": size * prompt / prefill["median"],
            "decode, tokens/s": size / decode["median"],
            "parameters read, bytes/s": stored / decode["median"],
            "seconds of a prefill": prefill,
            "seconds of a new token": decode,
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, JAX {jax.__version__}",
        f"{'batch':>6} {'prefill tokens/s':>17} {'decode tokens/s':>16} {'ms a new token':>15} {'quartiles':>17} "
        f"{'GB/s of parameters':>19}",
    ]
    for row in rows:
        step = row["seconds of a new token"]
        low, high = (1e3 * value for value in step["quartiles"])
        lines.append(
            f"{row['batch']:6} {row['prefill, tokens/s']:17,.0f} {row['decode, tokens/s']:16,.0f} "
            f"{1e3 * step['median']:15.2f} {low:8.2f}..{high:<7.2f} {row['parameters read, bytes/s'] / 1e9:19.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
