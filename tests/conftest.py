"""Every test runs on 8 simulated CPU devices, so that meshes are real; nothing here needs an accelerator or a network.

The whole-system tests share the fixtures below: the command `llm-jax` on small datasets, and a run it has finished.
"""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiles in half the time, which is most of the time of the tests.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# As the command sets it, which would start itself again.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

# What a shell starts in the background ignores Ctrl-C, and so would all that is started from here.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Jobs jit their functions anew each time they are called.
COMPILED = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "tiny.py"


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=50, help="how often test_kill.py kills runs")


class Tiny:
    """The command `llm-jax` with tests/tiny.py, on the small datasets `tiny` and `other`, and with its own cache."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.data_dir = folder / "tfds"
        self.cache = folder / "cache"
        self.environment = {
            **os.environ,
            "LLM_JAX_CACHE": str(self.cache),
            "TFDS_DATA_DIR": str(self.data_dir),
        }

    def command(self, verb: str, workdir: pathlib.Path, *flags: str) -> list[str]:
        config = [f"--config={CONFIG}"] if verb in ("prepare", "train", "verify-resume") else []
        return [sys.executable, "-m", "llm_jax", verb, *config, f"--workdir={workdir}", *flags]

    def run(self, verb: str, workdir: pathlib.Path, *flags: str, **options) -> subprocess.CompletedProcess:
        """In a process of its own, as a user does."""
        command = self.command(verb, workdir, *flags)
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, **options)

    def main(self, monkeypatch, verb: str, workdir: pathlib.Path, *flags: str, num_devices: int = 8) -> int:
        """In this process, on so many of its 8 devices; the exit code. Faster where next to nothing is compiled."""
        from llm_jax import cli
        from llm_jax.parallel import hosts

        for name in ("LLM_JAX_CACHE", "TFDS_DATA_DIR"):
            monkeypatch.setenv(name, self.environment[name])
        monkeypatch.setattr(hosts, "start", lambda *args, **options: None)  # JAX runs already
        devices = jax.local_devices()[:num_devices]
        monkeypatch.setattr(jax, "devices", lambda: devices)
        return cli.main(self.command(verb, workdir, *flags)[3:])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    from tiny_corpus import TOPICS, write_corpus

    tiny = Tiny(tmp_path_factory.mktemp("tiny"))
    write_corpus(tiny.data_dir, {"train": TOPICS[:30], "validation": TOPICS[30:36]})
    write_corpus(tiny.data_dir, {"train": TOPICS[36:60], "validation": TOPICS[60:64]}, name="other")
    return tiny


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished run of tests/tiny.py on one device; tests that write to it take a copy."""
    workdir = tmp_path_factory.mktemp("trained")
    done = tiny.run("train", workdir)
    assert done.returncode == 0, done.stderr
    (workdir / "stdout.txt").write_text(done.stdout)
    (workdir / "stderr.txt").write_text(done.stderr)
    return workdir
