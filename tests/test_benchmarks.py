"""The benchmarks run, and what they print is what was measured; their figures are no business of a test."""

import importlib
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, ROOT
from numpy.testing import assert_allclose

from llm_jax.config import Config, Model, Optimizer, Parallel, Tokenizer, Train, UserError, to_dict
from llm_jax.jobs.setup import Program
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import make_mesh
from llm_jax.training.state import model_shape

BENCHMARKS = ROOT / "benchmarks"
COMMANDS = ("data", "decode", "kernels", "loader", "safety", "scaling", "startup", "train")


@pytest.fixture
def load(monkeypatch):
    """Imports a file of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def small() -> Config:
    return Config(
        model=Model(
            num_layers=1, width=32, num_heads=4, activation="gelu", norm="layernorm", position="learned",
            tie_embeddings=True,
        ),
        tokenizer=Tokenizer(vocab_size=300),
        optimizer=Optimizer(warmup_steps=0, schedule="constant"),
        train=Train(batch_size=8, sequence_length=32),
    )  # fmt: skip


def test_no_command_is_left_out():
    with_main = {path.stem for path in BENCHMARKS.glob("*.py") if "def main()" in path.read_text()}
    assert with_main == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(load, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        load(name).main()
    assert ended.value.code == 0 and f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_peers_answer_fail_and_end(load):
    peers = load("peers")
    program = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import os, peers\n"
        "class Target:\n"
        "    def add(self, a, b): print('not an answer'); return a + b\n"
        "    def wrong(self): raise KeyError('k')\n"
        "    def leave(self): os._exit(3)\n"
        "peers.serve(Target())"
    )
    peer = peers.Peer([sys.executable, "-c", program], dict(os.environ))
    try:
        assert peer.call("add", [1], [2]) == [1, 2]
        with pytest.raises(peers.Failed, match="wrong: KeyError"):
            peer.call("wrong")
        assert peer.call("add", 1, 2) == 3
        with pytest.raises(peers.Failed, match="leave: the process ended with 3"):
            peer.call("leave")
    finally:
        peer.close()


def test_variants_change_fields_and_the_environment(load):
    train = load("train")
    name, config, environment = train.read_variant(
        small(),
        "train.batch_size=16,XLA_FLAGS=--a=1 --b=2,model.pattern=dense,moe,model.num_layers=2,model.num_experts=4",
    )
    assert name.startswith("train.batch_size=16")
    assert config.train.batch_size == 16 and config.model.pattern == ("dense", "moe") and config.model.num_experts == 4
    assert environment == {"XLA_FLAGS": "--a=1 --b=2"}
    assert train.read_variant(small(), "") == ("the config", small(), {})
    with pytest.raises(UserError, match="model.wdth"):
        train.read_variant(small(), "model.wdth=3")


def test_torch_gets_the_same_sizes_or_nothing(load):
    train = load("train")
    sizes = train.torch_sizes(small())
    assert sizes == {
        "vocab": 300, "length": 32, "layers": 1, "width": 32, "heads": 4, "inner": 128, "epsilon": 1e-6,
    }  # fmt: skip
    gated = small()
    gated.model.activation = "swiglu"
    with pytest.raises(UserError, match="--against=torch knows"):
        train.torch_sizes(gated)
    with pytest.raises(UserError, match="has no torch"):
        train.require_torch("/bin/false")


def test_training_is_that_of_a_run(load, monkeypatch, tmp_path):
    device = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(hosts, "start", lambda *args, **options: None)  # JAX runs already
    config, side = small(), load("train").Training()
    made = side.make(to_dict(config), str(tmp_path))
    model, train = config.model, config.train
    weights = 12 * model.num_layers * model.width**2 + config.tokenizer.vocab_size * model.width
    norms, positions = (2 * model.num_layers + 1) * model.width, train.sequence_length * model.width
    assert made["parameters"] == weights + norms + positions
    # Palm, arXiv:2204.02311, appendix B
    full = 6 * weights + 12 * model.num_layers * model.width * train.sequence_length
    assert made["flops"]["full"] == full and made["flops"]["causal"] < full
    first = side.steps(1)["loss"]
    assert abs(first - math.log(config.tokenizer.vocab_size)) < 0.5
    assert side.steps(8)["loss"] < first  # the same batches again
    assert int(side.leaves[0]) == 10 and side.memory() > 1e6


def test_summary_of_training(load):
    """Two variants, the second with twice the tokens a step in the same time, and one step of three disturbed."""
    train = load("train")
    double = small()
    double.train.batch_size *= 2
    made = {"flops": {"causal": 1e6, "full": 2e6}, "devices": 2, "dtype": "float32", "published": None, "compile": 1.0}
    made |= {"device": "2 x cpu", "parameters": 7}
    sides = [
        train.Side(name=name, peer=None, config=config, made=made, seconds=[0.5, 5.0, 0.5], cpu=[1.0] * 3, memory=1e9)
        for name, config in (("one", small()), ("two", double))
    ]
    measured = [{"float32": 1e9, "bfloat16": 1.0, "copy": 5.0}, {"float32": 0.5e9, "bfloat16": 4e9, "copy": 2.0}]
    results = train.summarize(sides, measured)
    assert results["ceilings"] == {"float32": 1e9, "bfloat16": 4e9, "copy": 5.0}
    one, two = results["variants"]
    rate = 8 * 32 / 0.5
    assert (one["tokens/s"], two["tokens/s"]) == (rate, 2 * rate)
    assert two["tokens/s over those of the first"]["median"] == 2
    assert_allclose(one["MFU"]["causal"], rate * 1e6 / 2 / 1e9)
    assert_allclose(two["MFU"]["full"], 2 * rate * 2e6 / 2 / 1e9)
    printed = train.table(results)
    assert "one" in printed and "1,024" in printed


def test_errors_of_kernels_are_relative(load):
    kernels = load("kernels")
    arrays = (jnp.arange(1.0, 9.0),)
    with jax.set_mesh(make_mesh(Parallel(), jax.devices()[:1])):
        implementations = {"reference": lambda x: 2 * x, "off": lambda x: 2.02 * x, "square": lambda x: x * x}
        exact, off, square = kernels.compare(implementations, arrays, repetitions=2)
    assert exact["error of the output"] == 0 and exact["seconds"]["forward"]["count"] == 2
    assert_allclose([off["error of the output"], off["error of the worst gradient"]], 0.01, rtol=1e-3)
    x = np.arange(1.0, 9.0)
    assert_allclose(square["error of the output"], np.linalg.norm(x * x - 2 * x) / np.linalg.norm(2 * x), rtol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "loss", "norm", "product"])
def test_kernels_equal_the_reference(load, kind):
    kernels, config = load("kernels"), small()
    make = {
        "attention": kernels.attentions, "loss": kernels.losses, "norm": kernels.norms, "product": kernels.products,
    }[kind]  # fmt: skip
    with jax.set_mesh(make_mesh(Parallel(), jax.devices()[:1])):
        shape = model_shape(config.model, vocab_size=300, sequence_length=32)
        _, implementations, arrays = make(config, shape, jnp.dtype("float32"), 3)
        rows = kernels.compare(implementations, arrays, repetitions=1)
    assert len(rows) == len(implementations)
    for row in rows:
        assert max(row["error of the output"], row["error of the worst gradient"]) < 1e-5


def test_decoding(load):
    decode, config = load("decode"), small()
    program = Program(config, 300, jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        model = jax.jit(program.init)().parameters
        (row,) = decode.measure(program, model, [2], prompt=4, new=3, repetitions=2)
    assert_allclose(row["decode, tokens/s"] * row["seconds of a new token"]["median"], 2)
    assert_allclose(row["prefill, tokens/s"] * row["seconds of a prefill"]["median"], 4 * 2)


def run(tiny, tmp_path, program: list[str]) -> dict:
    """The figures that a benchmark writes, as a process of its own on tests/tiny.py."""
    path = tmp_path / "figures.json"
    environment = tiny.environment | {"PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *program, f"--json={path}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.soak
def test_train_command(tiny, tmp_path):
    flags = ["--steps=2", "--variant=", "--variant=train.microbatches=2,GLIBC_TUNABLES=", f"--config={CONFIG}"]
    found = run(tiny, tmp_path, ["benchmarks/train.py", *flags])
    assert found["machine"]["versions"]["jax"] == jax.__version__
    one, two = found["variants"]
    assert one["config"]["train"]["microbatches"] == 1 and two["config"]["train"]["microbatches"] == 2
    assert 0 < max(one["loss"], two["loss"]) < math.log(400) + 0.5
    assert min(found["ceilings"].values()) > 1e8 and len(one["seconds"]) == 2


@pytest.mark.soak
def test_loader_command(tiny, tmp_path):
    flags = ["--sizes=4x16,2x64", "--steps=20", "--tokens_per_second=100", f"--config={CONFIG}"]
    found = run(tiny, tmp_path, ["benchmarks/loader.py", *flags])
    assert [row["length"] for row in found["loader"]] == [16, 64]
    assert found["seconds of an iteration"]["thread"]["median"] > 0


@pytest.mark.soak
def test_startup_command(tiny, tmp_path):
    found = run(tiny, tmp_path, ["benchmarks/startup.py", "--repetitions=1", f"--config={CONFIG}"])["startup"]
    cold = found["first step, data prepared, nothing compiled"]["of which"]
    warm = found["first step, all of it there (goal: 15 s)"]["of which"]
    assert cold["compile"] > 0 and warm["prepare"] < found["first step, nothing prepared"]["of which"]["prepare"]


@pytest.mark.soak
def test_safety_command(tiny, tmp_path):
    sizes = {"SHORT_PAIRS": 12, "LONG_PAIRS": 1, "STEP_SECONDS": 0.05, "NUM_ARRAYS": 2, "ARRAY_WIDTH": 64}
    program = f"import safety, pathlib; vars(safety).update({sizes}, QUICKSTART=pathlib.Path({str(CONFIG)!r}))"
    found = run(tiny, tmp_path, ["-c", f"{program}; safety.main()", "--skip=faults", f"--folder={tmp_path}"])
    assert found["overhead"]["calls around the update"]["median"] > 0
    assert found["saves"]["save until verified"]["median"] > found["saves"]["save() blocks the loop"]["median"]
