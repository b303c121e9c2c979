"""launch/local.sh: several processes start, tell, fail, stop and go on as one."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import time

import pytest
from conftest import ROOT, Tiny
from test_train import record

SCRIPT = ROOT / "launch" / "local.sh"
SECONDS = 240  # so that a hang is a failure
LONG = ("--config.train.steps=1000000", "--config.optimizer.schedule=constant", "--config.log.sample_prompt=none")


class Local:
    """local.sh in a session of its own, as in a terminal; what it says goes to a file."""

    def __init__(self, folder: pathlib.Path, *arguments: str, environment: dict | None = None):
        self.output = folder / "output"
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                [SCRIPT, *arguments],
                env={**os.environ, **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def lines(self, process: int) -> list[str]:
        return re.findall(rf"^\[{process}\] (.*)$", self.text(), re.M)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not re.search(text, self.text(), re.M):
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()
            time.sleep(0.02)

    def wait(self) -> int:
        """Its exit code, when none of its processes is left."""
        code = self.process.wait(SECONDS)
        deadline = time.monotonic() + 5  # what has ended may not have been cleared away
        while subprocess.run(["pgrep", "-g", str(self.process.pid)], stdout=subprocess.DEVNULL).returncode == 0:
            assert time.monotonic() < deadline, f"left running:\n{self.text()}"
            time.sleep(0.02)
        return code

    def pids(self, last_argument: str) -> list[int]:
        """Of the processes of its session that run Python with it."""
        found = subprocess.run(["pgrep", "-g", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        arguments = {int(pid): pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1] for pid in found}
        return [pid for pid, words in arguments.items() if words and words[-1] == last_argument.encode()]

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


@pytest.fixture
def local(tmp_path):
    started = []

    def start(*arguments, **options) -> Local:
        started.append(Local(tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def program(folder: pathlib.Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/bash\nfor last; do :; done\nme=${{last#--process_id=}}\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_all_get_their_flags_and_their_arguments_unchanged(local, tmp_path):
    arguments = ["a  b", "it's", '"$HOME" `id`', "", "*"]
    command = program(tmp_path, "command", 'printf "<%s>" "$@"')
    running = local("--processes=3", "--", command, *arguments)
    assert running.wait() == 0
    port = re.search(r"3 processes, coordinator 127.0.0.1:(\d+)$", running.text(), re.M)[1]
    for process in range(3):
        told = [f"--coordinator=127.0.0.1:{port}", "--num_processes=3", f"--process_id={process}"]
        assert running.lines(process) == ["".join(f"<{argument}>" for argument in [*arguments, *told])]


def test_lines_of_output_stay_whole(local, tmp_path):
    """They come as they are made, and the last one of each, too, which has no end."""
    parts = "for i in {1..200}; do printf part-; printf $me; printf 'err\\n' >&2; done; printf end$me"
    running = local("--processes=4", "--", program(tmp_path, "command", parts))
    assert running.wait() == 0
    for process in range(4):
        assert running.lines(process) == [f"part-{process}err"] * 200 + [f"end{process}"]


FIFO = "mkfifo never-$me 2>/dev/null; wait_for_term() { while :; do read -t 0.05 <>never-$me; done; }"


@pytest.mark.parametrize(
    "fails, code",
    [("exit 3", 3), ("kill -KILL $$", 137), ("kill -ABRT $$", 134), ("exit 75", 75), ("exit 78", 78)],
)
def test_the_first_failure_ends_all(fails, code, local, tmp_path):
    """Others have what they had to do, or end with 70, as those do that lose a process of their run."""
    script = f"""
cd {tmp_path}; {FIFO}
case $me in
0) trap "exit 0" TERM; echo waits; [[ {code} == 75 ]] && exit 75; wait_for_term ;;
1) until [[ -e never-0 && -e never-2 ]]; do read -t 0.05 <>never-1; done; {fails} ;;
2) trap "exit 70" TERM; [[ {code} == 75 ]] && exit 75; wait_for_term ;;
3) exit 0 ;;
esac"""
    running = local("--processes=4", "--", program(tmp_path, "command", script))
    assert running.wait() == code, running.text()
    assert re.search(rf"^local.sh: process \d was the first to end, with exit code {code}$", running.text(), re.M)


def test_what_does_not_end_is_killed(local, tmp_path):
    script = f"""
trap '' TERM; cd {tmp_path}; {FIFO}
[[ $me == 0 ]] && wait_for_term
until [[ -e never-0 ]]; do read -t 0.05 <>never-1; done
exit 70"""
    running = local("--processes=2", "--grace=0", "--", program(tmp_path, "command", script))
    assert running.wait() == 70
    assert "local.sh: killed, 0 s later: process 0\n" in running.text()


@pytest.mark.parametrize("number, everywhere", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_signal_stops_all_and_their_code_comes_back(number, everywhere, local, tmp_path):
    """By one TERM each, also if the terminal sends Ctrl-C to all of them."""
    script = f"cd {tmp_path}; {FIFO}; told() {{ echo told; exit 75; }}; trap told TERM; echo waits; wait_for_term"
    running = local("--processes=3", "--", program(tmp_path, "command", script))
    for process in range(3):
        running.wait_for(rf"^\[{process}\] waits")
    (os.killpg if everywhere else os.kill)(running.process.pid, number)
    assert running.wait() == 75, running.text()
    assert [running.lines(process) for process in range(3)] == [["waits", "told"]] * 3


def test_those_that_term_kills_had_nothing_to_save(local, tmp_path):
    running = local("--processes=3", "--", program(tmp_path, "command", "echo waits; exec sleep 600"))
    for process in range(3):
        running.wait_for(rf"^\[{process}\] waits")
    running.process.terminate()
    assert running.wait() == 75, running.text()


def test_a_second_ctrl_c_kills(local, tmp_path):
    script = f"cd {tmp_path}; {FIFO}; trap 'echo told' TERM; echo waits; wait_for_term"
    running = local("--processes=2", "--", program(tmp_path, "command", script))
    for word in ("waits", "told"):
        for process in range(2):
            running.wait_for(rf"^\[{process}\] {word}")
        running.process.send_signal(signal.SIGINT)
    assert running.wait() == 137


@pytest.mark.parametrize(
    "processes, visible, listed, seen",
    [
        (2, "3,GPU-5a", None, ["3", "GPU-5a"]),
        (2, None, 4, ["0", "1"]),
        (3, "0,1", 4, "--processes=3, but there are 2 GPUs (CUDA_VISIBLE_DEVICES=0,1), and each needs its own"),
        (1, "", 4, "--processes=1, but there are 0 GPUs (CUDA_VISIBLE_DEVICES=), and each needs its own"),
        (3, None, 2, "--processes=3, but there are 2 GPUs, and each needs its own"),
        (2, None, 0, "nvidia-smi -L says: NVIDIA-SMI has failed"),
    ],
)
def test_one_gpu_each(processes, visible, listed, seen, local, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lines = "\n".join(f"echo 'GPU {number}: NVIDIA H100 (UUID: GPU-{number})'" for number in range(listed or 0))
    program(tmp_path, "nvidia-smi", lines or "echo 'NVIDIA-SMI has failed' >&2; exit 9")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = program(tmp_path, "command", "echo gpu $CUDA_VISIBLE_DEVICES")
    running = local(f"--processes={processes}", "--gpus", "--", command, environment=environment)
    if isinstance(seen, list):
        assert running.wait() == 0
        assert [running.lines(process) for process in range(processes)] == [[f"gpu {gpu}"] for gpu in seen]
    else:
        assert running.wait() == 78
        assert running.text().count("\n") == 1 and seen in running.text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--processes=2"], "no command; give it after --"),
        (["--processes=0", "--", "true"], "--processes=0 must be a number from 1"),
        (["--", "true"], "--processes= must be a number"),
        (["--process=2", "--", "true"], "--process=2 is no flag of this"),
        (["--processes=2", "--", "no-such-command"], "no-such-command: no such command"),
        (["--processes=2", "--grace=soon", "--", "true"], "--grace=soon must be a number"),
    ],
)
def test_bad_use(arguments, message, local):
    running = local(*arguments)
    assert running.wait() == 78
    assert running.text().count("\n") == 1 and f"local.sh: {message}" in running.text()


def test_help_and_dry_run_start_nothing(local, tmp_path):
    running = local("--help")
    assert running.wait() == 0 and "--processes=N" in running.text() and "set -e" not in running.text()
    for flag in ("--dry_run", "--dry-run"):
        running = local("--processes=2", flag, "--", "touch", f"{tmp_path}/a b")
        assert running.wait() == 0
        commands = [shlex.split(line) for line in running.text().splitlines()]
        assert [command[:2] for command in commands] == [["touch", f"{tmp_path}/a b"]] * 2
        assert [command[-2:] for command in commands] == [["--process_id=0", "&"], ["--process_id=1", "&"]]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def environment_of(tiny: Tiny) -> dict:
    return tiny.environment | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in record(workdir)]


@pytest.mark.soak
def test_one_of_four_is_killed_all_end_and_the_same_command_goes_on(trained, tiny, local, tmp_path):
    """To the losses of a run that nothing has happened to."""
    victim = 2
    workdir = tmp_path / "run"
    flags = ["--config.log.sample_prompt=none", "--config.evaluate.every=1"]  # which takes time
    arguments = ["--processes=4", "--", *tiny.command("train", workdir, *flags)]
    running = local(*arguments, environment=environment_of(tiny))
    running.wait_for(rf"^\[{victim}\] processes: ")
    (pid,) = running.pids(f"--process_id={victim}")
    running.wait_for(r"^\[0\] step 10/")
    os.kill(pid, signal.SIGKILL)
    assert running.wait() == 137, running.text()
    assert f"local.sh: process {victim} was the first to end, with exit code 137" in running.text()
    assert 10 <= max(step for step, _ in losses(workdir)) < 24
    running = local(*arguments, environment=environment_of(tiny))
    assert running.wait() == 0, running.text()
    assert re.search(r"goes on from step [1-9]", running.text())
    assert [step for step, _ in losses(workdir)] == list(range(1, 25))
    undisturbed = dict(losses(trained))
    assert dict(losses(workdir)) == pytest.approx(undisturbed, rel=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_stopped_has_saved(number, tiny, local, tmp_path):
    """Ctrl-C in a terminal goes to all processes in it."""
    workdir = tmp_path / "run"
    command = tiny.command("train", workdir, *LONG, "--config.checkpoint.every=1000000")
    running = local("--processes=2", "--", *command, environment=environment_of(tiny))
    running.wait_for(r"^\[0\] step 5/")
    (os.killpg if number == signal.SIGINT else os.kill)(running.process.pid, number)
    assert running.wait() == 75, running.text()
    saved = losses(workdir)[-1][0]
    assert f"[0] preempted: saved step {saved}" in running.text()
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(saved)]


@pytest.mark.soak
def test_one_process(tiny, local, tmp_path):
    workdir = tmp_path / "run"
    command = tiny.command("train", workdir, "--config.log.sample_prompt=none")
    running = local("--processes=1", "--", *command, environment=environment_of(tiny))
    assert running.wait() == 0, running.text()
    assert len(losses(workdir)) == 24
