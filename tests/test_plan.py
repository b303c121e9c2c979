"""`llm-jax plan` as a user meets it: the table, the JSON, the advice and the errors."""

import json
import pathlib
import subprocess
import sys

import pytest

from llm_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "llama_1b.py")


@pytest.fixture
def plan(capsys):
    """Runs the command in this process: (exit code, standard output, standard error)."""

    def command(*flags: str, config: str = CONFIG) -> tuple[int, str, str]:
        code = cli.main(["plan", f"--config={config}", *flags])
        return code, *capsys.readouterr()

    return command


def test_table(plan):
    code, out, err = plan("--topology=v5e:4x4", "--price=1.2")
    assert (code, err) == (0, "")
    for text in (
        "v5e:4x4",
        "16 chips",
        "1.235 G parameters",
        "fsdp=16",
        "fits",
        "tokens/s",
        "chip-hours",
        "at the given",
    ):
        assert text in out, text
    assert max(map(len, out.splitlines())) <= 150


def test_json(plan):
    code, out, _ = plan("--topology=v5e:4x4", "--json", "--tokens=1e9", "--price=2")
    result = json.loads(out)
    memory = result["memory"]
    assert code == 0 and result["fits"] and result["mesh"]["fsdp"] == result["chips"] == 16
    assert memory["state"] == memory["parameters"] + memory["moments"] + memory["average"]
    assert memory["state"] < memory["peak"] < memory["available"]
    assert result["tokens"] == 1e9 and result["days"] == pytest.approx(1e9 / result["tokens_per_second"] / 86_400)
    assert result["chip_hours"] == pytest.approx(result["days"] * 24 * 16)
    assert result["cost"] == pytest.approx(2 * result["chip_hours"])
    seconds = result["seconds"]
    assert seconds["roofline_compute"] < seconds["products"] + seconds["attention"] < seconds["step"]
    assert 0 < result["mfu"] < result["mfu_full_attention"] < 1
    assert {exchange["what"] for exchange in result["exchanges"]} == {"weights", "tables"}
    assert "search" not in result and "compiled" not in result


def test_search(plan):
    code, out, _ = plan("--topology=v5e:4x4", "--search", "--json")
    found = json.loads(out)["search"]
    assert code == 0 and found[0]["mesh"]["fsdp"] == 16 and 1 < len(found) <= 10
    _, out, _ = plan("--topology=v5e:4x4", "--search")
    assert "Fastest meshes" in out and "fsdp=8" in out


def test_too_large_is_an_answer(plan):
    flags = ("--topology=v5e:4x4", "--config.train.batch_size=1024")
    code, out, _ = plan(*flags)
    assert code == 0 and "DOES NOT FIT" in out and "most is activations kept" in out
    assert "--config.train.microbatches=" in out and "--topology=v5e:" in out
    result = json.loads(plan(*flags, "--json")[1])
    assert not result["fits"]
    for flag, way in result["ways_to_fit"].items():
        changed = [f for f in flags if f.partition("=")[0] != flag.partition("=")[0]]
        again = json.loads(plan(*changed, flag, "--json")[1])
        assert again["fits"] and again["memory"]["peak"] == way["peak"]


def test_auto(plan):
    code, out, _ = plan("--topology=v5e:4x4", "--config.parallel.auto")
    assert code == 0 and "fsdp=16: fastest of" in out


def test_slices_and_gpus(plan):
    assert "replica: gradients" in plan("--topology=v5e:4x4", "--slices=2", "--config.parallel.replica=2")[1]
    code, out, _ = plan("--topology=h100:16", "--config.parallel.tensor=2")
    assert code == 0 and "nvlink" in out and "dcn" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "--topology"),
        (("--topology=v9:4x4",), "known: v4, v5e, v5p, v6e, v7x, a100, h100, h200, b200"),
        (("--topology=v5e:4x5",), "v5e:4x4"),
        (("--topology=v5e:4x4", "--config.parallel.fsdp=3"), "parallel.fsdp"),
        (("--topology=v5e:4x4", "--config.parallel.tensor=3"), "nearest mesh"),
        (("--topology=v5e:4x4", "--slices=2"), "parallel.replica=2"),
        (("--topology=v5e:4x4", "--config.train.batch_size=24"), "train.batch_size / train.microbatches=12"),
        (("--topology=v5e:4x4", "--slices=0"), "slices"),
        (("--topology=h100:8", "--compile"), "leave --compile out"),
    ],
)
def test_bad_input(plan, flags, message):
    code, out, err = plan(*flags)
    assert code == cli.BAD_INPUT and message in err and out == ""
    assert len(err.splitlines()) == 1


def test_touches_no_device_and_loads_no_data():
    """In a process of its own: no backend of JAX is started, and the libraries for data and checkpoints stay out."""
    code = (
        "import sys; from llm_jax import cli; "
        f"assert cli.main(['plan', '--config={CONFIG}', '--topology=v5p:4x4x4', '--search']) == 0; "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized(); "
        "print([name for name in ('orbax', 'tensorflow_datasets', 'grain', 'sentencepiece') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
