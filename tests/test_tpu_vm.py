"""launch/tpu_vm.sh against a Cloud TPU that really runs what it is told: see fake_gcloud.py."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import ROOT
from fake_gcloud import Cloud
from processes import free_port

pytestmark = pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed: apt-get install tmux")

SECONDS = 120  # so that a hang is a failure
ONE, TWO = "v6e-8", "v5p-16"  # types with so many hosts
REFUSED = "1 There was a problem refreshing your current auth tokens: HTTPSConnectionPool: Max retries exceeded"


def commit(folder: pathlib.Path) -> None:
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.com", "-C", str(folder)]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *command], check=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> pathlib.Path:
    """The scripts, committed."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "setup.py", folder)
    commit(folder)
    return folder


class Tpu:
    """The script, the cloud it sees, and everything that the two have started."""

    def __init__(self, cloud: Cloud, repository: pathlib.Path, poll: str = "0.05"):
        self.cloud = cloud
        self.repository = repository
        self.running = []
        self.watched = (
            cloud.folder / "nodes" / "abc" / "0" / "llm_jax_run" / "watcher"
        )  # by babysit, since it was started
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("TMUX", "TMUX_TMPDIR")},
            "PATH": f"{cloud.folder}/bin:{os.environ['PATH']}",
            "FAKE_CLOUD": str(cloud.folder),
            "LLM_JAX_POLL_SECONDS": poll,
        }

    def line(self, verb: str, *flags: str, type: str = ONE) -> list[str]:
        where = ["--name=abc", "--zone=us-east5-b", f"--type={type}"]
        return [str(self.repository / "launch" / "tpu_vm.sh"), verb, *where, *flags]

    def start(
        self, verb: str, *flags: str, stdin: int = subprocess.DEVNULL, stderr: int = subprocess.STDOUT, **options
    ) -> subprocess.Popen:
        process = subprocess.Popen(
            self.line(verb, *flags, **options), env=self.environment, stdin=stdin, text=True,
            stdout=subprocess.PIPE, stderr=stderr, start_new_session=True,
        )  # fmt: skip
        self.running.append(process)
        return process

    def __call__(self, verb: str, *flags: str, code: int = 0, **options) -> str:
        """What it prints; it must end with that code."""
        process = self.start(verb, *flags, **options)
        output = process.communicate(timeout=SECONDS)[0]
        assert process.returncode == code, output
        return output

    def host(self, worker: int = 0, node: str = "abc") -> pathlib.Path:
        """Its home."""
        return self.cloud.homes(node)[worker]

    def end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()  # what it has started may have it, too, until the cloud ends
        self.cloud.end()


@pytest.fixture
def tpu(repository):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tpu"))  # short: tmux has its sockets in it
    tpu = Tpu(Cloud(folder), repository)
    tpu.cloud.build(sys.executable)
    yield tpu
    tpu.end()
    shutil.rmtree(folder)


def wait_for(path: pathlib.Path, text: str = "") -> str:
    deadline = time.monotonic() + SECONDS
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"no {text} in {path}"
        time.sleep(0.05)
    return path.read_text()


def wait_until(true) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- up


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        (ONE, [], "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e --node-id=abc"),
        (TWO, ["--tier=spot"], "--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --node-id=abc --spot"),
        ("v5litepod-16", ["--tier=reserved", "--slices=2", "--create_flag=--network=n"],
         "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --node-count=2 --node-prefix=abc "
         "--reserved --network=n"),
        ("v4-16", ["--runtime=mine", "--valid_until=6h", "--project=p"],
         "--project=p --accelerator-type=v4-16 --runtime-version=mine --node-id=abc --valid-until-duration=6h"),
    ],
)  # fmt: skip
def test_up_asks_for_it_once_and_waits_until_it_is_there(tpu, kind, flags, expected):
    tpu("up", *flags, type=kind)
    assert tpu.cloud.resource("abc")["state"] == "ACTIVE"
    (created,) = [call for call in tpu.cloud.calls() if call[1] == "create"]
    assert created == ["queued-resources", "create", "abc", "--zone=us-east5-b", "--quiet", *expected.split()]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_up_deletes_what_is_dead_before_it_asks_anew(tpu, state):
    tpu.cloud.set("abc", state=state)
    tpu("up")
    assert tpu.cloud.verbs() == ["delete", "create"]
    assert "--force" in next(call for call in tpu.cloud.calls() if call[1] == "delete")
    assert tpu.cloud.resource("abc")["state"] == "ACTIVE"


@pytest.mark.parametrize("state", ["ACTIVE", "PROVISIONING", "SUSPENDED"])
def test_what_cannot_be_seen_is_neither_asked_for_nor_deleted(tpu, state):
    tpu.cloud.set("abc", state=state, capacity=False)
    tpu.cloud.fail("describe", *[REFUSED] * 3, "1 PERMISSION_DENIED: later, so it may pass", REFUSED)
    process = tpu.start("up")
    wait_until(lambda: len(tpu.cloud.calls()) >= 5)
    assert tpu.cloud.verbs() == []
    tpu.cloud.set("abc", state="ACTIVE")
    assert "does nothing" in process.communicate(timeout=SECONDS)[0]


@pytest.mark.parametrize(
    "error",
    ["1 PERMISSION_DENIED: Permission 'tpu.queuedResources.get' denied on 'projects/p/locations/z'",
     "1 You do not currently have an active account selected. Please run:  $ gcloud auth login"],
)  # fmt: skip
def test_who_may_not_look_is_told_so(tpu, error):
    tpu.cloud.fail("describe", error)
    assert error[2:] in tpu("up", code=78)
    assert tpu.cloud.verbs() == []


def test_not_found_of_another_thing_does_not_mean_that_it_is_absent(tpu):
    tpu.cloud.set("abc", state="ACTIVE")
    tpu.cloud.fail("describe", "1 NOT_FOUND: Resource 'projects/typo' was not found.")
    tpu("up")
    assert tpu.cloud.verbs() == []


@pytest.mark.parametrize("arrived", [False, True])
def test_a_request_that_may_have_come_through_is_looked_for_before_it_is_made_again(tpu, arrived):
    tpu.cloud.fail("create", f"late {REFUSED}" if arrived else REFUSED)
    tpu("up")
    calls = [call[1] for call in tpu.cloud.calls()]
    assert calls[:4] == ["describe", "create", "describe", "describe" if arrived else "create"]


@pytest.mark.parametrize(
    ("error", "code"),
    [("1 RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProjectPerZone' has been exceeded. Limit: 8 in zone z.", 70),
     ("1 INVALID_ARGUMENT: Runtime version mine is not found", 78), ("2 unrecognized arguments: --spott", 78)],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["up", "babysit"])
def test_no_quota_and_mistakes_are_shown_and_not_tried_again(tpu, verb, error, code):
    tpu.cloud.fail("create", error)
    assert error[2:] in tpu(verb, "--", "true", code=code)
    assert tpu.cloud.verbs() == ["create"]


def test_what_google_could_not_provide_is_cleared_away(tpu):
    (tpu.cloud.folder / "no_capacity").touch()
    process = tpu.start("up")
    wait_until(lambda: tpu.cloud.resource("abc"))
    tpu.cloud.set("abc", state="FAILED", message="no such thing in this zone")
    assert "no such thing in this zone" in process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 70
    assert tpu.cloud.verbs() == ["create", "delete"]
    assert tpu.cloud.resource("abc") is None


@pytest.mark.parametrize("own", [True, False])
def test_capacity_that_never_comes(tpu, own):
    (tpu.cloud.folder / "no_capacity").touch()
    if not own:
        tpu.cloud.set("abc", state="WAITING_FOR_RESOURCES", capacity=False)
    output = tpu("babysit", "--valid_until=1s", "--", "true", code=70)
    assert "no capacity in 1s" in output
    assert tpu.cloud.verbs() == (["create", "delete"] if own else [])
    assert (tpu.cloud.resource("abc") is None) == own


def test_ctrl_c_while_it_waits_says_what_there_is(tpu):
    (tpu.cloud.folder / "no_capacity").touch()
    process = tpu.start("up")
    wait_until(lambda: (tpu.cloud.resource("abc") or {}).get("state") == "WAITING_FOR_RESOURCES")
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 130
    assert "abc is asked for" in output and "tpu_vm.sh down --name=abc --zone=us-east5-b" in output
    assert tpu.cloud.verbs() == ["create"]


# Of Google's pages: https://cloud.google.com/tpu/docs/v5p, /v5e, /v6e, /v4, /v3
@pytest.mark.parametrize(
    ("kind", "chips", "hosts"),
    [("v2-8", 4, 1), ("v3-32", 16, 4), ("v4-8", 4, 1), ("v4-64", 32, 8), ("v5p-8", 4, 1), ("v5p-32", 16, 4),
     ("v5p-12288", 6144, 1536), ("v5litepod-1", 1, 1), ("v5litepod-8", 8, 1), ("v5litepod-16", 16, 4), ("v6e-4", 4, 1),
     ("v6e-8", 8, 1), ("v6e-256", 256, 64)],
)  # fmt: skip
def test_chips_hosts_and_tier_are_shown(tpu, kind, chips, hosts):
    output = tpu("up", "--dry_run", "--slices=3", "--tier=spot", type=kind)
    assert f"{3 * chips} chips on {3 * hosts} hosts" in output and "spot: cheap" in output


@pytest.mark.parametrize(
    ("kind", "words"),
    [("tpu7x-16", "you must use Google Kubernetes Engine"), ("v7x-8", "launch/gke/"), ("v6e-12", "v6e-{1,4,8,16"),
     ("v5e-16", "v5litepod-{1,4"), ("v5p-12", "v5p-{8,16"), ("v9-8", "known are v2-"),
     ("", "--type is missing; give one of v2-")],
)  # fmt: skip
def test_other_types_are_refused(tpu, kind, words):
    assert words in tpu("up", type=kind, code=78)
    assert tpu.cloud.calls() == []


# ---- run

ARGUMENTS = ["a b", "it's", '"quoted"', "$HOME `id` $(id)", "two\nlines\t", "ünïcödé ☃", "", "*", "a\\b", "--", "!1;|&"]
TELL_ARGUMENTS = "import json, sys; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"


def test_arguments_arrive_unchanged_on_every_host_of_every_slice(tpu):
    tpu("up", "--slices=2", type=TWO)
    output = tpu("run", "--slices=2", "--", "python", "-c", TELL_ARGUMENTS, "arguments.json", *ARGUMENTS, type=TWO)
    for node in ("abc-0", "abc-1"):
        for home in tpu.cloud.homes(node):
            assert wait_for(home / "llm_jax_run" / "exit") == "0\n"
            assert json.loads((home / "llm_jax" / "arguments.json").read_text()) == ARGUMENTS
            head = subprocess.check_output(["git", "-C", tpu.repository, "rev-parse", "HEAD"], text=True)
            assert (home / "llm_jax" / "COMMIT").read_text() == head
            assert not (home / "llm_jax_new").exists()
    assert "started on 4 hosts" in output


def lines(output: str) -> list[list[str]]:
    """What a dry run prints, as gcloud would get it from a shell."""
    calls = []
    for word in shlex.split(output, comments=True):
        if word == "gcloud":
            calls.append([])
        calls[-1].append(word)
    return [call[3:] for call in calls]


def test_a_dry_run_prints_what_would_be_run_and_runs_nothing(tpu):
    tpu("up")
    asked = tpu.cloud.calls()
    command = ["--", "python", "-c", TELL_ARGUMENTS, "arguments.json", *ARGUMENTS]
    for verb, flags in {"up": [], "run": command, "status": [], "stop": [], "down": ["--yes"]}.items():
        before = tpu.cloud.calls()
        dry = lines(tpu(verb, "--dry_run", *flags, stderr=subprocess.DEVNULL))
        assert tpu.cloud.calls() == before
        tpu(verb, *flags)
        done = asked if verb == "up" else tpu.cloud.calls()[len(before) :]
        folder = re.compile(r"/\S+(?=/llm_jax_new)")  # a temporary one
        dry, done = ([[folder.sub("", word) for word in call] for call in calls] for calls in (dry, done))
        assert [call for call in done if call in dry][: len(dry)] == dry
        if verb in ("run", "status", "stop"):
            assert dry == done
    assert "tail -n 100 -F" in lines(tpu("logs", "--dry-run", stderr=subprocess.DEVNULL))[0][-1]
    verbs = [call[1] for call in lines(tpu("babysit", "--dry-run", *command, stderr=subprocess.DEVNULL))]
    assert verbs == ["describe", "create", "ssh", "scp", "ssh", "ssh", "ssh"]


def test_secrets_come_by_a_file_and_are_seen_nowhere(tpu, tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text("TOKEN='s3cr3t word'\n")
    secrets.chmod(0o640)
    assert "chmod 600" in tpu("run", f"--env_file={secrets}", "--", "true", code=78)
    secrets.chmod(0o600)
    tpu("up", type=TWO)
    program = "import os; open('seen', 'w').write(os.environ['TOKEN'])"
    output = tpu("run", f"--env_file={secrets}", "--", "python", "-c", program, type=TWO)
    for home in tpu.cloud.homes("abc"):
        wait_for(home / "llm_jax" / "seen", "s3cr3t word")
        assert (home / "llm_jax_run" / "env").stat().st_mode & 0o777 == 0o600
        output += (home / "llm_jax_run" / "log").read_text() + (home / "llm_jax_run" / "start").read_text()
    assert "s3cr3t" not in output + json.dumps(tpu.cloud.calls()) + tpu("status", type=TWO)


def test_the_code_can_be_cloned_by_the_hosts(tpu):
    tpu("up")
    head = subprocess.check_output(["git", "-C", tpu.repository, "rev-parse", "HEAD"], text=True).strip()
    tpu("run", f"--git=file://{tpu.repository}", f"--ref={head}", "--", "git", "rev-parse", "HEAD")
    assert head in wait_for(tpu.host() / "llm_jax_run" / "log", "exit code 0").splitlines()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--", "train", "--workdir=runs/a"], "gone with the TPU"),
        (["--", "train", "--workdir", "~/runs"], "--workdir=~/runs would be another folder on each host"),
        (["--git=https://me:pa55@example.com/x", f"--ref={'a' * 40}", "--", "true"], "password"),
        (["--git=https://t0ken@example.com/x", f"--ref={'a' * 40}", "--", "true"], "password"),
        (["--git=https://example.com/x", "--ref=main", "--", "true"], "--ref='main' must be a commit"),
        (["--env_file=/nowhere", "--", "true"], "--env_file=/nowhere"),
        ([], "no command"),
        (["true"], "put -- before the command"),
        (["--tier=cheap", "--", "true"], "--tier=cheap must be"),
        (["--slices=two", "--", "true"], "--slices=two must be a number"),
        (["--valid_until=6", "--", "true"], "--valid_until=6h"),
        (["--name=A_b", "--", "true"], "--name='A_b' must be"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "babysit"])
def test_mistakes_are_refused_in_a_line_before_anything_is_done(tpu, verb, flags, words):
    output = tpu(verb, *flags, code=78)
    assert words in output.splitlines()[-1]
    assert "pa55" not in output and "t0ken" not in output
    assert tpu.cloud.calls() == []


def test_code_that_is_not_committed_is_refused(tpu, tmp_path):
    tpu.repository = shutil.copytree(tpu.repository, tmp_path / "changed", symlinks=True)
    (tpu.repository / "setup.py").write_text("changed")
    assert "setup.py" in tpu("babysit", "--", "true", code=78).splitlines()[-1]
    assert tpu.cloud.calls() == []


def test_run_wants_a_tpu_that_is_there(tpu):
    assert "there is no abc" in tpu("run", "--", "true", code=70)
    tpu.cloud.fail("describe", REFUSED)
    assert "cannot see abc" in tpu("run", "--", "true", code=70)
    assert tpu.cloud.verbs() == []


def test_a_second_command_is_refused_while_one_is_running(tpu):
    tpu("up", type=TWO)
    tpu("run", "--", "sleep", "1000", type=TWO)
    before = (tpu.host(1) / "llm_jax_run" / "log").read_text()
    assert "a command is running on abc" in tpu("run", "--", "true", type=TWO, code=78)
    assert "is running on abc" in tpu("babysit", "--", "true", type=TWO, code=78)
    assert (tpu.host(1) / "llm_jax_run" / "log").read_text() == before
    assert tpu("status", type=TWO).count(": running;") == 2


def test_what_flakes_is_tried_again(tpu):
    tpu("up", type=TWO)
    tpu.cloud.fail("scp", "255 Connection timed out", "255 Connection reset by peer")
    tpu.cloud.fail("ssh", "", "255 Connection closed", "", "255 Connection closed")
    tpu("run", "--", "true", type=TWO)
    assert wait_for(tpu.host(1) / "llm_jax_run" / "exit") == "0\n"
    tpu.cloud.fail("scp", *["255 Connection timed out"] * 3)
    assert "Connection timed out" in tpu("run", "--", "true", type=TWO, code=70)


def test_ctrl_c_while_hosts_are_set_up_starts_nothing(tpu, tmp_path):
    tpu.repository = shutil.copytree(tpu.repository, tmp_path / "other", symlinks=True)
    (tpu.repository / "launch" / "setup_vm.sh").write_text(
        "touch ~/here; sleep 1000; echo READY $(cat ~/llm_jax/COMMIT)"
    )
    commit(tpu.repository)
    tpu("up", type=TWO)
    process = tpu.start("run", "--", "true", type=TWO)
    for home in tpu.cloud.homes("abc"):
        wait_for(home / "here")
    process.send_signal(signal.SIGINT)  # to the script alone: it ends the others
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 130
    assert "nothing was started; the TPU abc bills" in output
    assert "worker 0: absent" in tpu("status", type=TWO)


def test_hosts_that_are_not_ready_are_not_started(tpu, tmp_path):
    tpu.repository = shutil.copytree(tpu.repository, tmp_path / "other", symlinks=True)
    setup = tpu.repository / "launch" / "setup_vm.sh"
    setup.write_text('if [[ $(hostname) == *-w-0 ]]; then echo "READY $(cat ~/llm_jax/COMMIT)"; else echo READY 1; fi')
    commit(tpu.repository)
    tpu("up", type=TWO)
    assert "1 of 2 hosts are READY" in tpu("run", "--", "true", type=TWO, code=70)
    assert not (tpu.host() / "llm_jax_run" / "started").exists()


# ---- babysit

# Counts its starts in a folder that all hosts share; lives until there is a file "go", which has the exit code.
PATIENT = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / f"start-{time.time_ns()}").touch()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("so far so good", flush=True)
while not (folder / "go").exists():
    time.sleep(0.05)
sys.exit(int((folder / "go").read_text()))
"""


@pytest.fixture
def patient(tmp_path) -> list[str]:
    return ["--restarts=0", "--", "python", "-c", PATIENT, str(tmp_path)]


def starts(folder: pathlib.Path) -> int:
    return len(list(folder.glob("start-*")))


def go(folder: pathlib.Path, code: int) -> None:
    (folder / "go.new").write_text(str(code))
    (folder / "go.new").rename(folder / "go")


def test_babysit_brings_it_back_after_a_preemption_and_is_done_at_the_end(tpu, tmp_path, patient):
    process = tpu.start("babysit", "--tier=spot", "--slices=2", *patient)
    wait_until(lambda: starts(tmp_path) == 2)
    tpu.cloud.preempt("abc")
    wait_until(lambda: starts(tmp_path) == 4)
    go(tmp_path, 0)
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, output
    assert tpu.cloud.verbs() == ["create", "delete", "create"]
    assert "abc was taken away (SUSPENDED)" in output
    assert "the TPU abc bills until it is deleted" in output
    assert tpu.cloud.resource("abc")["state"] == "ACTIVE"


def test_what_cannot_be_seen_meanwhile_changes_nothing(tpu, tmp_path, patient):
    process = tpu.start("babysit", *patient)
    wait_for(tpu.watched)
    tpu.cloud.fail("describe", *[REFUSED] * 3, "1 PERMISSION_DENIED: the token has expired")
    tpu.cloud.fail("ssh", *["255 Connection timed out"] * 5)
    wait_until(lambda: not tpu.cloud.next_error("ssh"))
    go(tmp_path, 0)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert tpu.cloud.verbs() == ["create"]
    assert starts(tmp_path) == 1


def test_a_node_that_is_gone_before_its_queued_resource(tpu, tmp_path, patient):
    process = tpu.start("babysit", *patient)
    wait_for(tpu.watched)
    gone = '1 This TPU has terminal state "PREEMPTED", so it cannot be used anymore.'
    tpu.cloud.fail("ssh", *[gone] * 3)
    wait_until(lambda: starts(tmp_path) == 2)
    go(tmp_path, 0)
    process.communicate(timeout=SECONDS)
    assert tpu.cloud.verbs() == ["create", "delete", "create"]


@pytest.mark.parametrize("notice", [False, True])
def test_a_host_that_restarts_is_started_again_and_the_others_are_left_alone(tpu, tmp_path, patient, notice):
    process = tpu.start("babysit", *patient, type=TWO)
    wait_until(lambda: starts(tmp_path) == 2)
    if notice:  # TERM, before a maintenance, which it may survive
        os.kill(pane(tpu.host(1)), signal.SIGTERM)
    else:
        tpu.cloud.reboot(tpu.host(1))
    wait_until(lambda: starts(tmp_path) == 3)
    go(tmp_path, 0)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert (tpu.host(0) / "llm_jax_run" / "log").read_text().count("\nso far so good\n") == 1
    assert tpu.cloud.verbs() == ["create"]


@pytest.mark.soak
def test_what_a_preemption_kills_is_no_crash(tpu, tmp_path, patient):
    tpu("up")
    tpu.environment["LLM_JAX_POLL_SECONDS"] = "3"  # for the preemption to be seen at the look after that of the code
    process = tpu.start("babysit", *patient)
    wait_for(tpu.watched)
    tpu.cloud.reboot(tpu.host())
    (tpu.host() / "llm_jax_run" / "exit").write_text("137\n")
    looks = len(tpu.cloud.calls())
    wait_until(lambda: any(call[1] == "ssh" for call in tpu.cloud.calls()[looks + 1 :]))
    tpu.cloud.preempt("abc")
    wait_until(lambda: starts(tmp_path) == 2)
    go(tmp_path, 0)
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, output
    assert tpu.cloud.verbs() == ["create", "delete", "create"]


@pytest.mark.parametrize("code", [78, 70, 1, 137])
def test_a_code_ends_it_with_the_last_lines_and_the_other_hosts(tpu, code):
    program = 'if [[ $FAKE_HOST == *-w-1 ]]; then echo "what went wrong"; exit "$1"; fi; exec sleep 1000'
    command = ["--restarts=0", "--", "bash", "-c", program, "program", str(code)]
    output = tpu("babysit", *command, "--workdir=/x", type=TWO, code=code)
    assert "\nwhat went wrong\n" in output and f"the command ended with {code}" in output
    assert (tpu.host(0) / "llm_jax_run" / "exit").exists()
    assert tpu.cloud.verbs() == ["create"]


def test_babysit_takes_up_where_things_stand(tpu, tmp_path, patient):
    process = tpu.start("babysit", *patient)
    wait_until(lambda: starts(tmp_path) == 1)
    wait_for(tpu.watched)
    assert "is being watched by" in tpu("babysit", *patient, code=78)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 130
    assert "the command goes on" in output and " stop; the TPU abc bills" in output
    process = tpu.start("babysit", *patient)
    wait_until(lambda: str(process.pid) in tpu.watched.read_text())
    tpu.watched.write_text("you@laptop pid 1\n")
    assert "watched by you@laptop pid 1" in process.communicate(timeout=SECONDS)[0]
    os.utime(tpu.watched, (0, 0))
    process = tpu.start("babysit", "--down_when_done", *patient)
    go(tmp_path, 0)
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, output
    assert starts(tmp_path) == 1
    assert tpu.cloud.verbs() == ["create", "delete"]
    assert tpu.cloud.resource("abc") is None


def test_babysit_of_what_has_ended(tpu, tmp_path, patient):
    go(tmp_path, 0)
    tpu("babysit", *patient)
    tpu("babysit", *patient)
    assert starts(tmp_path) == 1
    tpu("babysit", *patient, "again")
    assert starts(tmp_path) == 2
    go(tmp_path, 70)
    tpu("run", *patient)
    wait_until(lambda: starts(tmp_path) == 3)
    wait_for(tpu.host() / "llm_jax_run" / "exit")
    go(tmp_path, 0)
    tpu("babysit", *patient)
    assert starts(tmp_path) == 4


@pytest.mark.parametrize("before", [0, 70])
def test_what_ended_before_is_not_the_end_of_this(before, tpu, tmp_path, patient):
    """However late the new command starts: here its code cannot be brought at first."""
    go(tmp_path, before)
    tpu("babysit", *patient, code=before)
    go(tmp_path, 0)
    tpu.cloud.fail("scp", *["1 Connection reset by peer"] * 4)
    output = tpu("babysit", "--down_when_done", *patient, "another")
    assert "cannot bring the code" in output and starts(tmp_path) == 2
    assert tpu.cloud.verbs() == ["create", "delete"]


def test_secrets_are_part_of_the_command(tpu, tmp_path, patient):
    """Without them a preempted run would come back without them, and another one has no use for them."""
    secrets = tmp_path / "secrets"
    secrets.write_text("TOKEN=secret\n")
    secrets.chmod(0o600)
    tpu("up")
    tpu("run", f"--env_file={secrets}", *patient)
    wait_until(lambda: starts(tmp_path) == 1)
    assert "or --env_file) is running" in tpu("babysit", *patient, code=78)
    tpu("stop")
    tpu("run", *patient)
    wait_until(lambda: starts(tmp_path) == 2)
    assert not (tpu.host() / "llm_jax_run" / "env").exists()


def test_what_somebody_has_deleted_is_not_asked_for_again(tpu, tmp_path, patient):
    process = tpu.start("babysit", *patient)
    wait_until(lambda: starts(tmp_path) == 1)
    tpu("down", "--yes")
    assert "was deleted by somebody" in process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 70
    assert tpu.cloud.verbs() == ["create", "delete"]


# ---- the other verbs


def test_stop_of_slices_that_are_not_there(tpu, tmp_path, patient):
    tpu("up")
    assert "is it --slices=2?" in tpu("stop", "--slices=2", code=70)
    assert "is it --slices=1, --slice=0 and --worker=7?" in tpu("logs", "--worker=7", code=70)


def test_stop_lets_it_save_and_tells_the_codes(tpu, tmp_path, patient):
    process = tpu.start("babysit", *patient, type=TWO)
    wait_until(lambda: starts(tmp_path) == 2)
    output = tpu("stop", type=TWO)
    assert output.count("ended with 75") == 2
    assert tpu("status", type=TWO).count("ended with 75") == 2
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 75, output
    assert starts(tmp_path) == 2
    assert tpu.cloud.verbs() == ["create"]


def pane(home: pathlib.Path) -> int:
    """The process that tmux runs on that host: run_host.sh."""
    command = ["tmux", "list-panes", "-a", "-F", "#{pane_pid}"]
    return int(subprocess.check_output(command, env={**os.environ, "TMUX_TMPDIR": str(home)}))


def test_stop_reaches_what_has_lost_its_run_host(tpu, tmp_path, patient):
    tpu("up")
    tpu("run", *patient)
    wait_until(lambda: starts(tmp_path) == 1)
    os.kill(pane(tpu.host()), signal.SIGKILL)
    assert "worker 0: running" in tpu("status")
    assert "worker 0: lost" in tpu("stop")


def test_status_of_each_state(tpu):
    assert "there is no abc" in tpu("status")
    tpu.cloud.set("abc", state="WAITING_FOR_RESOURCES", capacity=False)
    assert "abc: WAITING_FOR_RESOURCES" in tpu("status")
    tpu.cloud.set("abc", state="FAILED", message="no capacity in this zone")
    assert "abc: FAILED: no capacity in this zone" in tpu("status")
    tpu("up")
    assert "abc worker 0: absent; nothing was started" in tpu("status")


def test_logs_are_those_of_one_host_as_they_come(tpu, tmp_path, patient):
    tpu("up", type=TWO)
    tpu("run", *patient, type=TWO)
    process = tpu.start("logs", "--worker=1", type=TWO)
    for line in process.stdout:
        if line == "so far so good\n":
            break
    with open(tpu.host(1) / "llm_jax_run" / "log", "a") as log:
        log.write("what comes later\n")
    assert any("what comes later" in line for line in process.stdout if line.startswith("what"))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=SECONDS)


def test_down_asks_and_says_what_is_lost(tpu, tmp_path, patient):
    assert "there is no abc" in tpu("down")
    tpu("up")
    tpu("run", *patient)
    output = tpu("down", code=78)
    assert "a command is running on it" in output and "--yes" in output
    assert tpu.cloud.verbs() == ["create"]
    tpu.cloud.fail("describe", REFUSED)
    tpu("down", "--yes", code=70)
    assert tpu.cloud.verbs() == ["create"]
    for answer in ("yes", "abc"):
        assert tpu.cloud.verbs() == ["create"]
        here, there = os.openpty()
        os.write(here, f"{answer}\n".encode())
        process = tpu.start("down", stdin=there)
        assert "is kept" in process.communicate(timeout=SECONDS)[0]
        assert process.returncode == (0 if answer == "abc" else 78)
        os.close(here)
        os.close(there)
    assert tpu.cloud.resource("abc") is None


@pytest.mark.skipif(not os.path.exists("/usr/bin/gcloud"), reason="gcloud is not installed")
def test_the_real_gcloud_knows_every_flag(tpu, tmp_path):
    """It reads all of them before it finds that nobody is logged in."""
    create = ["--tier=spot", "--slices=2", "--valid_until=6h", "--ssh_flag=--internal-ip"]
    flags = {"up": create, "run": [*create, "--", "true"], "down": [], "babysit": ["--tier=reserved", "--", "true"]}
    environment = {**tpu.environment, "CLOUDSDK_CONFIG": str(tmp_path), "PATH": "/usr/bin:/bin"}
    seen = set()
    for verb, more in flags.items():
        for call in lines(tpu(verb, "--dry_run", *more, stderr=subprocess.DEVNULL)):
            if (call[1], "--reserved" in call) not in seen:
                seen.add((call[1], "--reserved" in call))
                done = subprocess.run(["gcloud", "compute", "tpus", *call, "--project=p"], env=environment,
                                      capture_output=True, text=True, stdin=subprocess.DEVNULL)  # fmt: skip
                assert "active account" in done.stderr, done.stderr
    assert {verb for verb, _ in seen} == {"create", "describe", "delete", "ssh", "scp"}


# ---- a real training


@pytest.mark.soak
def test_a_training_on_two_hosts_goes_on_from_its_checkpoint_after_a_preemption(tpu, tiny, tmp_path):
    tpu.repository = tmp_path / "repository"
    for name in ("launch", "llm_jax", "tests"):
        shutil.copytree(ROOT / name, tpu.repository / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "setup.py", tpu.repository)
    commit(tpu.repository)
    workdir = tmp_path / "shared disk" / "run"
    program = (
        f"export {shlex.join(f'{name}={tiny.environment[name]}' for name in ('LLM_JAX_CACHE', 'TFDS_DATA_DIR'))} "
        "JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0; "
        'exec python -m llm_jax train --config=tests/tiny.py "$@" --process_id=${FAKE_HOST##*-w-}'
    )
    command = ["bash", "-c", program, "train", f"--workdir={workdir}", f"--coordinator=127.0.0.1:{free_port()}"]
    process = tpu.start("babysit", "--tier=spot", "--", *command, "--num_processes=2", type=TWO)
    metrics = workdir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 10)
    tpu.cloud.preempt("abc")
    saved = max(int(step.name) for step in (workdir / "checkpoints").iterdir() if step.name.isdecimal())
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert tpu.cloud.verbs() == ["create", "delete", "create"]
    log = (tpu.host() / "llm_jax_run" / "log").read_text()  # of the second start only: the disk is a new one
    assert saved >= 4 and f"step {saved}" in log, log
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert sorted(set(steps))[-1] == 24 and (workdir / "checkpoints" / "24").exists()
