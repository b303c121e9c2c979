"""Jobs of a real Slurm, by launch/slurm.sbatch: each ends, or comes back, as its user expects."""

import json
import pathlib
import subprocess
import sys

import pytest
from conftest import CONFIG, ROOT
from slurm import NODES, Job, Slurm, cluster, what_is_missing
from test_train import record

SCRIPT = ROOT / "launch" / "slurm.sbatch"
# So slow that there is time to disturb it, but at its full speed when it comes back.
SLOW = """
import os, time
from llm_jax.cli import entry
from llm_jax.jobs.record import Record
training = Record.training
def slowly(self, step, metrics):
    if step > 5 and "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(PAUSE)
    training(self, step, metrics)
Record.training = slowly
entry()
"""
ARGUMENTS = ["a b", "'", '"', "$HOME", "*", "", "\\", "two\nlines", "--x=`id`"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if missing := what_is_missing():
        pytest.skip(missing)
    with cluster(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture
def submit(slurm, tiny, tmp_path):
    """Hands in a job of two tasks on a node each; its home, and where it writes, is tmp_path."""
    environment = {**tiny.environment, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def submit(*command: str, flags: tuple[str, ...] = (), name: str = "job", cwd: pathlib.Path = ROOT) -> Job:
        flags = ("--nodes=2", "--ntasks-per-node=1", *flags)
        return Job(slurm, tmp_path / f"{name}.log", *flags, str(SCRIPT), *command, cwd=cwd, environment=environment)

    return submit


def training(workdir: pathlib.Path, pause: int = 2) -> list[str]:
    """The heartbeat is for loaded machines; pause: seconds."""
    flags = [f"--config={CONFIG}", f"--workdir={workdir}", "--config.parallel.heartbeat_seconds=60"]
    return ["--", sys.executable, "-c", f"PAUSE = {pause}{SLOW}", "train", *flags]


def preempt(slurm: Slurm, tmp_path: pathlib.Path) -> Job:
    command = ("--partition=high", "--nodes=2", "--exclusive", "--wrap=exit")
    return Job(slurm, tmp_path / "high.log", *command, cwd=tmp_path, environment=slurm.environment)


def check_losses(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    lines, expected = record(workdir), record(undisturbed)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-6)
    loss, expected = (
        json.loads((path / "evaluate.json").read_text())["all"]["loss"] for path in (workdir, undisturbed)
    )
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.soak
def test_a_job_comes_back_from_its_checkpoint_after_preemption(slurm, submit, trained, tmp_path):
    job = submit("--restarts=0", *training(tmp_path / "run"))
    job.wait_for("step 5/")
    assert preempt(slurm, tmp_path).end() == ("COMPLETED", "0", "0")
    job.wait_until_queued_again(1)
    assert "preempted: saved step" in job.text()
    assert job.end() == ("COMPLETED", "0", "1"), job.text()
    assert "goes on from step" in job.text()
    check_losses(tmp_path / "run", trained)


@pytest.mark.soak
def test_the_time_limit_is_no_end(submit, trained, tmp_path):
    job = submit("--restarts=0", *training(tmp_path / "run"))
    job.wait_for("step 5/")
    job.update(TimeLimit=1)  # minutes; the notice comes 3 minutes before the end
    job.wait_until_queued_again(1)
    assert "preempted: saved step" in job.text()
    job.update(TimeLimit=10)
    assert job.end() == ("COMPLETED", "0", "1"), job.text()
    assert "goes on from step" in job.text()
    check_losses(tmp_path / "run", trained)


@pytest.mark.soak
def test_a_second_job_is_refused_and_scancel_saves(submit, tmp_path):
    first = submit(*training(tmp_path / "run", pause=4), name="first")
    first.wait_for("step 5/")
    second = submit(*training(tmp_path / "run"), name="second")
    assert second.end() == ("FAILED", "78", "0"), second.text()
    assert "is being trained by another process" in second.text()
    before = len(record(tmp_path / "run"))
    first.slurm.wait_until(lambda: len(record(tmp_path / "run")) > before, "step of the first job")

    first.slurm.call("scancel", first.number)
    assert first.end() == ("CANCELLED", "75", "0"), first.text()
    saved = record(tmp_path / "run")[-1]["step"]
    assert f"preempted: saved step {saved}" in first.text()
    assert str(saved) in {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}


@pytest.mark.soak
def test_a_job_comes_back_when_a_node_fails(slurm, submit, trained, tmp_path):
    job = submit(*training(tmp_path / "run"))
    job.wait_for("step 5/")
    slurm.wait_until((tmp_path / "run" / "checkpoints" / "4").exists, "checkpoint")
    slurm.fail_node(NODES[1])
    job.wait_until_queued_again(1)
    slurm.start_node(NODES[1])
    assert job.end() == ("COMPLETED", "0", "1"), job.text()
    assert "goes on from step" in job.text()
    check_losses(tmp_path / "run", trained)


def test_requeue_by_hand(slurm, submit):
    """The command gets its notice, and is started again once, not twice."""
    script = 'trap "echo told; exit 75" TERM; echo up; for i in {1..600}; do sleep 0.1; done'
    job = submit("--", "bash", "-c", f"[[ $SLURM_RESTART_COUNT ]] || {{ {script}; }}")
    job.wait_for("1: up")
    job.wait_for("0: up")
    slurm.call("scontrol", "requeue", job.number)
    job.wait_until_queued_again(1)
    assert job.end() == ("COMPLETED", "0", "1"), job.text()
    assert "0: told" in job.text() and "1: told" in job.text()


@pytest.mark.parametrize(
    "codes, end",
    [
        # A notice between two crashes: they are not in a row.
        pytest.param("70 75 137 0", ("COMPLETED", "0", "3"), marks=pytest.mark.soak),
        ("70 137", ("FAILED", "137", "1")),
        ("78", ("FAILED", "78", "0")),
    ],
)
def test_what_follows_an_exit_code(codes, end, submit):
    """With one crash in a row allowed. After 78, the other task ends with a larger code, having lost this one."""
    script = f"""
        codes=({codes})
        code=${{codes[SLURM_RESTART_COUNT]}}
        ((SLURM_PROCID && code == 78)) && exit 134
        exit "$code"
    """
    job = submit("--restarts=1", "--", "bash", "-c", script)
    for restart in range(1, len(codes.split())):
        job.wait_until_queued_again(restart)
    assert job.end() == end, job.text()


def test_what_reaches_the_command(submit, tmp_path):
    """Its arguments as they are, the secrets, the programs of the virtual environment, and the folder of sbatch; also
    where a cluster hands no environment on."""
    (tmp_path / "secrets").write_text("TOKEN=a secret\n")
    (tmp_path / "secrets").chmod(0o600)
    program = tmp_path / "llm_jax_venv" / "bin" / "show"
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"path = '{tmp_path}/' + os.environ['SLURM_PROCID'] + '.json'\n"
        "json.dump([sys.argv[1:], os.getcwd(), os.environ['TOKEN']], open(path, 'w'))\n"
    )
    program.chmod(0o755)
    folder = tmp_path / "a folder"
    folder.mkdir()
    job = submit(
        f"--code={ROOT}", "--env_file=../secrets", f"--run_dir={tmp_path}/the tasks", "--", "show", *ARGUMENTS,
        flags=(f"--export=LLM_JAX_VENV={tmp_path}/llm_jax_venv",), cwd=folder,
    )  # fmt: skip
    assert job.end() == ("COMPLETED", "0", "0"), job.text()
    for task in range(2):
        assert json.loads((tmp_path / f"{task}.json").read_text()) == [ARGUMENTS, str(folder), "a secret"]
        assert (tmp_path / "the tasks" / str(task) / "exit").read_text() == "0\n"
    assert "a secret" not in job.text()


def test_the_code_is_not_there(submit, tmp_path):
    job = submit("--", "true", cwd=tmp_path)
    assert job.end() == ("FAILED", "78", "0")
    assert f"{tmp_path} holds no launch/run_host.sh; call sbatch in the folder of llm_jax, or give" in job.text()


def bash(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_dry_run_shows_the_command():
    done = bash(str(SCRIPT), "--dry_run", "--", "llm-jax", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    shown = bash("-c", f"srun() {{ printf '%s\\0' \"$@\"; }}\n{done.stdout}").stdout.split("\0")[:-1]
    assert shown[-len(ARGUMENTS) - 2 :] == ["--", "llm-jax", *ARGUMENTS]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no command; give it after --"),
        (
            ["--nodes=2", "--", "true"],
            "--nodes=2 is no flag of this; see --help, put those of sbatch before the script",
        ),
        (["--restarts=x", "--", "true"], "--restarts=x must be a number"),
        (["--", "true"], "this is for sbatch"),
    ],
)
def test_bad_use(arguments, message):
    done = bash(str(SCRIPT), *arguments)
    assert done.returncode == 78
    assert done.stderr.startswith(f"slurm.sbatch: {message}") and done.stderr.count("\n") == 1


def test_help_is_the_head_of_the_file():
    done = bash(str(SCRIPT), "--help")
    assert done.returncode == 0
    assert "sbatch [sbatch flags] launch/slurm.sbatch [flags] -- COMMAND..." in done.stdout and "#" not in done.stdout
