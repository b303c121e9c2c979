"""What is set before JAX starts, and what is left to the user."""

import os
import subprocess
import sys

import jax
import pytest
from jax._src import compiler

from llm_jax.environment import GPU_MEMORY, SETTING, for_gpu, for_malloc, has_gpu, repeats_exactly


def test_a_run_gets_most_of_a_gpu_s_memory():
    assert for_gpu({"PATH": "/bin"}) == {"XLA_CLIENT_MEM_FRACTION": "0.9"}


@pytest.mark.parametrize("name", GPU_MEMORY)
def test_what_the_user_set_stays(name):
    assert for_gpu({name: "0.5"}) == {}


@pytest.mark.parametrize(
    "platforms, found", [("", True), ("cuda", True), ("gpu,cpu", True), ("cpu", False), ("tpu,cpu", False)]
)
def test_gpus_are_those_that_jax_may_take(tmp_path, platforms, found):
    device = tmp_path / "nvidiactl"
    assert not has_gpu({"JAX_PLATFORMS": platforms}, str(device))
    device.touch()
    assert has_gpu({"JAX_PLATFORMS": platforms}, str(device)) == found


@pytest.mark.parametrize(
    "platform, flags, repeats",
    [
        ("cpu", "", True),
        ("tpu", "", True),
        ("gpu", "", False),
        ("gpu", "--xla_gpu_deterministic_ops=false", False),
        ("gpu", "--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true", True),
        ("gpu", "--xla_gpu_exclude_nondeterministic_ops", True),
    ],
)
def test_gpus_repeat_an_update_only_if_told_to(platform, flags, repeats):
    assert repeats_exactly(platform, {"XLA_FLAGS": flags}) == repeats


def test_jax_keeps_autotuning_results_in_its_compilation_cache():
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
    folder = options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir
    assert folder == f"{jax.config.jax_compilation_cache_dir}/xla_gpu_per_fusion_autotune_cache_dir"


def test_huge_pages_only_where_they_have_to_be_asked_for(tmp_path):
    setting = tmp_path / "enabled"
    assert for_malloc({}, setting) == {}
    for text, found in (
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
        ("[always] madvise never", {}),
        ("always madvise [never]", {}),
    ):
        setting.write_text(text)
        assert for_malloc({}, setting) == found
    setting.write_text("always [madvise] never")
    assert for_malloc({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, setting) == {}
    both = for_malloc({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, setting)
    assert both == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text("utf-8"),
    reason="this Linux gives huge pages to all or to nobody",
)
def test_the_command_starts_itself_again_once_with_all_its_arguments(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    argument = f'--config={tmp_path}/it\'s "here".py'
    done = subprocess.run(
        [sys.executable, "-m", "llm_jax", "train", argument, "--workdir=w"],
        env=environment,
        capture_output=True,
        text=True,
    )
    first, *others = done.stderr.splitlines()
    assert first == "llm-jax: sets GLIBC_TUNABLES=glibc.malloc.hugetlb=1, since the environment does not"
    assert done.returncode == 78 and len(others) == 1 and argument.removeprefix("--config=") in others[0]
