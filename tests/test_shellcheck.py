"""Every script under launch/ is clean by ShellCheck."""

import shutil
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = sorted(path for pattern in ("*.sh", "*.sbatch") for path in (ROOT / "launch").rglob(pattern))


def test_there_are_scripts():
    assert {"local.sh", "run_host.sh", "setup_vm.sh"} <= {path.name for path in SCRIPTS}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck(script):
    done = subprocess.run(["shellcheck", "--shell=bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
