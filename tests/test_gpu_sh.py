"""benchmarks/gpu.sh with a stub for what it measures: what it runs, in which order, and how it goes on."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from llm_jax.config import validate
from llm_jax.flags import load_config_file, override

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

# Notes each measurement and makes up its figures: FAIL names one that fails, WRONG is the error of attention by cuDNN.
STUB = f"""
import json, os, pathlib, sys
program, *arguments = sys.argv[1:]
if program.endswith("gpu_results.py"):
    os.execv({sys.executable!r}, [{sys.executable!r}, program, *arguments])
figures = pathlib.Path(next(a for a in arguments if a.startswith("--json=")).removeprefix("--json="))
with open(os.environ["NOTES"], "a") as notes:
    environment = {{name: os.environ.get(name) for name in ("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION",
                                                          "JAX_OPTIMIZATION_LEVEL")}}
    notes.write(json.dumps([figures.stem, program, arguments, environment]) + chr(10))
if figures.stem == os.environ.get("FAIL"):
    sys.exit("RESOURCE_EXHAUSTED: out of memory")
times = {{"forward": {{"median": 0.001}}, "forward and backward": {{"median": 0.003}}}}
def kernel(name, error):
    return {{"implementation": name, "dtype": "bfloat16", "sizes": "1 x 8", "seconds": times,
            "error of the output": 2e-3, "error of the worst gradient": error}}
found = {{"machine": {{}}, "kernels": [kernel("reference", 3e-3), kernel("cudnn", float(os.environ["WRONG"]))]}}
if program.endswith("train.py"):
    mfu = {{"causal": 0.35, "full": 0.4}}
    found = {{"machine": {{}}, "ceilings": {{}}, "variants": [{{"tokens/s": 430000.0, "step": {{"median": 0.15}},
             "MFU of the published peak": mfu, "MFU": mfu, "memory": 6e10, "compile": 40.0, "loss": 5.0,
             "device": "1 x H200"}}]}}
figures.write_text(json.dumps(found))
"""


class Sitting:
    def __init__(self, folder: pathlib.Path):
        self.out, self.notes = folder / "out", folder / "notes"
        stub, card = folder / "stub.py", folder / "nvidia-smi"
        stub.write_text(STUB)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {stub} "$@"\n')
        card.write_text("#!/bin/sh\necho 143771\n")
        for program in (python, card):
            program.chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "NOTES": str(self.notes), "WRONG": "4e-3", "XLA_FLAGS": ""}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [SCRIPT, f"--out={self.out}", *arguments]
        return subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, cwd="/", timeout=300
        )

    def measured(self) -> list:
        return [json.loads(line) for line in self.notes.read_text().splitlines()] if self.notes.exists() else []

    def results(self) -> dict[str, dict]:
        rows = [json.loads(line) for line in (self.out / "results.jsonl").read_text().splitlines()]
        return {row["name"]: row for row in rows}


@pytest.fixture
def sitting(tmp_path):
    return Sitting(tmp_path)


def test_everything_once_by_valid_configs_and_a_table_at_the_end(sitting):
    done = sitting.run()
    assert done.returncode == 0, done.stderr
    measured = sitting.measured()
    names = [name for name, *_ in measured]
    assert len(names) == len(set(names)) > 25 and set(sitting.results()) == set(names)
    assert all(name.startswith("attention-") for name in names[:7]) and names[7:10] == ["124m", "1b3", "8b"]
    loaded = {}
    for name, program, arguments, environment in measured:
        flags = [argument for argument in arguments if argument.startswith("--config.")]
        file = next(a.removeprefix("--config=") for a in arguments if a.startswith("--config="))
        assert (ROOT / program).exists()
        loaded[name] = override(load_config_file(str(ROOT / file)), flags)
        validate(loaded[name])
        changed = environment["XLA_FLAGS"].split()[1:], environment["JAX_OPTIMIZATION_LEVEL"]
        assert environment["XLA_FLAGS"].split()[0].startswith("--xla_gpu_per_fusion_autotune_cache_dir=")
        assert len(changed[0]) + (changed[1] is not None) <= 1
        assert environment["XLA_CLIENT_MEM_FRACTION"] == ("0.95" if name.endswith("-memory") else "0.9")
    assert loaded["124m"].train.sequence_length == loaded["1b3"].train.sequence_length == 1024
    assert loaded["8b"].train.sequence_length == 4096 and loaded["124m-muon"].optimizer.name == "muon"
    table = done.stdout[done.stdout.rindex("attention-124m ") :].splitlines()
    assert len(table) == len(names) and all(line.startswith(name) for line, name in zip(table, names, strict=True))
    assert "430,000 tokens/s, MFU 35.0%" in done.stdout

    assert sitting.run().returncode == 0  # nothing is left
    assert sitting.measured() == measured


def test_goes_on_after_a_failure_and_another_sitting(sitting):
    late = sitting.run("--minutes=0")
    assert late.returncode == 0 and "124m: not measured, the 0 minutes are over" in late.stdout
    assert sitting.measured() == []
    done = sitting.run("--only=^(124m|1b3|124m-triton)$", FAIL="1b3")
    assert done.returncode == 0 and "1b3: failed: RESOURCE_EXHAUSTED: out of memory" in done.stdout
    assert list(sitting.results()) == ["124m", "1b3", "124m-triton"]


def test_no_timing_with_attention_that_is_wrong(sitting):
    done = sitting.run(WRONG="0.5")
    assert done.returncode == 1
    assert "attention-8b: cudnn in bfloat16: gradient off by 5.0e-01, reference 3.0e-03" in done.stdout
    assert {name.split("-")[0] for name, *_ in sitting.measured()} == {"attention"}


def test_nan_is_wrong(sitting):
    assert sitting.run("--only=^attention-124m$", WRONG="nan").returncode == 1


def test_bad_flags_and_a_machine_without_a_gpu_are_told(sitting):
    done = sitting.run("--minute=3")
    assert done.returncode == 78 and "--minute=3: no such flag" in done.stderr
    (sitting.out.parent / "nvidia-smi").unlink()
    done = sitting.run(PATH=f"{sitting.out.parent}:/usr/bin:/bin")
    assert done.returncode == 78 and "no nvidia-smi" in done.stderr


def parsed(flags: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_xla_knows_the_flags():
    """Or the process would be aborted on the day."""
    flags = sorted(set(re.findall(r"--xla_gpu_[\w=]+", SCRIPT.read_text())))
    assert len(flags) >= 6
    done = parsed(flags)
    assert done.returncode == 0, done.stderr
    assert parsed(["--xla_gpu_no_such_flag=true"]).returncode != 0
