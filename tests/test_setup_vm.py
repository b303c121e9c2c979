"""launch/setup_vm.sh in a home of its own, with programs in place of Python, uv, gcsfuse and the like that tell what
they were asked for. That it really installs is README's first command, and too slow for here."""

import os
import pathlib
import shutil
import subprocess

import pytest
from conftest import ROOT

SECONDS = 60  # so that a hang is a failure
TOOLS = (
    *("bash", "cat", "cut", "dirname", "echo", "env", "find", "flock", "git", "grep", "ls", "mkdir", "rm", "sed", "sh"),
    *("sha256sum", "sort", "xargs", "chmod", "cp"),
)
# Makes an environment in its last argument, whose programs tell what they were asked for, too.
PYTHON = """
case "$*" in
-c*) exit ${NO_PYTHON-0} ;;
*venv*) for folder; do :; done
    mkdir -p "$folder/bin"; echo made >"$folder/pyvenv.cfg"
    for program in python llm-jax; do
        printf '#!/bin/bash\\necho %s "$@" >>%q\\n[[ -e %q/fails-$1$2 ]] && rm %q/fails-$1$2 && exit 1\\nexit 0\\n' \\
            "venv/$program" "$CALLS" "$HOME" "$HOME" >"$folder/bin/$program"
        chmod 755 "$folder/bin/$program"
    done ;;
esac
"""


class Vm:
    """A host on which nothing but TOOLS is as it is here."""

    def __init__(self, home: pathlib.Path):
        self.home = home
        self.calls = home / "calls"
        self.code = home / "llm_jax"
        self.venv = home / "llm_jax_venv"
        self.lock = home / "libtpu_lockfile"
        self.programs = home / "programs"
        self.devices = home / "dev"
        for folder in (self.code / "launch", self.programs, self.devices / "vfio"):
            folder.mkdir(parents=True)
        shutil.copy(ROOT / "setup.py", self.code)
        shutil.copy(ROOT / "launch" / "setup_vm.sh", self.code / "launch")
        (self.code / "COMMIT").write_text("0123abc\n")
        for tool in TOOLS:
            (self.programs / tool).symlink_to(shutil.which(tool))
        self.program("python3.12", f'echo python3.12 "$@" >>$CALLS\n{PYTHON}')
        self.program("sleep", 'echo sleep "$@" >>$CALLS')
        self.program("id", "echo 0")
        self.program("findmnt", "exit 1")
        self.program("gcsfuse", 'echo gcsfuse "$@" >>$CALLS')

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        self.calls.write_text("")
        return subprocess.run(
            [self.code / "launch" / "setup_vm.sh", *arguments],
            env={
                **{"HOME": str(self.home), "PATH": str(self.programs), "CALLS": str(self.calls)},
                **{"LLM_JAX_TPU_LOCK": str(self.lock), "LLM_JAX_DEVICES": str(self.devices)},
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def asked(self) -> list[str]:
        """What was asked of the programs, but for the looks at which Python there is."""
        return [line for line in self.calls.read_text().splitlines() if not line.startswith("python3.12 -c")]

    def installed(self, extra: str = "") -> list[str]:
        pip = "venv/python -m pip install --disable-pip-version-check --progress-bar=off -e"
        return [f"{pip} {self.code}{extra}", "venv/llm-jax --version"]

    def made(self, extra: str = "") -> list[str]:
        return [f"python3.12 -m venv {self.venv}", *self.installed(extra)]


@pytest.fixture
def vm(tmp_path):
    return Vm(tmp_path)


def test_a_second_time_does_nothing(vm):
    for asked in (vm.made("[tpu]"), []):
        done = vm.run("--extra=tpu")
        assert done.returncode == 0, done.stderr
        assert done.stdout == "READY 0123abc\n"
        assert vm.asked() == asked
    assert done.stderr == ""


def test_another_setup_or_extra_is_installed_in_the_same_environment(vm):
    vm.run()
    assert vm.asked() == vm.made()
    assert vm.run("--extra=tpu,build").returncode == 0
    assert vm.asked() == vm.installed("[tpu,build]")
    with open(vm.code / "setup.py", "a") as file:
        file.write("# another dependency\n")
    assert vm.run("--extra=tpu,build").returncode == 0
    assert vm.asked() == vm.installed("[tpu,build]")


def test_an_environment_whose_making_was_interrupted_is_made_again(vm):
    vm.run()
    (vm.venv / "llm_jax_installed").unlink()
    (vm.venv / "half").touch()
    assert vm.run().returncode == 0
    assert vm.asked() == vm.made() and not (vm.venv / "half").exists()
    (vm.venv / "bin" / "python").unlink()  # as if the Python it was made with had gone
    assert vm.run().returncode == 0
    assert vm.asked() == vm.made()


def test_what_a_network_fails_at_is_tried_again(vm):
    vm.program("sleep", f'echo sleep "$@" >>$CALLS; [[ $1 == 10 ]] || echo >"{vm.home}/fails--mpip"')
    (vm.home / "fails--mpip").touch()
    assert vm.run().stdout == "READY 0123abc\n"
    pip = vm.installed()[0]
    assert vm.asked() == [*vm.made()[:2], "sleep 5", pip, "sleep 10", pip, "venv/llm-jax --version"]


def test_what_keeps_failing_is_an_error_and_the_same_command_goes_on(vm):
    vm.program("sleep", f'echo >"{vm.home}/fails--mpip"')
    (vm.home / "fails--mpip").touch()
    done = vm.run()
    assert done.returncode == 1 and done.stdout == ""
    assert "failed 5 times" in done.stderr.splitlines()[-1]
    assert vm.asked() == [vm.made()[0], *[vm.installed()[0]] * 5]
    assert vm.run().stdout == "READY 0123abc\n"


def test_an_old_python_only(vm):
    """As on TPU VMs, whose Python is 3.10: uv fetches another, and is itself fetched if it is not there."""
    vm.program("uv", f'echo uv "$@" >>$CALLS\n{PYTHON}')
    uv = f"uv venv --seed --python=3.12 {vm.venv}"
    assert vm.run(NO_PYTHON="1").stdout == "READY 0123abc\n"
    assert vm.asked() == [uv, *vm.installed()]

    shutil.rmtree(vm.venv)
    (vm.programs / "uv").rename(vm.home / "uv")
    vm.program("python3", f'echo python3 "$@" >>$CALLS; mkdir -p ~/.local/bin; cp {vm.home}/uv ~/.local/bin')
    assert vm.run(NO_PYTHON="1").stdout == "READY 0123abc\n"
    assert vm.asked() == ["python3 -m pip install --user --quiet uv", uv, *vm.installed()]


def test_the_commit_of_a_clone(vm):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        return subprocess.run(["git", *who, *arguments], cwd=vm.code, check=True, capture_output=True, text=True).stdout

    (vm.code / "COMMIT").unlink()
    git("init")
    git("add", "setup.py")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert vm.run().stdout == f"READY {commit}\n"
    with open(vm.code / "setup.py", "a") as file:
        file.write("# changed\n")
    assert vm.run().stdout == f"READY {commit}-dirty\n"


def test_a_stale_lock_of_tpus_goes_and_one_in_use_stays(vm):
    vm.lock.touch()
    device = vm.devices / "vfio" / "0"
    device.touch()
    with open(device) as file:
        done = vm.run()
        assert done.stdout == "READY 0123abc\n"
        assert vm.lock.exists() and f"in use by process {os.getpid()}: " in done.stderr
        assert file.readable()
    assert vm.run().stdout == "READY 0123abc\n"
    assert not vm.lock.exists()


def test_a_bucket_is_mounted_once(vm):
    data = vm.home / "the data"
    vm.run()
    arguments = [f"--mount=gs://bucket={data}", f"--mount=other={vm.home}/b"]
    done = vm.run(*arguments)
    assert done.stdout == "READY 0123abc\n", done.stderr
    assert vm.asked() == [f"gcsfuse --implicit-dirs bucket {data}", f"gcsfuse --implicit-dirs other {vm.home}/b"]
    vm.program("findmnt", "[[ $4 == *data ]] && echo bucket || echo other")
    assert vm.run(*arguments).stdout == "READY 0123abc\n"
    assert vm.asked() == []
    vm.program("fusermount", 'echo fusermount "$@" >>$CALLS')
    (vm.home / "b").rmdir()  # what is mounted there does not answer
    assert vm.run(*arguments).stdout == "READY 0123abc\n"
    assert vm.asked() == [f"fusermount -uz {vm.home}/b", f"gcsfuse --implicit-dirs other {vm.home}/b"]
    done = vm.run(f"--mount=third={data}")
    assert done.returncode == 78 and "bucket is mounted there; give another folder" in done.stderr


def test_gcsfuse_is_installed_where_that_is_allowed(vm):
    (vm.programs / "gcsfuse").unlink()
    vm.program("id", "echo 1000")
    vm.run()
    arguments = [f"--mount=bucket={vm.home}/data"]
    done = vm.run(*arguments)
    assert done.returncode == 78 and done.stdout == ""
    assert "needs gcsfuse, and root to install it: https://cloud.google.com/storage/docs" in done.stderr
    gcsfuse = '#!/bin/bash\necho gcsfuse "$@" >>$CALLS\n'
    (vm.home / "gcsfuse").write_text(gcsfuse)
    (vm.home / "gcsfuse").chmod(0o755)
    install = f'[[ $* == *"install -y gcsfuse" ]] && cp {vm.home}/gcsfuse {vm.programs}'
    vm.program("sudo", f'[[ $2 == true ]] && exit; echo sudo "$@" >>$CALLS; {install}; exit 0')
    assert vm.run(*arguments).stdout == "READY 0123abc\n"
    key, source, update, package, mount = vm.asked()
    assert key.startswith("sudo -n curl -fsSL -o /usr/share/keyrings/") and "gcsfuse-" in source
    assert update.endswith(" update") and package.endswith(" install -y gcsfuse")
    assert mount == f"gcsfuse --implicit-dirs bucket {vm.home}/data"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--extra=gpu", "--extra=gpu: setup.py has no extra 'gpu'"),
        ("--extra=tpu,.*", "setup.py has no extra '.*'"),
        ("--extras=tpu", "--extras=tpu is no flag of this"),
        ("--mount=bucket", "--mount=bucket must be --mount=BUCKET=DIR"),
        ("--mount=bucket=data", "with an absolute DIR"),
        ("--venv={home}", "is there, and no virtual environment"),
    ],
)
def test_bad_use(argument, message, vm):
    done = vm.run(argument.format(home=vm.home))
    assert done.returncode == 78 and done.stdout == "" and vm.asked() == []
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert vm.code.exists()


def test_help_and_dry_run_do_nothing(vm):
    done = vm.run("--help")
    assert done.returncode == 0 and "--mount=BUCKET=DIR" in done.stdout and "set -e" not in done.stdout
    vm.lock.touch()
    before = sorted(vm.home.rglob("*"))
    for flag in ("--dry_run", "--dry-run"):
        done = vm.run(flag, "--extra=tpu", f"--mount=bucket={vm.home}/a b")
        assert done.returncode == 0 and "READY" not in done.stdout, done.stderr
        assert f"python3.12 -m venv {vm.venv}" in done.stdout and f"{vm.home}/a\\ b" in done.stdout
        assert vm.asked() == [] and sorted(vm.home.rglob("*")) == before
