"""The JobSet of launch/gke/render.py, by the published schemas; and what its pods run, really run in a sandbox."""

import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

from llm_jax.config import UserError
from llm_jax.parallel import cluster

RENDER = ROOT / "launch" / "gke" / "render.py"
CRD = pathlib.Path(__file__).parents[2] / "shared" / "data" / "schemas" / "jobset_crd.yaml"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
URL = "https://github.com/owner/llm_jax"
CODE = [f"--git={URL}", f"--ref={COMMIT}"]
TRAIN = ["python", "-m", "llm_jax", "train", "--workdir=gs://bucket/runs/1"]
SECONDS_TO_END = 60

spec = importlib.util.spec_from_file_location("render", RENDER)
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)


def jobset(*flags: str, name: str = "run", type: str = "v6e:4x4", code=CODE, command=TRAIN) -> dict:
    return yaml.safe_load(render.render([f"--name={name}", f"--type={type}", *code, *flags, "--", *command]))


def job(found: dict) -> dict:
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(found: dict) -> dict:
    return job(found)["template"]["spec"]


# Type, hosts of a slice, chips of a host, node labels: of GKE's tables and of what others render.
TYPES = [
    ("v4:2x2x4", 4, 4, {"gke-tpu-accelerator": "tpu-v4-podslice", "gke-tpu-topology": "2x2x4"}),
    ("v5e:1x1", 1, 1, {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "1x1"}),
    ("v5e:16x16", 64, 4, {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "16x16"}),
    ("v5p:4x4x8", 32, 4, {"gke-tpu-accelerator": "tpu-v5p-slice", "gke-tpu-topology": "4x4x8"}),
    ("v6e:2x2", 1, 4, {"gke-tpu-accelerator": "tpu-v6e-slice", "gke-tpu-topology": "2x2"}),
    ("v6e:4x8", 8, 4, {"gke-tpu-accelerator": "tpu-v6e-slice", "gke-tpu-topology": "4x8"}),
    ("v7x:2x2x1", 1, 4, {"gke-tpu-accelerator": "tpu7x", "gke-tpu-topology": "2x2x1"}),
    ("v7x:4x4x4", 16, 4, {"gke-tpu-accelerator": "tpu7x", "gke-tpu-topology": "4x4x4"}),
    ("a100:8", 1, 8, {"gke-accelerator": "nvidia-a100-80gb"}),
    ("h100:4", 1, 4, {"gke-accelerator": "nvidia-h100-80gb"}),
    ("h100:16", 2, 8, {"gke-accelerator": "nvidia-h100-80gb"}),
    ("h200:32", 4, 8, {"gke-accelerator": "nvidia-h200-141gb"}),
    ("b200:64", 8, 8, {"gke-accelerator": "nvidia-b200"}),
]
EVERYTHING = [
    "--secret=wandb", "--secret=other", "--service_account=trainer", "--queue=team", "--mount=my_bucket.x=/data",
    "--mount=pvc:shared=/runs", "--grace_seconds=120", "--restarts=3",
]  # fmt: skip


@pytest.mark.parametrize(("type", "hosts", "chips", "labels"), TYPES)
def test_hosts_and_chips(type, hosts, chips, labels):
    found = jobset(type=type)
    resource = "google.com/tpu" if "gke-tpu-topology" in labels else "nvidia.com/gpu"
    assert job(found)["parallelism"] == job(found)["completions"] == hosts
    assert pod(found)["containers"][0]["resources"]["limits"] == {resource: chips}
    assert pod(found)["nodeSelector"] == {f"cloud.google.com/{name}": value for name, value in labels.items()}
    assert hosts * chips == math.prod(map(int, type.partition(":")[2].split("x")))


def test_two_by_four_is_not_taken_for_one_host_of_eight():
    found = jobset(type="v6e:2x4")
    assert job(found)["parallelism"] == 2
    assert pod(found)["nodeSelector"]["cloud.google.com/gke-accelerator-count"] == "4"


def test_slices_are_jobs_with_a_node_pool_each():
    found = jobset("--slices=3")
    assert found["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert job(found)["parallelism"] == 4
    assert pod(found)["containers"][0]["args"][-1] == "--num_processes=12"
    assert found["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    for type in ("v6e:2x2", "h100:16"):  # a node pool may hold several
        assert "annotations" not in jobset(type=type)["metadata"]


def test_flags_are_where_kubernetes_looks():
    found = jobset(*EVERYTHING, "--reservation=ours")
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert pod(found)["serviceAccountName"] == "trainer"
    assert pod(found)["terminationGracePeriodSeconds"] == 120
    assert pod(found)["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"
    (container,) = pod(found)["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}, {"secretRef": {"name": "other"}}]
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {paths[volume.pop("name")]: volume for volume in pod(found)["volumes"]}
    assert volumes["/data"]["csi"]["volumeAttributes"]["bucketName"] == "my_bucket.x"
    assert volumes["/runs"] == {"persistentVolumeClaim": {"claimName": "shared"}}
    assert job(found)["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    spot = jobset("--spot", "--accelerator=nvidia-h100-mega-80gb", type="h100:8")
    assert pod(spot)["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-mega-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    image = jobset(code=["--image=registry:5000/llm_jax:abc"])
    assert pod(image)["containers"][0]["image"] == "registry:5000/llm_jax:abc"


def test_gpu_pods_find_each_other(monkeypatch):
    found = jobset(name="gpt", type="h100:16")
    (container,) = pod(found)["containers"]
    assert container["env"] == [{"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"}]
    flag = container["args"][-1]
    assert flag == "--num_processes=2"
    # The name of pod 1 of job 0 of a JobSet, in the domain of the service that it makes.
    for name in [name for name in os.environ if name.startswith(("OMPI_", "SLURM_", "JAX_COORDINATOR"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    replicated = found["spec"]["replicatedJobs"][0]["name"]
    monkeypatch.setattr(socket, "getfqdn", lambda: f"gpt-{replicated}-0-1.gpt.default.svc.cluster.local")
    place = cluster.find(None, int(flag.partition("=")[2]), None, tpus=False, seconds=1)
    assert (place.num_processes, place.process_id) == (2, 1)
    assert place.coordinator == f"gpt-{replicated}-0-0.gpt.default.svc.cluster.local:8482"


# Schemas.


def strict(schema) -> None:
    """As the API server reads it, and unknown fields refused, as kubectl does."""
    if isinstance(schema, dict):
        if schema.pop("x-kubernetes-int-or-string", None):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        strict(inner)


@pytest.fixture(scope="module")
def crd():
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    if not CRD.exists():
        pytest.skip("needs shared/data/schemas/jobset_crd.yaml, which is not here")
    definition = yaml.load(CRD.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["storage"]]
    strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def kubernetes():
    package = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")

    def errors(found: dict) -> list[str]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job(found)}
        try:
            package.validate(whole, "1.33", strict=True)
        except package.ValidationError as error:
            return [str(error)]
        return []

    return errors


@pytest.mark.parametrize("flags", [[], EVERYTHING, ["--spot"]], ids=["plain", "everything", "spot"])
@pytest.mark.parametrize("type", ["v4:2x2x4", "v5e:4x4", "v5p:4x4x4", "v6e:1x1", "v7x:4x4x4", "a100:8", "h100:16"])
def test_fits_the_published_schemas(type, flags, crd, kubernetes):
    found = jobset(*flags, type=type)
    assert [error.message for error in crd.iter_errors(found)] == []
    assert kubernetes(found) == []


def a_typo(found):
    job(found)["backofLimit"] = job(found).pop("backoffLimit")


def a_string(found):
    found["spec"]["failurePolicy"]["maxRestarts"] = "50"


def an_action(found):
    found["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"


def a_rule_without_a_name(found):
    del found["spec"]["failurePolicy"]["rules"][0]["name"]


def a_wrong_place(found):
    found["spec"]["template"] = found["spec"]["replicatedJobs"][0]["template"]


def an_image_list(found):
    pod(found)["containers"][0]["image"] = ["python"]


def a_container_typo(found):
    pod(found)["containers"][0]["volumeMount"] = pod(found)["containers"][0].pop("volumeMounts")


def exit_codes_as_text(found):
    job(found)["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] = ["75"]


@pytest.mark.parametrize("plant", [a_typo, a_string, an_action, a_rule_without_a_name, a_wrong_place, an_image_list])
def test_planted_errors_are_found_by_the_schema_of_jobset(plant, crd):
    found = jobset()
    plant(found)
    assert list(crd.iter_errors(found))


@pytest.mark.parametrize("plant", [a_typo, an_image_list, a_container_typo, exit_codes_as_text])
def test_planted_errors_are_found_by_the_schema_of_jobs(plant, kubernetes):
    found = jobset()
    plant(found)
    assert kubernetes(found)


# What comes after an exit code, by the rules of Kubernetes' job controller and of JobSet's failure policy.


def job_failure(found: dict, pods: list[int | str]) -> tuple[str, str] | None:
    """(reason, message) of a job whose pods have ended with these exit codes, or were disrupted.

    As in kubernetes/pkg/controller/job: the first pod that a rule fits fails the job; else the first failure does.
    """
    assert job(found)["backoffLimit"] == 0 and pod(found)["restartPolicy"] == "Never"
    for number, end in enumerate(pods):
        for index, rule in enumerate(job(found)["podFailurePolicy"]["rules"]):
            assert rule["action"] == "FailJob"
            codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
            if codes and codes["operator"] == "In" and end in codes["values"]:
                assert codes["containerName"] == pod(found)["containers"][0]["name"]
                text = f"Container train for pod default/run-{number} failed with exit code {end}"
            elif conditions and end == "disrupted":
                assert conditions == [{"type": "DisruptionTarget", "status": "True"}]
                text = f"Pod default/run-{number} has condition DisruptionTarget"
            else:
                continue
            return "PodFailurePolicy", f"{text} matching FailJob rule at index {index}"
    return ("BackoffLimitExceeded", "Job has reached the specified backoff limit") if any(pods) else None


def action(found: dict, jobs: list[list[int | str]]) -> str:
    """What JobSet does: the first rule that fits one of the failed jobs, else a restart that is counted."""
    failures = [failure for pods in jobs if (failure := job_failure(found, pods))]
    for rule in found["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        for reason, message in failures:
            if reason in rule["onJobFailureReasons"] and any(
                re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]
            ):
                return rule["action"]
    return "RestartJobSet" if failures else "done"


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ([[0, 0], [0, 0]], "done"),
        ([[75, 75], [75, 75]], "RestartJobSetAndIgnoreMaxRestarts"),
        ([[70, 75], [0, 0]], "RestartJobSetAndIgnoreMaxRestarts"),
        ([[70, 70], [0, 75]], "RestartJobSetAndIgnoreMaxRestarts"),
        ([["disrupted", 70], [70, 70]], "RestartJobSetAndIgnoreMaxRestarts"),
        ([[70, 70], [70, 70]], "RestartJobSet"),
        ([[137, 0], [0, 0]], "RestartJobSet"),
        ([[134, 70], [70, 1]], "RestartJobSet"),
        ([[78, 78], [78, 78]], "FailJobSet"),
        ([[0, 0], [0, 78]], "FailJobSet"),
        ([[75, 75], [78, 78]], "FailJobSet"),
    ],
)
def test_what_follows_an_exit_code(jobs, expected):
    assert action(jobset("--slices=2"), jobs) == expected


# What a pod runs.


def expanded(text: str, environment: dict[str, str]) -> str:
    """As Kubernetes expands `command` and `args`: $(NAME) if there is one, and $$ is $."""
    known = lambda match: "$" if match[0] == "$$" else environment.get(match[1], match[0])  # noqa: E731
    return re.sub(r"\$\$|\$\(([^)]*)\)", known, text)


class Sandbox:
    """A container's home, a repository with the code, and programs that stand in for slow ones."""

    def __init__(self, folder: pathlib.Path, setup: str = ":"):
        self.home, self.bin, repository = folder / "home", folder / "bin", folder / "repository"
        for path in (self.home, self.bin, repository / "launch"):
            path.mkdir(parents=True)
        self.slept = folder / "slept"
        self.program("sleep", f'[[ $1 == 0* ]] && exec {shutil.which("sleep")} "$1"; echo "$1" >>{self.slept}')
        shutil.copy(ROOT / "launch" / "run_host.sh", repository / "launch")
        (repository / "launch" / "setup_vm.sh").write_text(f"#!/usr/bin/env bash\necho setup_vm.sh $*\n{setup}\n")
        (repository / "launch" / "setup_vm.sh").chmod(0o755)
        self.repository = repository
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
            "GIT_CONFIG_VALUE_0": URL,
        }
        self.git("init", "-q")
        self.git("add", ".")
        self.git("-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "-m", "x")
        self.commit = self.git("rev-parse", "HEAD")

    def git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.repository), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    def program(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.bin / name).chmod(0o755)

    def start(self, *command: str, code: list[str] | None = None, before: list[str] = ()) -> subprocess.Popen:
        """The container of the pod that is rendered for the command."""
        code = code or [f"--git={URL}", f"--ref={self.commit}"]
        (container,) = pod(jobset(code=code, command=command))["containers"]
        argv = [expanded(text, {"HOME": "EXPANDED"}) for text in [*container["command"], *container["args"]]]
        return subprocess.Popen(
            [*before, *argv], env=self.environment, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *command: str, **options) -> tuple[int, str]:
        """(exit code, output)"""
        with killing(self.start(*command, **options)) as process:
            output, _ = process.communicate(timeout=SECONDS_TO_END)
            return process.returncode, output

    def sleeps(self) -> list[str]:
        return self.slept.read_text().split() if self.slept.exists() else []


class killing:
    """The process and all that it has started are gone at the end."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def __enter__(self) -> subprocess.Popen:
        return self.process

    def __exit__(self, *_) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all have ended
        self.process.wait()
        self.process.stdout.close()


def wait_for(path: pathlib.Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_END
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path} in {SECONDS_TO_END} s"
        time.sleep(0.02)


def test_arguments_arrive_unchanged(tmp_path):
    arguments = [
        "a b", "it's", '"quoted"', "$HOME", "$(HOME)", "$$(HOME)", "$$", "ends in $", "${HOME}", "`id`", "two\nlines ",
        "*", "\\", "", " ", "ü", "#no", "- x: y", "--", "%s", "!!", "{a,b}", "~", "null", "1e3",
    ]  # fmt: skip
    sandbox, told = Sandbox(tmp_path), tmp_path / "told"
    program = f"import json, sys; json.dump(sys.argv[1:], open({str(told)!r}, 'w'))"
    code, output = sandbox.run(sys.executable, "-c", program, *arguments)
    assert code == 0, output
    assert json.loads(told.read_text()) == [*arguments, "--num_processes=4"]
    assert "setup_vm.sh --extra=tpu" in output


@pytest.mark.parametrize("code", [0, 75, 70, 78, 1])
def test_exit_codes_come_back_and_crashes_late(tmp_path, code):
    sandbox = Sandbox(tmp_path)
    assert sandbox.run("bash", "-c", f"exit {code}")[0] == code
    assert sandbox.sleeps() == (["15"] if code in (70, 1) else [])


def process_1() -> list[str]:
    """What makes a program process 1, as it is in a container."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a namespace of processes (unshare --pid)")
    return command


@pytest.mark.parametrize("as_process_1", [False, True])
def test_term_reaches_the_command(tmp_path, as_process_1):
    sandbox, ready = Sandbox(tmp_path), tmp_path / "ready"
    before = process_1() if as_process_1 else []
    program = f"trap 'exit 75' TERM; touch {ready}; while :; do sleep 0.05; done"
    with killing(sandbox.start("bash", "-c", program, before=before)) as process:
        wait_for(ready)
        term(process, as_process_1)
        output, _ = process.communicate(timeout=SECONDS_TO_END)
        assert process.returncode == 75, output
    assert sandbox.sleeps() == []


def term(process: subprocess.Popen, is_child: bool) -> None:
    """To the container's bash, which is a child of unshare if it is process 1."""
    if not is_child:
        return process.send_signal(signal.SIGTERM)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)


@pytest.mark.parametrize("as_process_1", [False, True])
def test_term_in_the_setup_is_a_preemption(tmp_path, as_process_1):
    ready, trained = tmp_path / "ready", tmp_path / "trained"
    sandbox = Sandbox(tmp_path, setup=f"touch {ready}; while :; do sleep 0.05; done")
    before = process_1() if as_process_1 else []
    with killing(sandbox.start("touch", str(trained), before=before)) as process:
        wait_for(ready)
        term(process, as_process_1)
        process.communicate(timeout=SECONDS_TO_END)
        assert process.returncode == 75
    assert not trained.exists()


@pytest.mark.parametrize("code", [1, 78])
def test_a_setup_that_fails_ends_the_pod(tmp_path, code):
    sandbox, trained = Sandbox(tmp_path, setup=f"exit {code}"), tmp_path / "trained"
    assert sandbox.run("touch", str(trained))[0] == code
    assert not trained.exists()


def test_a_network_that_flickers(tmp_path):
    sandbox, count = Sandbox(tmp_path), tmp_path / "count"
    real = shutil.which("git")
    sandbox.program("git", f'echo >>{count}; (($(wc -l <{count}) < 3)) && exit 128; exec {real} "$@"')
    assert sandbox.run("true")[0] == 0
    assert sandbox.sleeps() == ["10", "30"]
    sandbox.program("git", "exit 128")
    assert sandbox.run("true")[0] == 70


def test_a_commit_or_an_image_that_does_not_exist(tmp_path):
    sandbox = Sandbox(tmp_path)
    assert sandbox.run("true", code=CODE)[0] == 70
    shutil.rmtree(sandbox.home / "llm_jax")
    code, output = sandbox.run("true", code=["--image=python:3.12"])
    assert code == 78 and "Dockerfile" in output
    shutil.copytree(sandbox.repository, sandbox.home / "llm_jax")
    assert sandbox.run("true", code=["--image=llm_jax:1"])[0] == 0


# What is refused.

REFUSED = [
    (["--name=Run"], TRAIN, "--name=Run must be"),
    (["--name=1run"], TRAIN, "--name=1run must be"),
    (["--name=run-"], TRAIN, "--name=run- must be"),
    (["--type=v6e:4x5"], TRAIN, "--type=v6e:4x5: there is no such slice of v6e; the nearest are v6e:4x4"),
    (["--type=v7x:4x4"], TRAIN, "--type=v7x:4x4: there is no such slice"),
    (["--type=h100:12"], TRAIN, "--type=h100:12"),
    (["--type=v9:4x4"], TRAIN, "no chip of the name v9"),
    (["--type=v6e-16"], TRAIN, "--type=v6e-16 must be CHIP:SHAPE"),
    (["--type=h100:16", "--slices=2"], TRAIN, "--slices=2"),
    (["--type=v6e:2x2", "--slices=2"], TRAIN, "one host"),
    (["--slices=0"], TRAIN, "--slices=0"),
    (["--slices=two"], TRAIN, "--slices"),
    (["--accelerator=nvidia-h100-80gb"], TRAIN, "must be one of tpu-v6e-slice"),
    (["--spot", "--reservation=r"], TRAIN, "exclude each other"),
    (["--secret=My_Secret"], TRAIN, "--secret=My_Secret"),
    (["--queue=a b"], TRAIN, "--queue=a b"),
    (["--grace_seconds=-1"], TRAIN, "--grace_seconds=-1"),
    (["--grace_seconds=20"], [*TRAIN, "--config.checkpoint.notice_seconds=25"], "give --grace_seconds=25"),
    (["--restarts=-1"], TRAIN, "--restarts=-1"),
    (["--ref=main"], TRAIN, "--ref=main must be a full commit"),
    (["--git=git@github.com:a/b"], TRAIN, "must be an https:// URL"),
    (["--git=file:///a/b"], TRAIN, "must be an https:// URL"),
    (["--git=https://me:hidden@host/a"], TRAIN, "--git: who may see"),
    (["--image=llm_jax"], TRAIN, "so that a restart runs the same"),
    (["--image=host:5000/llm_jax"], TRAIN, "so that a restart runs the same"),
    (["--image=llm_jax:latest"], TRAIN, "so that a restart runs the same"),
    (["--mount=gs://b=/data"], TRAIN, "is no name of a bucket"),
    (["--mount=bucket=data"], TRAIN, "--mount=bucket=data must be"),
    (["--mount=bucket=/"], TRAIN, "--mount=bucket=/ must be"),
    (["--mount=pvc:A_B=/data"], TRAIN, "is no name of a bucket"),
    (["--mount=bucket=/data", "--mount=other=/data/"], TRAIN, "two at one directory"),
    (["--typ=v6e:4x4"], TRAIN, "--typ"),
    ([], [], "no command"),
    ([], ["train", "--workdir=runs/1"], "--workdir=runs/1 must be gs://"),
    ([], ["train", "--workdir", "/tmp/x"], "--workdir=/tmp/x must be gs://"),
    ([], ["train", "--workdir=gs://bucket"], "--workdir=gs://bucket must be"),
    (["--mount=bucket=/data"], ["train", "--workdir=/data/run"], "neither locks nor renames"),
    (["--mount=pvc:disk=/data"], ["train", "--workdir=/data/../run"], "--workdir=/data/../run"),
    ([], ["train", "--token=hidden"], "--secret=NAME"),
    ([], ["train", "--wandb_api_key", "hidden"], "--secret=NAME"),
    ([], ["bash", "-c", "HF_TOKEN=hidden python x"], "--secret=NAME"),
    ([], ["env", "WANDB_API_KEY=hidden", "python"], "--secret=NAME"),
    ([], ["train", "--store=https://me:hidden@host/x"], "--secret=NAME"),
    ([], ["train", "--x=hf_hiddenhiddenhiddenhidden"], "--secret=NAME"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "command", "message"), REFUSED)
def test_refused_in_one_line(flags, command, message):
    """And no secret is repeated."""
    with pytest.raises(UserError) as error:
        jobset(*flags, command=command)
    text = str(error.value)
    assert message in text and "\n" not in text and "hidden" not in text


def test_code_is_needed():
    for code in ([], CODE[:1], CODE[1:]):
        with pytest.raises(UserError, match="--git"):
            jobset(code=code)


def test_ordinary_flags_are_no_secrets():
    ordinary = ["--config.log.sample_tokens=8", "--config.tokenizer.vocab_size=400", "--config.model.num_heads=4",
                "--workdir=/runs/a", "--prompt=my password is long", "gs://bucket/x@y", "--secretary=x"]  # fmt: skip
    found = jobset("--mount=pvc:disk=/runs", command=ordinary)
    assert pod(found)["containers"][0]["args"][3:-1] == ordinary


def test_names_just_fit():
    def longest(name):
        found = jobset("--slices=12", name=name, type="v6e:16x16")
        return f"{name}-{found['spec']['replicatedJobs'][0]['name']}-11-{job(found)['completions'] - 1}-abcde"

    room = 63 - len(longest("x")) + 1
    assert len(longest("x" * room)) == 63
    with pytest.raises(UserError, match=f"at most {room} characters"):
        longest("x" * (room + 1))


def test_the_command_line():
    def run(*arguments):
        return subprocess.run([sys.executable, str(RENDER), *arguments], capture_output=True, text=True, cwd="/")

    good = run("--name=gpt", "--type=v5p:2x2x4", *CODE, "--spot", "--", *TRAIN)
    assert good.returncode == 0, good.stderr
    assert yaml.safe_load(good.stdout) == jobset("--spot", name="gpt", type="v5p:2x2x4")
    head = good.stdout[: good.stdout.index("apiVersion")]
    assert all(line.startswith("#") for line in head.splitlines())
    for text in ("kubectl apply", "kubectl logs", "kubectl delete jobset gpt", "16 chips, 4 hosts of 4", "15 s"):
        assert text in head
    bad = run("--name=gpt", "--type=v6e:3x3", *CODE, "--", *TRAIN)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (78, "", 1)
    assert bad.stderr.startswith("render.py: --type=v6e:3x3")
    assert run("--help").returncode == 0


def test_pods_script_has_nothing_that_kubernetes_expands():
    script = (RENDER.parent / "pod.sh").read_text()
    assert "$(" not in script and "$$" not in script
    assert script in yaml.safe_load(yaml.dump(pod(jobset())))["containers"][0]["command"]
