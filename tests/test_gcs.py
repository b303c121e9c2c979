"""Runs at gs://: in tests/fake_gcs.py, by gcsfs, TensorStore and google-cloud-storage over HTTP, as at the real one."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from conftest import Tiny
from fake_gcs import FakeGcs
from processes import Processes
from test_checkpoint import abstract, assert_same_bits, numbers, placed
from test_train import NO_SAMPLE, curve, record

from llm_jax.config import Config, UserError, validate
from llm_jax.safety import lease as lease_module
from llm_jax.safety import remote
from llm_jax.safety.checkpoint import Checkpoints, SaveFailed
from llm_jax.safety.lease import Lease, is_dead, this_process
from llm_jax.safety.remote import Mirror, Store, Taken, Unreachable


@pytest.fixture(scope="module")
def server():
    """For this process: its clients remember where it is."""
    with FakeGcs() as gcs, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs.environment.items():
            patch.setenv(name, value)
        Store("gs://bucket/run")  # as every verb begins: from then on no client remembers what is there
        yield gcs


@pytest.fixture
def gcs(server, monkeypatch, tmp_path):
    monkeypatch.setattr(remote.tempfile, "tempdir", str(tmp_path))
    yield server
    server.trouble = lambda method, path: None
    server.objects.clear()


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("fsdp",))


def lose(taken: Taken) -> None:
    raise AssertionError(f"lost {taken}")


def some(times: int, what, method: str, part: str):
    """Trouble for the first so many requests of a method with that part in their path."""
    left = iter(range(times))
    return lambda m, path: what if m == method and part in path and next(left, None) is not None else None


# The store


def test_an_object_is_replaced_only_if_it_is_the_one_that_is_known(gcs):
    one, other = Store("gs://bucket/run/"), Store("gs://bucket/run")
    assert one.url == "gs://bucket/run" and one.read("a") is None
    first = one.write("a", b"one", 0)
    with pytest.raises(Taken):
        other.write("a", b"two", 0)
    second = other.write("a", b"two", first)
    with pytest.raises(Taken):
        one.write("a", b"three", first)
    assert one.read("a") == (b"two", second) and gcs.read("run/a") == b"two"
    one.delete("a", first)
    assert one.read("a") is not None
    one.delete("a", second)
    with pytest.raises(Taken):
        other.write("a", b"four", second)


@pytest.mark.parametrize("what", [503, 429, "refuse", "lose"])
def test_what_fails_for_a_moment_is_asked_again(gcs, what):
    """With "lose", the write is done, and its repetition finds an object of another generation: its own."""
    store = Store("gs://bucket/run")
    gcs.trouble = some(1, what, "POST", "")
    generation = store.write("a", b"one", 0)
    gcs.trouble = some(1, what, "GET", "")
    assert store.read("a") == (b"one", generation)


def test_what_was_written_without_an_answer_is_known_to_be_ours(gcs, monkeypatch):
    """Also when the next content is written: the answer was waited for in vain."""
    store = Store("gs://bucket/run")
    gcs.trouble = lambda method, path: "lose" if method == "POST" else None
    with pytest.raises(Unreachable, match="gs://bucket/run cannot be written for now"):
        store.write("a", b"one", 0, seconds=0.1)
    assert gcs.read("run/a") == b"one"
    gcs.trouble = lambda method, path: None
    store.write("a", b"two", 0)
    assert gcs.read("run/a") == b"two"


def test_more_than_a_page(gcs):
    for number in range(45):
        gcs.put(f"run/{number:02}", b"")
        gcs.put(f"run/folder{number:02}/a", b"")
    files, folders = Store("gs://bucket/run").list()
    assert sorted(files) == [f"{n:02}" for n in range(45)] and folders == [f"folder{n:02}/" for n in range(45)]


@pytest.mark.parametrize(
    "url, message",
    [
        ("gs://nobody", "there is no such bucket"),
        ("s3://bucket/run", "neither a folder nor gs://BUCKET/PATH"),
        ("gs:///run", "neither a folder nor gs://BUCKET/PATH"),
    ],
)
def test_wrong_urls(gcs, url, message):
    with pytest.raises(UserError, match=message) as raised:
        Store(url)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "status, message", [(403, "storage.objectUser"), (401, "gcloud auth application-default login")]
)
def test_who_may_not_is_told_what_to_do(gcs, status, message):
    gcs.trouble = lambda method, path: status
    with pytest.raises(UserError, match=message) as raised:
        Store("gs://bucket/run")
    assert "\n" not in str(raised.value)


def test_without_credentials(gcs, monkeypatch):
    for name in gcs.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:1")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    with pytest.raises(UserError, match="gcloud auth application-default login") as raised:
        Store("gs://bucket/run")
    assert "\n" not in str(raised.value)


def test_without_gcsfs(gcs, monkeypatch):
    monkeypatch.setattr(remote, "_is_installed", lambda name: name != "gcsfs")
    with pytest.raises(UserError, match=r"pip install 'llm-jax\[gcs\]'"):
        Store("gs://bucket/run")


@pytest.mark.parametrize("field", ["data.cache_dir", "data.data_dir", "tokenizer.model_file"])
def test_data_are_read_from_files(field):
    config = Config()
    section, name = field.split(".")
    setattr(getattr(config, section), name, "gs://bucket/data")
    with pytest.raises(UserError, match=f"{field}=gs://bucket/data must be a path of this machine; mount"):
        validate(config)


# The local copy of the small files


def test_a_copy_is_what_is_in_the_store_and_back(gcs):
    gcs.put("run/metrics.jsonl", b"1\n")
    gcs.put("run/incidents/3-crash/incident.json", b"{}")
    gcs.put("run/checkpoints/3/large", b"large")
    mirror = Mirror(Store("gs://bucket/run"))
    mirror.pull()
    files = {path.relative_to(mirror.folder).as_posix() for path in mirror.folder.rglob("*") if path.is_file()}
    assert files == {"metrics.jsonl", "incidents/3-crash/incident.json"}

    with open(mirror.folder / "metrics.jsonl", "ab") as file:
        file.write(b"2\n")
    (mirror.folder / "tensorboard").mkdir()
    (mirror.folder / "tensorboard" / "events").write_bytes(b"events")
    (mirror.folder / "config.json.new").write_bytes(b"half")
    before = len(gcs.requests)
    mirror.push("metrics.jsonl")
    assert gcs.read("run/metrics.jsonl") == b"1\n2\n" and "run/tensorboard/events" not in gcs.objects
    mirror.push()
    assert gcs.read("run/tensorboard/events") == b"events" and "run/config.json.new" not in gcs.objects
    assert [line.split()[0] for line in gcs.requests[before:]] == ["POST", "POST"]  # what has not changed stays there

    gcs.put("run/metrics.jsonl", b"3\n")
    gcs.delete("run/incidents/3-crash/incident.json")
    mirror.pull()
    assert (mirror.folder / "metrics.jsonl").read_bytes() == b"3\n"
    assert not (mirror.folder / "incidents" / "3-crash" / "incident.json").exists()
    mirror.close()
    assert not mirror.folder.exists()


def test_nobody_writes_over_what_another_has_written(gcs):
    mirrors = [Mirror(Store("gs://bucket/run")) for _ in range(2)]
    for number, mirror in enumerate(mirrors):
        mirror.pull()
        (mirror.folder / "metrics.jsonl").write_text(f"{number}\n")
        (mirror.folder / "evaluate.json").write_text(f"{number}\n")
    mirrors[0].push()
    with pytest.raises(Taken, match="metrics.jsonl"):
        mirrors[1].push()
    assert gcs.read("run/metrics.jsonl") == b"0\n"
    assert gcs.read("run/evaluate.json") == b"1\n"  # which `evaluate` writes beside a training


def test_what_killed_processes_leave_tells_why_and_is_removed(gcs, tmp_path):
    program = """
import os, sys
from llm_jax.safety.remote import Mirror, Store
mirror = Mirror(Store("gs://bucket/run"))
(mirror.folder / "stacks").mkdir()
(mirror.folder / "stacks" / "stacks-0-1.txt").write_text("why")
(mirror.folder / "metrics.jsonl").write_text("stale")
os._exit(70)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 70
    others = Mirror(Store("gs://bucket/run"))  # of a process that is alive
    left = set(tmp_path.glob("llm_jax-*")) - {others.folder}
    assert len(left) == 1
    mirror = Mirror(Store("gs://bucket/run"))
    mirror.pull()
    assert not (mirror.folder / "metrics.jsonl").exists()
    mirror.salvage()
    assert gcs.names() == ["run/stacks/stacks-0-1.txt"]
    assert set(tmp_path.glob("llm_jax-*")) == {mirror.folder, others.folder}
    mirror.close()
    others.close()


# The lock


@pytest.fixture
def elsewhere(monkeypatch):
    """Leases as if on other hosts: whether their processes live cannot be told."""
    monkeypatch.setattr(lease_module, "_process", lambda number: "")


def test_one_at_a_time(gcs, monkeypatch, elsewhere):
    monkeypatch.setattr(lease_module, "SECONDS_TO_END", 0.0)
    store = Store("gs://bucket/run")
    first = Lease(store, lose, seconds=1.0)
    first.acquire()
    second = Lease(Store("gs://bucket/run"), lose, seconds=1.0)
    with pytest.raises(UserError, match="--workdir=gs://bucket/run is being trained by another process"):
        second.acquire()
    second.release()  # what it does not have
    first.confirm()
    first.release()
    assert "run/lock" not in gcs.objects
    third = Lease(Store("gs://bucket/run"), lose, seconds=60.0)
    third.acquire()  # at once
    third.release()


def test_a_dead_one_is_followed_when_its_time_is_over(gcs, monkeypatch, elsewhere, capfd):
    gcs.put("run/lock", json.dumps({"host": "gone", "process": "", "seconds": 0.5, "id": "x"}).encode())
    lease = Lease(Store("gs://bucket/run"), lose, seconds=60.0)
    lease.acquire()
    assert json.loads(gcs.read("run/lock"))["id"] != "x"
    lease.release()


def test_a_dead_one_of_this_host_is_followed_at_once(gcs):
    """The other one says that it takes an hour."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    identity = lease_module._process(child.pid)
    assert not is_dead(identity) and not is_dead(this_process()) and not is_dead("")
    assert not is_dead("other " + identity.partition(" ")[2])
    child.kill()
    child.wait()
    assert is_dead(identity)
    gcs.put("run/lock", json.dumps({"host": "here", "process": identity, "seconds": 3600.0, "id": "x"}).encode())
    lease = Lease(Store("gs://bucket/run"), lose, seconds=60.0)
    lease.acquire()
    lease.release()


def test_who_has_lost_it_is_told(gcs):
    told = threading.Event()
    lease = Lease(Store("gs://bucket/run"), lambda taken: told.set(), seconds=0.2)
    lease.acquire()
    gcs.put("run/lock", b"another")
    assert told.wait(30)
    lease.release()
    assert gcs.read("run/lock") == b"another"


def test_an_outage_longer_than_the_lock_lasts_is_no_reason_to_stop(gcs, monkeypatch, capfd):
    """But to write nothing until it is sure that nobody has taken over."""
    monkeypatch.setattr(remote, "SECONDS_TO_TRY", 0.2)
    told = threading.Event()
    lease = Lease(Store("gs://bucket/run"), lambda taken: told.set(), seconds=0.4)
    lease.acquire()
    gcs.trouble = lambda method, path: 503
    with pytest.raises(Unreachable):
        while True:
            lease.confirm()
    gcs.trouble = lambda method, path: None
    lease.confirm()
    gcs.put("run/lock", b"another")
    while not told.wait(0.05):
        lease.confirm()
    lease.release()


# Checkpoints

DIRECTORY = "gs://bucket/run/checkpoints"


def save(checkpoints: Checkpoints, mesh, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, placed(numbers(step), mesh), {"position": 100 * step})


def flip(gcs: FakeGcs, prefix: str) -> str:
    """One bit in the middle of the largest object; its name."""
    largest = max(gcs.names(prefix), key=lambda name: len(gcs.read(name)))
    data = bytearray(gcs.read(largest))
    data[len(data) // 2] ^= 1
    gcs.objects[largest] = (bytes(data), next(gcs.generations))
    return largest


def test_checkpoints_come_back_and_old_ones_go(gcs, mesh, capfd):
    checkpoints = Checkpoints(DIRECTORY, keep=2)
    assert checkpoints.steps() == [] and checkpoints.restore({}) is None
    save(checkpoints, mesh, 1, 2, 3)
    checkpoints.close()
    assert Checkpoints(DIRECTORY).steps() == [2, 3]
    assert {name.split("/")[2] for name in gcs.names()} == {"2", "3"}  # nothing is left of 1
    targets = {key: abstract(tree, mesh) for key, tree in numbers().items()}
    with jax.set_mesh(mesh):
        step, trees, meta = Checkpoints(DIRECTORY).restore(targets)
    assert step == 3 and meta["position"] == 300
    assert_same_bits(trees, numbers(3))
    assert not pathlib.Path("gs:").exists()
    told = [line for line in capfd.readouterr().err.splitlines() if "google_auth_provider" not in line]
    assert not told


def test_damage_is_found_and_put_aside(gcs, mesh, capfd):
    checkpoints = Checkpoints(DIRECTORY, keep=3)
    save(checkpoints, mesh, 1, 2)
    checkpoints.close()
    largest = flip(gcs, "run/checkpoints/2/parameters/")
    targets = {key: abstract(tree, mesh) for key, tree in numbers().items()}
    with jax.set_mesh(mesh):
        assert Checkpoints(DIRECTORY).verify(2).startswith("changed since it was saved")
        checkpoints = Checkpoints(DIRECTORY, keep=3)
        step, trees, _ = checkpoints.restore(targets)
    assert step == 1 and "2 is damaged and renamed to 2.bad" in capfd.readouterr().err
    assert_same_bits(trees, numbers(1))
    assert checkpoints.steps() == [1] and largest.replace("/2/", "/2.bad/") in gcs.objects
    save(checkpoints, mesh, 2)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2] and gcs.names("run/checkpoints/2.bad/")


def test_what_was_damaged_on_the_way_is_found_when_it_is_read_back(gcs, mesh, monkeypatch, capfd):
    """The store has other bytes than it was sent. Nothing older goes for it."""
    checkpoints = Checkpoints(DIRECTORY, keep=1)
    save(checkpoints, mesh, 1)
    checkpoints.wait()
    put = gcs.put

    def damage(name, data, query=None):
        if name == "run/checkpoints/2/commit_success.txt":
            flip(gcs, "run/checkpoints/2/parameters/")
        return put(name, data, query)

    monkeypatch.setattr(gcs, "put", damage)
    save(checkpoints, mesh, 2)
    checkpoints.close()
    assert "2 is damaged and renamed to 2.bad" in capfd.readouterr().err
    assert checkpoints.steps() == [1]


def test_half_a_checkpoint_is_none(gcs, mesh, monkeypatch):
    """Neither one whose save was interrupted, nor one whose deletion was."""
    checkpoints = Checkpoints(DIRECTORY, keep=3)
    save(checkpoints, mesh, 1, 2)
    checkpoints.close()
    gcs.delete("run/checkpoints/2/commit_success.txt")
    assert Checkpoints(DIRECTORY).steps() == [1]

    checkpoints = Checkpoints(DIRECTORY, keep=1)
    deleted = []
    delete = gcs.delete

    def note(name, query=None):
        deleted.append(name)
        delete(name, query)

    monkeypatch.setattr(gcs, "delete", note)
    save(checkpoints, mesh, 2, 3)
    checkpoints.close()
    first = [name for name in deleted if name.startswith("run/checkpoints/1/")]
    assert first[0] == "run/checkpoints/1/commit_success.txt" and len(first) > 10
    assert checkpoints.steps() == [3] and {name.split("/")[2] for name in gcs.names()} == {"3"}


@pytest.mark.parametrize("share", [0.005, pytest.param(0.1, marks=pytest.mark.soak)])
def test_what_fails_for_a_moment_does_not_fail_a_save(gcs, mesh, share):
    """That share of all requests, each in one of four ways."""
    rng = np.random.default_rng(0)
    kinds = [503, 429, "refuse", "lose"]
    befallen = []

    def trouble(method, path):
        if rng.random() < share:
            befallen.append(kinds[rng.integers(4)])
            return befallen[-1]

    gcs.trouble = trouble
    checkpoints = Checkpoints(DIRECTORY, keep=3)
    save(checkpoints, mesh, 1, 2)
    checkpoints.close()
    gcs.trouble = lambda method, path: None
    assert befallen and Checkpoints(DIRECTORY).steps() == [1, 2]
    with jax.set_mesh(mesh):
        assert [Checkpoints(DIRECTORY).verify(step) for step in (1, 2)] == [None, None]


def test_a_save_that_may_not_begin_has_failed_and_the_next_may(gcs, mesh):
    def before_save():
        if gcs.trouble("", "") is not None:
            raise Unreachable("no network")

    checkpoints = Checkpoints(DIRECTORY, keep=3, before_save=before_save)
    save(checkpoints, mesh, 1)
    checkpoints.wait()
    gcs.trouble = lambda method, path: 404 if "xyz" in path or not method else None
    with pytest.raises(SaveFailed, match="checkpoint of step 2 could not be saved in gs://bucket/run/checkpoints"):
        save(checkpoints, mesh, 2)
    gcs.trouble = lambda method, path: None
    save(checkpoints, mesh, 3)
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]


# The commands

# Leases of 3 s, as if every process ran on a host of its own. The training stops in step 17 while there is a file.
HOST = """
import os, time
from llm_jax.safety import lease
lease.SECONDS, lease.SECONDS_TO_END, lease._process = 3.0, 1.0, lambda number: ""
from llm_jax.data.stream import TrainStream
batch = TrainStream.batch
def slow(self, number, first=0, last=None):
    while number == 16 and os.path.exists(os.environ["LLM_JAX_TEST_STOP"]):
        time.sleep(0.05)
    return batch(self, number, first, last)
TrainStream.batch = slow
"""


class Host(Tiny):
    """Another machine: nothing is there but the data and the compiled programs."""

    def __init__(self, gcs: FakeGcs, tiny: Tiny, folder: pathlib.Path):
        super().__init__(folder)
        self.environment |= {**gcs.environment, "TFDS_DATA_DIR": str(tiny.data_dir), "TMPDIR": str(folder / "tmp")}
        self.environment |= {"HOME": str(folder), "LLM_JAX_TEST_STOP": str(folder / "stop")}
        self.stop = folder / "stop"
        (folder / "tmp").mkdir(parents=True)
        if tiny.cache.exists():
            shutil.copytree(tiny.cache, self.cache)

    def start(self, folder: pathlib.Path, *flags: str, number: int = 1) -> Processes:
        programs = dict.fromkeys(range(number), HOST)
        return Processes(self, "gs://bucket/run", folder, number, *flags, programs=programs)


def fetched(gcs: FakeGcs, folder: pathlib.Path) -> pathlib.Path:
    for name in gcs.names("run/"):
        path = folder / name.removeprefix("run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gcs.read(name))
    return folder


def same_run(gcs: FakeGcs, trained: pathlib.Path, folder: pathlib.Path) -> None:
    run = fetched(gcs, folder)
    assert curve(run) == curve(trained)
    assert record(run, "evaluate") == record(trained, "evaluate")
    for name in ("evaluate.json", "tokenizer.model"):
        assert (run / name).read_bytes() == (trained / name).read_bytes()
    ours, theirs = Checkpoints(run / "checkpoints"), Checkpoints(trained / "checkpoints")
    common = set(ours.steps()) & set(theirs.steps())
    assert {20, 24} <= common
    assert all(ours.record(step)["digests"] == theirs.record(step)["digests"] for step in common)
    left = {path.name for path in run.iterdir()} - {path.name for path in trained.iterdir()}
    assert not left, left


@pytest.mark.soak
def test_a_killed_run_goes_on_on_another_host(gcs, tiny, trained, tmp_path, monkeypatch, capfd):
    """Bit for bit as one on a disk that nothing has happened to. While it runs, no other one may."""
    first, second = Host(gcs, tiny, tmp_path / "first"), Host(gcs, tiny, tmp_path / "second")
    first.stop.touch()
    running = first.start(tmp_path / "a", NO_SAMPLE)
    try:
        running.wait_until(lambda: "run/checkpoints/16/commit_success.txt" in gcs.objects, "step 16")
        other = second.start(tmp_path / "b", NO_SAMPLE)
        assert other.wait_for_the_end() == [78]
        assert "--workdir=gs://bucket/run is being trained by another process" in other.text()
        assert "Traceback" not in other.text()
        assert running.processes[0].poll() is None
    finally:
        running.kill()
    shutil.rmtree(first.folder)
    running = second.start(tmp_path / "c", NO_SAMPLE)
    try:
        assert running.wait_for_the_end() == [0], running.text()
    finally:
        running.kill()
    assert "the run goes on from step 16" in running.text() and "gs://bucket/run: metrics.jsonl" in running.text()
    assert not list((second.folder / "tmp").glob("llm_jax-*")) and not pathlib.Path("gs:").exists()
    same_run(gcs, trained, tmp_path / "fetched")
    assert Checkpoints("gs://bucket/run/checkpoints").steps() == [16, 20, 24]  # and nothing of others
    assert {name.split("/")[2] for name in gcs.names("run/checkpoints/")} == {"16", "20", "24"}

    def told(verb: str, workdir, *flags: str) -> str:
        assert tiny.main(monkeypatch, verb, workdir, *flags, num_devices=1) == 0
        return capfd.readouterr().out.replace("gs://bucket/run", str(trained))

    before = dict(gcs.objects)
    for verb, *flags in [
        ("generate", "--prompt=The", "--max_tokens=4", "--temperature=0"),
        ("inspect checkpoints",),
        ("inspect params",),
        ("inspect batch", "--step=3"),
    ]:
        assert told(verb, "gs://bucket/run", *flags) == told(verb, trained, *flags) != ""
    assert "bit-identical in all 24 common steps" in told("inspect diff", "gs://bucket/run", f"--other={trained}")
    assert "2 starts" in told("inspect goodput", "gs://bucket/run")
    assert gcs.objects == before
    gcs.delete("run/evaluate.json")
    told("evaluate", "gs://bucket/run", "--json")
    assert gcs.read("run/evaluate.json") == (trained / "evaluate.json").read_bytes()


def test_a_wrong_url_is_one_line(gcs, tiny, monkeypatch, capsys):
    """And no folder of that name is made here."""
    for url in ("gs://nobody/run", "gs:/bucket/run", "s3://bucket/run", "gs://bucket/nothing"):
        assert tiny.main(monkeypatch, "evaluate", url) == 78
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("llm-jax: error: ") and url in line
    assert not pathlib.Path("gs:").exists() and not pathlib.Path("s3:").exists()


def test_verify_resume_wants_a_folder(gcs, tiny, monkeypatch, capsys):
    assert tiny.main(monkeypatch, "verify-resume", "gs://bucket/run") == 78
    assert "give it a folder here" in capsys.readouterr().err


@pytest.mark.soak
def test_who_has_lost_the_lock_writes_nothing_more(gcs, tiny, tmp_path):
    host = Host(gcs, tiny, tmp_path / "host")
    host.stop.touch()
    running = host.start(tmp_path / "out", NO_SAMPLE)
    try:
        running.wait_until(lambda: "run/checkpoints/16/commit_success.txt" in gcs.objects, "step 16")
        gcs.put("run/lock", b"another")
        assert running.wait_for_the_end() == [70]
    finally:
        running.kill()
    (line,) = [line for line in running.text().splitlines() if line.startswith("llm-jax: ")]
    assert line.startswith("llm-jax: stopped (exit code 70): another process has written gs://bucket/run/lock")
    assert gcs.read("run/lock") == b"another"


@pytest.mark.soak
def test_a_damaged_checkpoint_is_passed_over(gcs, tiny, trained, tmp_path):
    for number, flags in enumerate([["--config.train.steps=12"], []]):
        host = Host(gcs, tiny, tmp_path / f"host{number}")
        running = host.start(tmp_path / f"out{number}", *flags, "--config.optimizer.decay_steps=none", NO_SAMPLE)
        assert running.wait_for_the_end() == [0], running.text()
        if not number:
            flip(gcs, "run/checkpoints/12/parameters/")
    assert "checkpoint gs://bucket/run/checkpoints/12 is damaged and renamed to 12.bad" in running.text()
    assert "the run goes on from step 8" in running.text()


@pytest.mark.soak
@pytest.mark.parametrize("what", [503, "refuse"])
def test_an_outage_does_not_end_a_run(gcs, tiny, trained, tmp_path, what):
    """Of ten seconds, in which a checkpoint is saved."""
    host = Host(gcs, tiny, tmp_path / "host")
    host.stop.touch()
    running = host.start(tmp_path / "out", NO_SAMPLE)
    try:
        running.wait_until(lambda: "run/checkpoints/16/commit_success.txt" in gcs.objects, "step 16")
        gcs.trouble = lambda method, path: what
        host.stop.unlink()
        end = threading.Timer(10, setattr, (gcs, "trouble", lambda method, path: None))
        end.start()
        assert running.wait_for_the_end() == [0], running.text()
    finally:
        running.kill()
    same_run(gcs, trained, tmp_path / "fetched")


@pytest.mark.soak
def test_after_a_notice_all_is_saved_and_the_lock_is_free(gcs, tiny, trained, tmp_path):
    host = Host(gcs, tiny, tmp_path / "host")
    host.stop.touch()
    running = host.start(tmp_path / "out", NO_SAMPLE)
    try:
        running.wait_until(lambda: "run/checkpoints/16/commit_success.txt" in gcs.objects, "step 16")
        running.processes[0].send_signal(signal.SIGTERM)
        host.stop.unlink()
        assert running.wait_for_the_end() == [75], running.text()
    finally:
        running.kill()
    assert "run/lock" not in gcs.objects
    running = Host(gcs, tiny, tmp_path / "other").start(tmp_path / "then", NO_SAMPLE)
    assert running.wait_for_the_end() == [0], running.text()
    same_run(gcs, trained, tmp_path / "fetched")


@pytest.mark.soak
def test_many_processes(gcs, tiny, tmp_path):
    """One is killed, and all come back on other hosts. The losses are those of as many processes with a folder."""
    host = Host(gcs, tiny, tmp_path / "host")
    host.stop.touch()
    running = host.start(tmp_path / "out", NO_SAMPLE, number=2)
    try:
        running.wait_until(lambda: "run/checkpoints/16/commit_success.txt" in gcs.objects, "step 16")
        running.processes[0].kill()
        assert all(running.wait())
    finally:
        running.kill()
    running = Host(gcs, tiny, tmp_path / "other").start(tmp_path / "then", NO_SAMPLE, number=2)
    assert running.wait_for_the_end() == [0, 0], running.text()
    reference = Processes(tiny, tmp_path / "reference", tmp_path / "more", 2, NO_SAMPLE)
    assert reference.wait_for_the_end() == [0, 0], reference.text()
    same_run(gcs, tmp_path / "reference", tmp_path / "fetched")
