"""Speed of training: step time, tokens/s, MFU, memory and compile time, against what the machine can do at all.

Command:  python benchmarks/train.py --config=FILE [--config.X=VALUE ...] [--steps=20] [--json=FILE]
          [--variant='model.dtype=bfloat16,XLA_FLAGS=--xla_flag=1' ...] [--against=torch [--torch_python=PATH]]
Time:     1 minute for configs/tiny.py of this folder on 2 cores

It is the update that `llm-jax train` makes, compiled by the same code, on random tokens of the config's vocabulary, so
no data are needed. Each --variant is the config with some fields changed, and environment variables where the name is
in capitals; without one there is the config alone. --against=torch adds the same model in plain PyTorch (torch_gpt.py),
in bfloat16 and in float32, if --torch_python, or this Python, has torch.

Each variant is a process of its own, and they take turns step by step, so that other load on the machine meets all of
them: compare the ratios (the median of those to the first variant's step of the same round), which scatter less than
the times. All have the same environment, with the huge pages that `llm-jax` asks for, too (GLIBC_TUNABLES, unless it
is set). Where only one process at a time can have the device (a TPU), or memory does not suffice, --one_by_one runs
them one after the other.

MFU is against the largest matrix product rate measured here, in the variant's dtype or in float32 if that is faster (by
either library, before and after the steps), and for accelerators also against the published peak. It counts 6 FLOPs a
weight and token, and attention causal (half of the scores) or full. Memory is the largest resident set of the process
on CPU, and else what was in use on one device at most. Ceilings are those of one device; the copy counts bytes read and
written.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from facts import machine, spread, write
from peers import Failed, Peer, serve

from llm_jax.config import Config, UserError, from_dict, to_dict, validate
from llm_jax.environment import for_malloc
from llm_jax.flags import load_config_file, override

HERE = pathlib.Path(__file__).parent
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
BATCHES = 4  # that are gone through in turn
TURN_SECONDS = 0.5  # at least; shorter steps are timed several at once
WARM_UP = 2  # turns
CEILING_SECONDS, CEILING_TRIES = 0.5, 20  # at least both


@dataclasses.dataclass(kw_only=True)
class Side:
    """One of those that are compared."""

    name: str
    peer: Peer
    config: Config
    made: dict
    turn: int = 1  # steps timed at once
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    loss: float = float("nan")
    memory: float = float("nan")

    @property
    def tokens(self) -> int:
        return self.config.train.batch_size * self.config.train.sequence_length

    def step(self) -> None:
        result = self.peer.call("steps", self.turn)
        self.seconds.append(result["seconds"])
        self.cpu.append(result["cpu"])
        self.loss = result["loss"]


class Training:
    """The side of this project; runs in a process of its own."""

    def make(self, config: dict, cache: str) -> dict:
        # Imported here: the process that compares needs none of it.
        import jax
        import jax.numpy as jnp
        import numpy as np

        from llm_jax.jobs.setup import Program
        from llm_jax.measure.flops import parameter_count, peak_flops
        from llm_jax.parallel import hosts
        from llm_jax.plan.costs import model_flops

        resolved = from_dict(config)
        hosts.start(resolved.parallel, compilation_cache=cache, saves_on_sigterm=False)
        vocabulary, train = resolved.tokenizer.vocab_size, resolved.train
        program = Program(resolved, vocabulary)
        with jax.set_mesh(program.mesh):
            begin = time.perf_counter()
            state = jax.block_until_ready(jax.jit(program.init)())
            initialized = time.perf_counter()
            lowered = program.lower(state)
            traced = time.perf_counter()
            self.update = lowered.compile()
            compiled = time.perf_counter()
        self.leaves = jax.tree.leaves(state)
        shape = (BATCHES, train.batch_size, train.sequence_length + 1)
        rows = np.random.default_rng(train.seed).integers(0, vocabulary, shape, np.int32)
        places = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape[1:])
        self.batches = [
            jax.device_put(
                {"tokens": tokens, "segments": np.ones_like(places), "positions": places}, program.batch_sharding
            )
            for tokens in rows
        ]
        self.count = 0
        self.steps(1)
        device = jax.local_devices()[0]
        dtype = state.parameters.dtype
        peak = peak_flops(device, dtype)
        flops = {name: model_flops(program.shape, train.sequence_length, causal=name == "causal") for name in COUNTED}
        analysis = self.update.memory_analysis()
        return {
            "initialize": initialized - begin,
            "trace": traced - initialized,
            "compile": compiled - traced,
            "parameters": parameter_count(state.parameters),
            "dtype": str(jnp.dtype(dtype)),
            "device": f"{program.mesh.size} x {device.device_kind}",
            "platform": device.platform,
            "devices": program.mesh.size,
            "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
            "published": peak.value if peak.source.startswith("published") else None,
            "flops": flops,
            "temporary": analysis.temp_size_in_bytes if analysis is not None else None,
        }

    def steps(self, count: int) -> dict:
        """As the loop of a run: the next update is given to the device while this one runs; one wait at the end."""
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.leaves, metrics = self.update(self.leaves, self.batches[self.count % BATCHES])
            self.count += 1
        loss = float(metrics["loss"])  # waits
        return {
            "seconds": (time.perf_counter() - begin) / count,
            "cpu": (time.process_time() - cpu) / count,
            "loss": loss,
        }

    def memory(self) -> float:
        import jax

        stats = jax.local_devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"]
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def ceilings(self) -> dict:
        """Matrix products, FLOP/s by dtype, and a copy, bytes read and written a second: the best of some."""
        import jax
        import jax.numpy as jnp

        size = 2048 if jax.default_backend() == "cpu" else 8192

        def best(function, *arrays) -> float:
            compiled = jax.jit(function).lower(*arrays).compile()
            compiled(*arrays).block_until_ready()
            seconds = []
            while len(seconds) < CEILING_TRIES or sum(seconds) < CEILING_SECONDS:
                begin = time.perf_counter()
                compiled(*arrays).block_until_ready()
                seconds.append(time.perf_counter() - begin)
            return min(seconds)

        found = {}
        for dtype in ("float32", "bfloat16"):
            matrix = jnp.full((size, size), 1 / size, dtype)
            found[dtype] = 2 * size**3 / best(jnp.matmul, matrix, matrix)
        array = jnp.zeros(2**26)
        found["copy"] = 2 * array.nbytes / best(lambda x: x + 1, array)
        return found


COUNTED = ("causal", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE / "configs" / "tiny.py"), help="as for `llm-jax train`")
    parser.add_argument("--variant", action="append", help="FIELD=VALUE,...: another config; may be repeated")
    parser.add_argument("--steps", type=int, default=20, help="timings of each variant")
    parser.add_argument("--against", choices=["torch"], help="another library, on the model of the first variant")
    parser.add_argument("--torch_python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--torch_compile", action="store_true", help="torch.compile, which takes long on CPU")
    parser.add_argument("--one_by_one", action="store_true", help="not in turns: each when the one before has ended")
    parser.add_argument("--json", help="file to which the figures are written")
    arguments, overrides = parser.parse_known_args()
    try:
        config = override(load_config_file(arguments.config), overrides)
        variants = [read_variant(config, variant) for variant in arguments.variant or [""]]
        results = run(variants, arguments)
    except (UserError, Failed) as error:
        sys.exit(str(error))
    print(table(results))
    write(arguments.json, results)


def run(variants: list[tuple[str, Config, dict[str, str]]], arguments: argparse.Namespace) -> dict:
    ours, theirs = [sys.executable, __file__, "--serve"], [arguments.torch_python, str(HERE / "torch_gpt.py")]
    first = variants[0][1]
    against = []
    if arguments.against == "torch":
        require_torch(arguments.torch_python)
        against = [(torch_sizes(first), torch_training(first, dtype, arguments)) for dtype in ("bfloat16", "float32")]
    alone = arguments.one_by_one or len(variants) + len(against) == 1
    environment = ({} if alone else SHARED_GPU) | os.environ | for_malloc(os.environ)

    def ceilings() -> list[dict]:
        """In processes of their own, so that they take no memory from the variants, nor add to theirs."""
        found = []
        for command in [ours] + [theirs] * bool(against):
            with contextlib.closing(Peer(command, environment)) as peer:
                found.append(peer.call("ceilings"))
        return found

    sides: list[Side] = []
    before = ceilings()
    with tempfile.TemporaryDirectory(prefix="train-") as cache, contextlib.ExitStack() as stack:

        def start(name: str, command: list[str], more: dict[str, str], config: Config, *make) -> None:
            peer = stack.enter_context(contextlib.closing(Peer(command, environment | more)))
            made = peer.call("make", *make)
            sides.append(Side(name=name, peer=peer, config=config, made=sides[0].made | made if sides else made))
            if arguments.one_by_one:
                measure(sides[-1:], arguments.steps)
                peer.close()

        for name, config, more in variants:
            start(name, ours, more, config, to_dict(config), os.path.join(cache, str(len(sides))))
        for sizes, training in against:
            name = f"torch {training['dtype']}" + (" compiled" if training["compiled"] else "")
            start(name, theirs, {}, first, sizes, training)
        if not arguments.one_by_one:
            measure(sides, arguments.steps)
    return summarize(sides, before + ceilings())


def read_variant(config: Config, text: str) -> tuple[str, Config, dict[str, str]]:
    """(name, the config with the fields changed, environment variables)."""
    pairs = [pair.partition("=") for pair in re.split(r",(?=[\w.\[\]]+=)", text) if pair]
    environment = {name: value for name, _, value in pairs if name.isupper()}
    flags = [f"--config.{name}={value}" for name, _, value in pairs if not name.isupper()]
    changed = override(from_dict(to_dict(config)), flags)
    validate(changed)
    return text or "the config", changed, environment


def require_torch(python: str) -> None:
    found = subprocess.run([python, "-c", "import torch"], capture_output=True)
    if found.returncode != 0:
        raise UserError(f"--against=torch: {python} has no torch; install it, or give another --torch_python=PATH")


def torch_sizes(config: Config) -> dict:
    """Of torch_gpt.GPT. UserError where that is another model."""
    m = config.model
    plain = dataclasses.replace(
        type(m)(),
        activation="gelu", norm="layernorm", position="learned", tie_embeddings=True, num_layers=m.num_layers,
        width=m.width, num_heads=m.num_heads, feed_forward_width=m.feed_forward_width, norm_epsilon=m.norm_epsilon,
        dtype=m.dtype, layers=m.layers, remat=m.remat,
    )  # fmt: skip
    if m != plain or config.optimizer.name != "adamw" or config.train.microbatches != 1:
        raise UserError(
            "--against=torch knows the model of benchmarks/configs/tiny.py, of any size (gelu, layernorm, learned "
            "positions, tied embeddings, adamw, train.microbatches=1); take that, or leave --against out"
        )
    return {
        "vocab": config.tokenizer.vocab_size,
        "length": config.train.sequence_length,
        "layers": m.num_layers,
        "width": m.width,
        "heads": m.num_heads,
        "inner": m.feed_forward_width or 4 * m.width,
        "epsilon": m.norm_epsilon,
    }


def torch_training(config: Config, dtype: str, arguments: argparse.Namespace) -> dict:
    o = config.optimizer
    return {
        "dtype": dtype, "compiled": arguments.torch_compile, "seed": config.train.seed, "batches": BATCHES,
        "batch_size": config.train.batch_size, "rate": o.peak_learning_rate, "betas": [o.beta1, o.beta2],
        "epsilon": o.epsilon, "weight_decay": o.weight_decay, "clip": o.clip_norm,
    }  # fmt: skip


def measure(sides: list[Side], steps: int) -> None:
    for _ in range(WARM_UP):
        for side in sides:
            side.step()
            side.turn = max(1, round(TURN_SECONDS / side.seconds.pop()))
            side.cpu.pop()
    for number in range(steps):
        order = sides if number % 2 == 0 else sides[::-1]  # nobody is always behind the same one
        for side in order:
            side.step()
    for side in sides:
        side.memory = side.peer.call("memory")


def summarize(sides: list[Side], measured: list[dict]) -> dict:
    """measured: ceilings, of which the largest count."""
    ceilings = {what: max(one[what] for one in measured) for what in measured[0]}
    first = sides[0]
    rows = []
    for side in sides:
        rate = side.tokens / statistics.median(side.seconds)
        ratios = [a / b * side.tokens / first.tokens for a, b in zip(first.seconds, side.seconds, strict=True)]
        flops = {name: rate * side.made["flops"][name] / side.made["devices"] for name in COUNTED}
        published = side.made["published"]
        reachable = max(ceilings["float32"], ceilings[side.made["dtype"]])
        rows.append({
            "name": side.name,
            "step": spread(side.seconds),
            "steps timed at once": side.turn,
            "CPU seconds a step": statistics.median(side.cpu),
            "tokens/s": rate,
            "MFU": {name: value / reachable for name, value in flops.items()},
            "MFU of the published peak": published and {name: value / published for name, value in flops.items()},
            "memory": side.memory,
            "loss": side.loss,
            "tokens/s over those of the first": spread(ratios),
            "seconds": side.seconds,
            "config": to_dict(side.config),
            **side.made,
        })  # fmt: skip
    return {"ceilings": ceilings, "variants": rows}


def table(results: dict) -> str:
    found, ceilings, first = machine(), results["ceilings"], results["variants"][0]
    lines = [
        f"{found['cpu']}, {found['cores']} cores, load {found['load']:.1f}; {first['device']}; "
        f"jax {found['versions']['jax']}; {found['commit']}",
        f"ceilings of a device: matrix product {ceilings['float32'] / 1e9:,.0f} GFLOP/s in float32, "
        f"{ceilings['bfloat16'] / 1e9:,.0f} in bfloat16; copy {ceilings['copy'] / 1e9:,.0f} GB/s",
        f"{first['parameters']:,} parameters; {first['flops']['causal'] / 1e6:,.1f} MFLOP a token causal, "
        f"{first['flops']['full'] / 1e6:,.1f} full",
        "",
    ]
    names = [row["name"] for row in results["variants"]]
    width = max(12, *map(len, names))
    lines.append(
        f"{'':{width}} {'step ms':>9} {'quartiles':>17} {'best':>9} {'CPU s':>7} {'tokens/s':>11} {'MFU':>6} "
        f"{'full':>6} {'GB':>6} {'compile s':>9} {'loss':>7} {'ratio':>6}  quartiles"
    )
    for row in results["variants"]:
        step, ratio = row["step"], row["tokens/s over those of the first"]
        low, high = (1e3 * value for value in step["quartiles"])
        lines.append(
            f"{row['name']:{width}} {1e3 * step['median']:9.1f} {low:8.1f}..{high:<7.1f} {1e3 * step['range'][0]:9.1f} "
            f"{row['CPU seconds a step']:7.2f} {row['tokens/s']:11,.0f} {row['MFU']['causal']:6.1%} "
            f"{row['MFU']['full']:6.1%} {row['memory'] / 1e9:6.2f} {row['compile']:9.1f} {row['loss']:7.3f} "
            f"{ratio['median']:6.2f}  {ratio['quartiles'][0]:.2f}..{ratio['quartiles'][1]:.2f}"
        )
    for row in results["variants"]:
        if row["MFU of the published peak"]:
            peak = row["MFU of the published peak"]
            lines.append(f"of the published peak, {row['name']}: {peak['causal']:.1%} causal, {peak['full']:.1%} full")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve(Training())
    else:
        main()
