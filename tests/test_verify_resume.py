"""The certificate is given where a run resumes exactly, and not where anything differs."""

import hashlib
import json
import shutil

import pytest

from llm_jax.jobs.verify_resume import compare, describe
from llm_jax.jobs.workdir import Workdir


def test_a_certificate(tiny, tmp_path):
    folder = tmp_path / "certificate"
    done = tiny.run("verify-resume", folder, "--steps=6", "--kills=1")
    assert done.returncode == 0, done.stderr
    assert "same mesh: bit-identical" in done.stdout and "HOLDS" in done.stdout
    certificate = json.loads((folder / "certificate.json").read_text())
    result = certificate["same_mesh"]
    assert certificate["holds"] and result["largest_relative_difference"] == 0
    (step,) = result["resumed_from"]  # not from the beginning, which would prove nothing
    assert 2 <= step < 6 and f"goes on from step {step}," in (folder / "killed" / "output.txt").read_text()
    assert {2, 4, 6} <= set(result["checkpoints_compared"])
    signature = certificate.pop("sha256")
    assert signature == hashlib.sha256(json.dumps(certificate, sort_keys=True).encode()).hexdigest()
    again = tiny.run("verify-resume", folder, "--steps=6", "--kills=1")
    assert again.returncode == 78 and "is not empty" in again.stderr


@pytest.mark.soak
def test_a_certificate_for_several_processes_and_another_mesh(tiny, tmp_path):
    flags = ("--steps=6", "--kills=1", "--processes=2", "--mesh=fsdp=2,tensor=2", "--other_devices=4")
    done = tiny.run("verify-resume", tmp_path / "certificate", *flags)
    assert done.returncode == 0, done.stderr
    certificate = json.loads((tmp_path / "certificate" / "certificate.json").read_text())
    assert certificate["processes"] == 2 and certificate["same_mesh"]["largest_relative_difference"] == 0
    assert certificate["other_mesh"]["resumed_from"] and certificate["other_mesh"]["holds"]
    assert "as {'fsdp': 2, 'tensor': 2}" in (tmp_path / "certificate" / "other_mesh" / "output.txt").read_text()


@pytest.mark.parametrize("mesh", ["fsdp", "fsdp=0", "rows=2", "fsdp=2,,"])
def test_a_mesh_that_is_none(mesh, tiny, tmp_path):
    done = tiny.run("verify-resume", tmp_path / "certificate", f"--mesh={mesh}")
    assert done.returncode == 78 and f"--mesh={mesh}: " in done.stderr


@pytest.fixture
def pair(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return Workdir(trained), Workdir(tmp_path / "run")


def edit(work, step, **fields):
    lines = [json.loads(line) for line in work.metrics.read_text().splitlines()]
    for line in lines:
        if line["step"] == step and "kind" not in line:
            line.update(fields)
    work.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_equal_runs(pair):
    result = compare(*pair, 24, tolerance=0.0)
    assert result["holds"] and describe(result) == "bit-identical"


def test_the_last_bit_of_a_loss(pair):
    lines = [json.loads(line) for line in pair[1].metrics.read_text().splitlines()]
    loss = next(line["loss"] for line in lines if line["step"] == 9 and "kind" not in line)
    edit(pair[1], 9, loss=loss * (1 + 1e-7))
    result = compare(*pair, 24, tolerance=0.0)
    assert not result["holds"] and result["first_other_loss"] == 9
    assert compare(*pair, 8, tolerance=0.0)["holds"]
    assert compare(*pair, 24, tolerance=1e-4)["holds"]
    edit(pair[1], 9, loss=loss * 1.01)
    assert compare(*pair, 24, tolerance=1e-4)["first_other_loss"] == 9


def test_another_batch(pair):
    edit(pair[1], 4, batch="00000000")
    result = compare(*pair, 24, tolerance=1e-4)
    assert not result["holds"] and result["first_other_batch"] == 4 and "first other batch 4" in describe(result)


def test_a_missing_step(pair):
    assert compare(*pair, 25, tolerance=0.0)["missing_steps"] == [25]


def test_another_checkpoint(pair, tmp_path):
    shutil.rmtree(pair[1].checkpoints / "20")
    shutil.copytree(pair[1].checkpoints / "16", pair[1].checkpoints / "20")
    result = compare(*pair, 24, tolerance=0.0)
    assert not result["holds"] and result["first_other_checkpoint"] == 20
