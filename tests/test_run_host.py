"""launch/run_host.sh: what it runs, how it ends, and what it leaves, with real processes and signals."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SCRIPT = ROOT / "launch" / "run_host.sh"
SECONDS = 60  # so that a hang is a failure


def until(reached, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline, f"no {what} in {SECONDS} s"
        time.sleep(0.02)


def text(path: pathlib.Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Host:
    """A home of its own, in which run_host.sh runs; whatever it has started ends with the test."""

    def __init__(self, home: pathlib.Path):
        self.home = home
        self.run_dir = home / "llm_jax_run"
        self.log = self.run_dir / "log"
        self.exit = self.run_dir / "exit"
        self.programs = home / "programs"
        self.programs.mkdir()
        self.environment = {**os.environ, "HOME": str(home), "PATH": f"{self.programs}:{os.environ['PATH']}"}
        self.environment.pop("LLM_JAX_VENV", None)
        self.started = []

    def program(self, name: str, script: str) -> pathlib.Path:
        path = self.programs / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return path

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True} | options
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background
        process = subprocess.Popen([SCRIPT, *arguments], env=self.environment, **options)
        self.started.append(process)
        return process

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=SECONDS)
        return subprocess.CompletedProcess(arguments, process.returncode, out.decode(), err.decode())

    def starts(self) -> int:
        return len(re.findall(r"^run_host.sh: .* starts: ", text(self.log), re.M))

    def end_all(self) -> None:
        for process in self.started:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    host.end_all()


@pytest.fixture
def pauses(host):
    """Pauses take no time, and are counted."""
    host.program("sleep", f"echo $1 >>{host.home}/slept; exec /bin/sleep 0")
    return lambda: sum(float(line) for line in text(host.home / "slept").split() if float(line) >= 1)


def ending_with(host: Host, *ends: str) -> pathlib.Path:
    """A command that ends with the first at its first start, with the second at its second, and so on."""
    cases = "\n".join(f"{number}) {end} ;;" for number, end in enumerate(ends, 1))
    return host.program("command", f"echo >>{host.home}/n\ncase $(wc -l <{host.home}/n) in\n{cases}\nesac")


ABORT, KILL = "kill -ABRT $$", "kill -KILL $$"


@pytest.mark.parametrize(
    "ends, restarts, code, starts, paused",
    [
        (["exit 0"], 10, 0, 1, 0),
        (["exit 78"], 10, 78, 1, 0),
        (["exit 75", "exit 75", "exit 75", "exit 0"], 1, 0, 4, 0),
        (["exit 70", "exit 1", "exit 0"], 2, 0, 3, 5 + 10),
        (["exit 70", ABORT, KILL], 2, 137, 3, 5 + 10),
        ([ABORT, "exit 75", "exit 70", "exit 0"], 1, 70, 3, 5),
        (["exit 70"] * 5 + ["exit 78"], 10, 78, 6, 5 + 10 + 20 + 40 + 80),
        (["exit 75"], 0, 75, 1, 0),
        (["exit 70"], 0, 70, 1, 0),
        ([ABORT], 0, 134, 1, 0),
    ],
)
def test_what_follows_an_exit_code(ends, restarts, code, starts, paused, host, pauses):
    done = host.run(f"--restarts={restarts}", "--", str(ending_with(host, *ends)))
    assert done.returncode == code, done.stdout
    assert host.exit.read_text() == f"{code}\n"
    assert host.starts() == starts and pauses() == paused
    assert len(re.findall(r"^run_host.sh: \S+Z exit code \d+ after \d+ s; ", text(host.log), re.M)) == starts


def test_a_start_that_lived_for_an_hour_forgets_crashes(host, pauses):
    """By a clock of its own: each second look at it is an hour later than the first."""
    clock = f'[[ $1 == -u ]] && exec /bin/date "$@"\necho >>{host.home}/looks\n'
    host.program("date", clock + f"echo $(($(wc -l <{host.home}/looks) * 3600))")
    done = host.run("--restarts=1", "--", str(ending_with(host, *["exit 70"] * 5, "exit 0")))
    assert done.returncode == 0, done.stdout
    assert host.starts() == 6 and pauses() == 5 * 5


def test_arguments_and_output_are_passed_on_unchanged(host, tmp_path):
    """Also bytes that are no text, and a last line without an end."""
    arguments = ["a  b", "it's", '"$HOME" `id` \\', "two\nlines", "", "*", "--", "-n", "é\udcff"]
    output = bytes(range(256)) * 12_000 + b"the end"
    (tmp_path / "output").write_bytes(output)
    script = f"""
import os, sys
os.write(1, repr(sys.argv[1:]).encode())
sys.stderr.buffer.write(open({str(tmp_path / "output")!r}, "rb").read())"""
    process = host.start("--", sys.executable, "-c", script, *arguments)
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert repr(arguments).encode() + output + b"run_host.sh:" in out
    assert host.log.read_bytes() == out


def test_the_log_is_added_to_and_exit_is_absent_while_it_runs(host):
    host.run("--", "echo", "first")
    assert host.exit.exists()
    second = host.start("--", "bash", "-c", f"ls -A {host.run_dir}; echo second; read -t 60 <>{host.programs}/never")
    os.mkfifo(host.programs / "never")
    until(lambda: "second" in text(host.log), "output")
    assert "first" in text(host.log) and not host.exit.exists()
    second.terminate()
    second.wait(SECONDS)
    assert host.exit.exists() and not list(host.run_dir.glob("exit?*"))


def test_the_environment_of_the_command(host, tmp_path):
    """The file's values as they stand; programs of the virtual environment first; many open files."""
    (tmp_path / "llm_jax_venv" / "bin").mkdir(parents=True)
    shutil.copy(host.program("mine", "echo venv"), tmp_path / "llm_jax_venv" / "bin" / "mine")
    host.program("mine", "echo other")
    host.run_dir.mkdir()
    lines = ["# a comment", "", "A=1 2  3", "B=\"a 'b'\" ", "C='$HOME `id`'", 'D="x=y"', "E=", "F=a'b"]
    lines += ['command="', "G=1\r"]
    (host.run_dir / "env").write_text("\n".join([*lines, "H=last"]))
    (host.run_dir / "env").chmod(0o600)
    names = ["A", "B", "C", "D", "E", "F", "command", "G", "H"]
    script = f"import os; print([os.environ[name] for name in {names}]); os.system('mine; ulimit -n')"
    done = host.run("--", sys.executable, "-c", script)
    values = ["1 2  3", "\"a 'b'\" ", "$HOME `id`", "x=y", "", "a'b", '"', "1", "last"]
    assert f"\n{values}\nvenv\n" in done.stdout, done.stdout
    hard = subprocess.run(["bash", "-c", "ulimit -Hn"], capture_output=True, text=True).stdout.strip()
    assert f"venv\n{min(int(hard), 2**20) if hard.isdigit() else 2**20}\n" in done.stdout


@pytest.mark.parametrize(
    "mode, content, message",
    [
        (0o644, "TOKEN=swordfish\n", "has mode 644, so that others may read what is secret: chmod 600 "),
        (0o640, "TOKEN=swordfish\n", "has mode 640"),
        (0o600, "A=1\nswordfish\n", "line 2 is not NAME=VALUE"),
        (0o600, "export TOKEN=swordfish\n", "line 1 is not NAME=VALUE"),
        (None, None, "cannot be read"),
    ],
)
def test_a_file_of_secrets_that_is_refused(mode, content, message, host, tmp_path):
    file = tmp_path / "secrets"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    done = host.run(f"--env_file={file}", "--", "echo", "started")
    assert done.returncode == 78 and host.exit.read_text() == "78\n"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("run_host.sh: ")]
    assert f"--env_file={file}" in line and message in line
    assert "swordfish" not in done.stdout + done.stderr and "started" not in done.stdout


def test_secrets_are_in_no_command_line_and_no_log(host):
    host.run_dir.mkdir()
    (host.run_dir / "env").write_text("TOKEN=swordfish-7391\n")
    (host.run_dir / "env").chmod(0o600)
    seen, has = [], "import os, time; print('has it', len(os.environ['TOKEN']), flush=True); time.sleep(1)"
    process = host.start("--", sys.executable, "-c", has)
    while process.poll() is None:  # with every process of the machine looked at, all the time
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen += [path.read_bytes()] * (b"swordfish" in path.read_bytes())
            except OSError:
                continue
    assert not seen
    assert "has it 14" in text(host.log) and "swordfish" not in text(host.log)


WAITS = """
told() {{ trap 'echo told again' TERM; echo told; read -t 0.3 <>{fifo}; exit {code}; }}
trap told TERM
echo waits $$
while :; do read -t 0.05 <>{fifo}; done"""


def waiting(host: Host, code: int = 75) -> list[str]:
    """A command that waits for TERM, and says so if it gets another one."""
    fifo = host.programs / "never"
    if not fifo.exists():
        os.mkfifo(fifo)
    return ["bash", "-c", WAITS.format(code=code, fifo=fifo)]


def pid_of_command(host: Host) -> int:
    until(lambda: re.search(r"^waits \d", text(host.log), re.M), "command")
    return int(re.findall(r"^waits (\d+)", text(host.log), re.M)[-1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("restarts", [0, 10])
@pytest.mark.parametrize("code", [75, 0, 70])
def test_a_signal_is_passed_on_as_term_and_nothing_is_started_again(number, restarts, code, host):
    process = host.start(f"--restarts={restarts}", "--", *waiting(host, code))
    pid_of_command(host)
    process.send_signal(number)
    process.send_signal(number)
    assert process.wait(SECONDS) == code
    assert host.exit.read_text() == f"{code}\n" and host.starts() == 1
    assert "\ntold\n" in text(host.log) and "\ntold again\n" not in text(host.log)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes(number, host):
    """As Slurm, Ctrl-C and a terminal that is closed send it; the log has the last words of the command."""
    process = host.start("--", *waiting(host))
    pid = pid_of_command(host)
    os.killpg(process.pid, number)
    if number == signal.SIGHUP:
        process.terminate()
    assert process.wait(SECONDS) == 75, text(host.log)
    end = r"told( again)?\nrun_host.sh: \S+ exit code 75 after \d+ s; was told to stop: ends with 75\n$"
    assert re.search(end, text(host.log))
    assert not alive(pid)


@pytest.mark.parametrize("number, everywhere", [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_command_that_term_kills_had_nothing_to_save(number, everywhere, host):
    """bash may lose the exit code of what dies in the moment of a signal, so: several times."""
    for _ in range(4):
        shutil.rmtree(host.run_dir, ignore_errors=True)
        process = host.start("--", "bash", "-c", "echo waits $$; exec sleep 60")
        pid_of_command(host)
        (os.killpg if everywhere else os.kill)(process.pid, number)
        assert process.wait(SECONDS) == 75, text(host.log)


def test_a_signal_during_a_pause(host):
    process = host.start("--", "bash", "-c", "exit 70")
    until(lambda: "starts again in 5 s (crash 1, of at most 10 in a row)" in text(host.log), "pause")
    process.terminate()
    assert process.wait(SECONDS) == 70 and host.starts() == 1


def test_a_signal_at_any_time_around_the_start_of_the_command(host):
    """Never lost, and never with a process that stays."""
    for attempt in range(12):
        shutil.rmtree(host.run_dir, ignore_errors=True)
        process = host.start("--", "sleep", "60")
        until(lambda process=process: process.poll() is not None or host.exit.parent.exists(), "start")
        time.sleep(attempt * 0.004)
        process.terminate()
        assert process.wait(SECONDS) == 75
        assert host.exit.read_text() == "75\n"


def test_a_second_start_is_refused(host):
    first = host.start("--", *waiting(host))
    pid = pid_of_command(host)
    done = host.run("--", "echo", "second")
    assert done.returncode == 78 and done.stdout == ""
    assert re.fullmatch(rf"run_host.sh: .*{host.run_dir} is in use.*: kill -TERM {first.pid} {pid}\n", done.stderr)
    assert not host.exit.exists()
    first.terminate()
    assert first.wait(SECONDS) == 75


def test_a_command_that_outlives_this_goes_on_and_refuses_a_second_start(host):
    """Its output still comes to the log; when it has ended, there can be another."""
    first = host.start("--", *waiting(host), stdout=subprocess.DEVNULL)
    pid = pid_of_command(host)
    first.kill()
    first.wait()
    done = host.run("--", "echo", "second")
    assert done.returncode == 78 and f"kill -TERM {pid}\n" in done.stderr
    os.kill(pid, signal.SIGTERM)
    until(lambda: "\ntold\n" in text(host.log), "last word")
    until(lambda: not alive(pid), "end of the command")
    assert not host.exit.exists()
    done = host.run("--", "echo", "third")
    assert done.returncode == 0 and "\nthird\n" in done.stdout


def test_what_a_start_leaves_running_is_ended(host, pauses):
    """Also what ignores TERM; before the next start, and at the end, which does not wait for it."""
    leave = "(trap '' TERM; exec /bin/sleep 600) & echo left $!; echo >>n; [[ $(wc -l <n) == 1 ]] && exit 75 || exit 0"
    done = host.run("--", "bash", "-c", f"cd {host.home}; {leave}")
    assert done.returncode == 0
    left = [int(pid) for pid in re.findall(r"^left (\d+)", done.stdout, re.M)]
    assert len(left) == 2 and not any(alive(pid) for pid in left)
    assert done.stdout.index(f"SIGKILL to what was left running: {left[0]}") < done.stdout.index(f"left {left[1]}")


def test_what_an_earlier_start_has_left_running_is_ended(host):
    host.program("leaves", 'sleep 600 9>&- & echo left $!; exec bash -c \'echo waits $$; read -t 60 <>"$0"\' "$1"')
    os.mkfifo(host.programs / "never")
    first = host.start("--", "leaves", str(host.programs / "never"), stdout=subprocess.DEVNULL)
    pid = pid_of_command(host)
    (left,) = [int(pid) for pid in re.findall(r"^left (\d+)", text(host.log), re.M)]
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        for victim in (first.pid, pid):
            os.kill(victim, signal.SIGKILL)
        first.wait()
        done = host.run("--", "echo", "second")
        assert done.returncode == 0, done.stderr
        assert not alive(left) and alive(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


def test_a_full_disk_and_a_reader_that_has_gone(host):
    """Neither ends the command, alone or together; its code is what counts."""
    host.run_dir.mkdir()
    host.log.symlink_to("/dev/full")
    done = host.run("--restarts=0", "--", "bash", "-c", "echo one; echo two; exit 3")
    assert done.returncode == 3 and "\none\ntwo\n" in done.stdout
    host.log.unlink()
    lines = ["bash", "-c", "for i in {1..20000}; do echo line $i; done; exit 4"]
    for _ in range(2):
        process = host.start("--restarts=0", "--", *lines)
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(SECONDS) == 4
        if not host.log.is_symlink():
            assert "line 20000\n" in text(host.log)
            host.log.unlink()
            host.log.symlink_to("/dev/full")


def test_as_the_first_process_of_a_container(host):
    """Where signals without a handler do nothing, and orphans are its children."""
    contained = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*contained, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let `unshare` make a process namespace")
    command = "(sleep 0.1 &)\n(exit 0) &" + waiting(host)[2]
    process = subprocess.Popen(
        [*contained, SCRIPT, "--restarts=0", "--", "bash", "-c", command], env=host.environment, start_new_session=True
    )
    host.started.append(process)
    pid_of_command(host)
    (script,) = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(script), signal.SIGTERM)
    assert process.wait(SECONDS) == 75 and host.exit.read_text() == "75\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no command; give it after --"),
        (["--restarts=x", "--", "true"], "--restarts=x must be a number"),
        (["--restart=1", "--", "true"], "--restart=1 is no flag of this"),
        (["true"], "true is no flag of this"),
        (["--run_dir={file}/x", "--", "true"], "--run_dir={file}/x cannot be written to"),
    ],
)
def test_bad_use(arguments, message, host):
    file = host.program("file", "")
    done = host.run(*[argument.format(file=file) for argument in arguments])
    assert done.returncode == 78 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"run_host.sh: {message.format(file=file)}" in done.stderr


def test_help_and_dry_run_do_nothing(host):
    done = host.run("--help")
    assert done.returncode == 0 and "--run_dir=DIR" in done.stdout and "set -e" not in done.stdout
    for flag in ("--dry_run", "--dry-run"):
        done = host.run(flag, "--", "touch", f"{host.home}/a b")
        assert done.returncode == 0 and f"touch {host.home}/a\\ b" in done.stdout
    assert {path.name for path in host.home.iterdir()} == {"programs"}


def test_a_command_that_is_not_there(host):
    """A mistake, which no restart mends."""
    done = host.run("--", "no-such-command")
    assert done.returncode == 78 and "no-such-command: no such command" in done.stdout
    assert "starts again" not in done.stdout


@pytest.mark.soak
def test_a_training_that_is_told_by_everyone(tiny, host):
    """As under srun, where TERM comes directly and by this script: the second one does not kill it."""
    host.environment |= tiny.environment | {"HOME": str(host.home), "JAX_PLATFORMS": "cpu"}
    host.environment["PYTHONPATH"] = str(ROOT)
    flags = ["--config.optimizer.schedule=constant", "--config.log.sample_prompt=none"]
    command = tiny.command("train", host.home / "run", *flags, "--config.train.steps=1000000")
    process = host.start("--", *command, stdout=subprocess.DEVNULL)
    until(lambda: "step 5/" in text(host.log) or process.poll() is not None, "step 5")
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(SECONDS) == 75, text(host.log)
    assert "preempted: saved step" in text(host.log)
