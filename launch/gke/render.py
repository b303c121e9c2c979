#!/usr/bin/env python3
"""Writes the JobSet that runs a command on the TPUs or GPUs of a GKE cluster, and has it come back by itself.

    python launch/gke/render.py --name=NAME --type=v6e:4x4 [flags] -- COMMAND... > jobset.yaml
    kubectl apply -f jobset.yaml

The head of the file says how to watch, stop and resume it, and what costs money. The cluster needs JobSet 0.10.

  python launch/gke/render.py --name=lm-1b --type=v6e:8x8 --git=https://github.com/OWNER/llm_jax \\
      --ref=0123456789abcdef0123456789abcdef01234567 --service_account=trainer --spot \\
      -- python -m llm_jax train --config=configs/lm_1b.py --workdir=gs://BUCKET/lm-1b
"""

import argparse
import math
import pathlib
import re
import sys
import textwrap

import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # as in a clone that is not installed

from llm_jax.config import UserError
from llm_jax.plan import topology
from llm_jax.plan.topology import Topology

BAD_USE = 78
POD = pathlib.Path(__file__).with_name("pod.sh")
# The node label of each chip and a machine that has it, first the default:
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, https://cloud.google.com/compute/docs/gpus
ACCELERATORS = {
    "v4": {"tpu-v4-podslice": "ct4p-hightpu-{}t"},
    "v5e": {"tpu-v5-lite-podslice": "ct5lp-hightpu-{}t"},
    "v5p": {"tpu-v5p-slice": "ct5p-hightpu-{}t"},
    "v6e": {"tpu-v6e-slice": "ct6e-standard-{}t"},
    "v7x": {"tpu7x": "tpu7x-standard-{}t"},
    "a100": {"nvidia-a100-80gb": "a2-ultragpu-8g", "nvidia-tesla-a100": "a2-highgpu-8g"},
    "h100": {"nvidia-h100-80gb": "a3-highgpu-8g", "nvidia-h100-mega-80gb": "a3-megagpu-8g"},
    "h200": {"nvidia-h200-141gb": "a3-ultragpu-8g"},
    "b200": {"nvidia-b200": "a4-highgpu-8g"},
}
JOB = "slice"  # pods are called NAME-slice-SLICE-HOST-xxxxx
LONGEST_NAME = 63  # of a host, by DNS
RESOURCE_NAME = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
BUCKET = r"[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]"
SECRET_NAME = r"(?:token|secret|password|passwd|(?:api|access|private)[_-]?key|credentials?)"
SECRET = re.compile(  # NAME=VALUE; a flag whose value is the next argument; user:password@; what tokens begin with
    rf"(?i:(?<![a-z]){SECRET_NAME}=\S|^--?([\w.-]*[._-])?{SECRET_NAME}$)|://[^/\s]*:[^/\s]*@"
    r"|\b(hf_\w{20}|gh[a-z]_\w{20}|github_pat_|glpat-|sk-[\w-]{20}|AIza[\w-]{30}|ya29\.)|-----BEGIN "
)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags, and the command after `--`."""
    parser = Parser(
        prog="render.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s --name=NAME --type=TYPE (--image=IMAGE | --git=URL --ref=SHA) [flags] -- COMMAND...",
    )  # fmt: skip
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet: a run has one name, and two runs do not share it")
    add("--type", required=True, help="as for llm-jax plan: a slice such as v6e:4x4, or GPUs such as h100:16")
    add("--slices", type=int, default=1, help="of TPUs, joined by the network of the data centre")
    add("--accelerator", help="the node label, where a chip has several: nvidia-h100-mega-80gb, nvidia-tesla-a100")
    add("--image", help="of launch/gke/Dockerfile, with the code in it; with --git: python:3.12, or one with git")
    add("--git", help="the code: a repository that anyone may read")
    add("--ref", help="the commit of --git, in full: every restart runs the same")
    add("--secret", action="append", default=[], help="a Kubernetes Secret, whose entries become environment variables")
    add("--service_account", help="of Kubernetes: with Workload Identity it may read and write the buckets")
    add("--queue", help="the LocalQueue of Kueue that starts the JobSet")
    add("--spot", action="store_true", help="on spot nodes")
    add("--reservation", help="on nodes of this reservation")
    add("--mount", action="append", default=[], help="BUCKET=DIR: data, by gcsfuse; pvc:CLAIM=DIR: a shared disk")
    add("--grace_seconds", type=int, default=60, help="from TERM to the end of a pod: 60")
    add("--restarts", type=int, default=20, help="how many crashes to survive, preemptions not counted: 20")
    if "--" not in arguments and not {"--help", "-h"} & set(arguments):
        raise UserError("no command; give it after --")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    options.command = arguments[end + 1 :]
    return options


def check(options: argparse.Namespace, place: Topology) -> None:
    """Raises UserError for what Kubernetes would refuse late, or what would lose work or a secret."""
    hosts = place.num_hosts // place.slices
    longest = f"{options.name}-{JOB}-{place.slices - 1}-{hosts - 1}-xxxxx"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", options.name):
        raise UserError(f"--name={options.name} must be a-z, 0-9 and -, begin with a letter and not end with -")
    if len(longest) > LONGEST_NAME:
        room = LONGEST_NAME - len(longest) + len(options.name)
        raise UserError(f"--name={options.name} is too long: a pod would be {longest}; at most {room} characters")
    names = [(flag, getattr(options, flag)) for flag in ("service_account", "queue", "reservation")]
    for flag, value in [*names, *(("secret", name) for name in options.secret)]:
        if value is not None and (not re.fullmatch(RESOURCE_NAME, value) or len(value) > LONGEST_NAME):
            raise UserError(f"--{flag}={value} must be the name of one that exists: a-z, 0-9, - and .")
    if place.slices > 1 and hosts == 1:
        raise UserError(f"--slices={place.slices}: GKE joins slices of several hosts, and {options.type} is one host")
    known = ACCELERATORS[place.chip.name]
    if options.accelerator not in (None, *known):
        raise UserError(f"--accelerator={options.accelerator} must be one of {', '.join(known)} for {place.chip.name}")
    if options.spot and options.reservation:
        raise UserError("--spot and --reservation exclude each other: spot nodes are of no reservation")
    for flag in ("grace_seconds", "restarts"):
        if getattr(options, flag) < 0:
            raise UserError(f"--{flag}={getattr(options, flag)} must be 0 or more")
    _check_code(options)
    _check_command(options)


def _check_code(options: argparse.Namespace) -> None:
    if not options.image and not options.git:
        raise UserError("give the code: --image=IMAGE built by launch/gke/Dockerfile, or --git=URL --ref=SHA")
    if bool(options.git) != bool(options.ref):
        raise UserError("--git and --ref belong together; --ref is the full commit, as git rev-parse HEAD prints it")
    if options.git and re.match(r"\w+://[^/]*@", options.git):
        raise UserError(
            "--git: who may see the JobSet would see the user or token in this URL; use --image for private code"
        )
    if options.git and not re.fullmatch(r"https://\S+", options.git):
        raise UserError(f"--git={options.git} must be an https:// URL that anyone may read; use --image for other code")
    if options.ref and not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", options.ref):
        raise UserError(
            f"--ref={options.ref} must be a full commit, so that a restart runs the same; see git rev-parse HEAD"
        )
    if options.image and not re.fullmatch(r"\S+(@sha256:[0-9a-f]{64}|:(?!latest$)[\w.-]+)", options.image):
        raise UserError(
            f"--image={options.image} must have a digest or a tag but latest, so that a restart runs the same"
        )


def _check_command(options: argparse.Namespace) -> None:
    if not options.command:
        raise UserError("no command; give it after --")
    for number, argument in enumerate(options.command, 1):
        if SECRET.search(argument):
            raise UserError(
                f"argument {number} of the command seems to hold a secret, which all who may see the JobSet would see; "
                "put it into a Kubernetes Secret (kubectl create secret generic NAME --from-env-file=FILE) and give "
                "--secret=NAME: it is an environment variable then"
            )
    mounts = [_mount(mount) for mount in options.mount]
    directories = [directory for _, directory in mounts]
    if len(set(directories)) < len(directories):
        raise UserError(f"--mount: two at one directory: {', '.join(directories)}; give each its own")
    workdir = _flag(options.command, "--workdir")
    claims = [directory for volume, directory in mounts if "csi" not in volume]
    if workdir is not None and not re.match(r"gs://[^/]+/[^/]", workdir):
        path = pathlib.PurePosixPath(workdir)
        if ".." in path.parts or not any(path.is_relative_to(directory) for directory in claims):
            raise UserError(
                f"--workdir={workdir} must be gs://BUCKET/PATH, or below the DIR of a --mount=pvc:CLAIM=DIR: the disk "
                "of a pod is gone with the pod, and a bucket has neither locks nor renames when it is mounted"
            )
    notice = _flag(options.command, "--config.checkpoint.notice_seconds")
    if notice and re.fullmatch(r"[\d.]+", notice) and float(notice) > options.grace_seconds:
        raise UserError(
            f"--grace_seconds={options.grace_seconds} is less than checkpoint.notice_seconds={notice}: the pod would "
            f"be killed while it saves; give --grace_seconds={math.ceil(float(notice))} or more"
        )


def _flag(command: list[str], name: str) -> str | None:
    """The value of the last --name=VALUE or --name VALUE."""
    value = None
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        if argument == name:
            value = following
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


def _mount(text: str) -> tuple[dict, str]:
    """The volume, without its name, and the directory."""
    source, _, directory = text.partition("=")
    path = pathlib.PurePosixPath(directory)
    if not path.is_absolute() or len(path.parts) < 2 or ".." in path.parts:
        raise UserError(f"--mount={text} must be BUCKET=DIR or pvc:CLAIM=DIR, with a DIR such as /data")
    claim = source.removeprefix("pvc:")
    if source != claim and re.fullmatch(RESOURCE_NAME, claim):
        return {"persistentVolumeClaim": {"claimName": claim}}, str(path)
    if not re.fullmatch(BUCKET, source):
        raise UserError(f"--mount={text}: {source} is no name of a bucket (without gs://, without a path)")
    attributes = {"bucketName": source, "mountOptions": "implicit-dirs"}
    return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}, str(path)


def jobset(options: argparse.Namespace, place: Topology) -> dict:
    """The object; flags must have been checked."""
    tpu = place.chip.torus > 0
    hosts = place.num_hosts // place.slices
    metadata: dict = {"name": options.name}
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    if tpu and hosts > 1:  # a node pool is a slice: no two jobs share one
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    of_train = {"containerName": "train", "operator": "In"}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                *({"action": "FailJob", "onExitCodes": {**of_train, "values": [code]}} for code in (75, 78)),
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": _pod(options, place),
    }
    # The first rule that fits one of the failed jobs holds; what none fits is counted. A job's message is, for example,
    # "Container train for pod NAME failed with exit code 78 matching FailJob rule at index 1".
    by_policy = {"onJobFailureReasons": ["PodFailurePolicy"]}
    bad = {"name": "bad_config", "action": "FailJobSet", **by_policy}
    bad["onJobFailureMessagePatterns"] = [r"\bexit code 78\b"]
    free = {"name": "saved_or_disrupted", "action": "RestartJobSetAndIgnoreMaxRestarts", **by_policy}
    free["onJobFailureMessagePatterns"] = [r"\bexit code 75\b", r"\bcondition DisruptionTarget\b"]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": options.restarts, "rules": [bad, free]},
            "replicatedJobs": [{"name": JOB, "replicas": place.slices, "template": {"spec": job}}],
        },
    }


def _pod(options: argparse.Namespace, place: Topology) -> dict:
    tpu = place.chip.torus > 0
    chips = _chips(place)
    resource = "google.com/tpu" if tpu else "nvidia.com/gpu"
    selector = {f"cloud.google.com/gke-{'tpu-' * tpu}accelerator": _accelerator(options, place)}
    tolerations = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if tpu:
        selector["cloud.google.com/gke-tpu-topology"] = "x".join(map(str, place.shape))
        if place.shape == (2, 4):  # also sold as one host of 8 chips
            selector["cloud.google.com/gke-accelerator-count"] = str(chips)
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"})
    if options.reservation:
        selector["cloud.google.com/reservation-name"] = options.reservation
    # Grain and NCCL share memory between processes, and the default is 64 MiB.
    volumes = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "memory", "mountPath": "/dev/shm"}]
    for number, (volume, directory) in enumerate(map(_mount, options.mount)):
        volumes.append({"name": f"mount-{number}", **volume})
        mounts.append({"name": f"mount-{number}", "mountPath": directory})
    # Kubernetes does not tell it. Of TPUs, GKE does, and this is a check: slices that have not found each other would
    # train one by one, in the same workdir.
    count = f"--num_processes={place.num_hosts}"
    arguments = ["tpu" if tpu else "cuda,gcs", options.git or "", options.ref or "", *options.command, count]
    container = {
        "name": "train",
        "image": options.image or "python:3.12",
        "command": ["bash", "-c", POD.read_text("utf-8"), "train"],
        "args": [argument.replace("$", "$$") for argument in arguments],  # $(NAME) would be expanded
        "resources": {"limits": {resource: chips}},
        "volumeMounts": mounts,
    }
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in options.secret]
    if not tpu:  # where GKE puts the driver
        container["env"] = [{"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"}]
    if tpu:  # of libtpu, and of several slices; GKE sets TPU_WORKER_* and MEGASCALE_* by what it sees in the JobSet
        container["ports"] = [{"containerPort": 8471}, {"containerPort": 8080}]
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": volumes,
    }
    if options.service_account:  # not with hostNetwork, where a pod has the identity of the node
        spec["serviceAccountName"] = options.service_account
    annotations = {"gke-gcsfuse/volumes": "true"} if any("csi" in volume for volume in volumes) else None
    return {"metadata": {"annotations": annotations}, "spec": spec} if annotations else {"spec": spec}


def _chips(place: Topology) -> int:
    """Of one host."""
    return min(place.chip.host, math.prod(place.shape))


def _accelerator(options: argparse.Namespace, place: Topology) -> str:
    return options.accelerator or next(iter(ACCELERATORS[place.chip.name]))


def head(options: argparse.Namespace, place: Topology) -> str:
    """What a user wants to know of this JobSet, as comments."""
    name, chips = options.name, _chips(place)
    machine = ACCELERATORS[place.chip.name][_accelerator(options, place)].format(chips)
    label = "jobset.sigs.k8s.io"
    hosts = f"{place.num_hosts} host{'s' * (place.num_hosts > 1)}"
    tier = "spot" if options.spot else f"reservation {options.reservation}" if options.reservation else "on demand"
    pods = f"-l {label}/jobset-name={name}"
    first = f"{pods},{label}/job-index=0,batch.kubernetes.io/job-completion-index=0"
    text = f"""
        {place.name}: {place.num_chips} chips, {hosts} of {chips} ({machine}), {tier}.
        Rendered by launch/gke/render.py; the cluster needs JobSet 0.10 or newer.

        start          kubectl apply -f FILE
        resume         the same, after `stop` if it is still there: ended, or to be changed
        watch          kubectl get pods -o wide -w {pods}
        log            kubectl logs -f -c train {first}
        older logs     gcloud logging read 'labels."k8s-pod/jobset_sigs_k8s_io/jobset-name"="{name}"'
        restarts, why  kubectl describe jobset {name}
        stop           kubectl delete jobset {name}    (it saves first)

        After a notice (exit code 75) and when a node is drained or preempted it starts again, uncounted; after a crash
        up to {options.restarts} times; after an error in the config (78) not at all. Pods that stay Pending: see
        kubectl describe pod; often there is no such node pool, or no capacity.

        Nodes cost, pods do not. A node pool that scales by itself gives nodes back some 10 minutes after their last
        pod. One of a fixed size and a reservation cost until you resize or delete them:
        gcloud container node-pools list --cluster=CLUSTER --location=PLACE
        """
    if options.spot:
        text += """
        Spot nodes leave pods 15 s by default, whatever --grace_seconds says; from GKE 1.35 a node pool can be set to up
        to 120 s. Give the run --config.checkpoint.notice_seconds=15, or what you set. See
        https://cloud.google.com/kubernetes-engine/docs/concepts/spot-vms
        """
    if not place.chip.torus and place.num_hosts > 1:
        text += """
        NCCL takes the plain network of the pods, which is slow. GPUDirect needs networks and plugins of your cluster:
        https://cloud.google.com/kubernetes-engine/docs/how-to/gpu-bandwidth-gpudirect-tcpx
        """
    lines = textwrap.dedent(text).strip().splitlines()
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


class Dumper(yaml.SafeDumper):
    """Strings of several lines as such, and nothing by reference."""

    def ignore_aliases(self, data) -> bool:
        return True


def _text(dumper: Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, _text)


def render(arguments: list[str]) -> str:
    """The file for these flags. Raises UserError."""
    options = parse(arguments)
    try:
        place = topology.parse(options.type, options.slices)
    except UserError as error:
        raise UserError(str(error).replace("--topology=", "--type=")) from error
    check(options, place)
    return head(options, place) + yaml.dump(jobset(options, place), Dumper=Dumper, sort_keys=False, width=1000)


if __name__ == "__main__":
    try:
        print(render(sys.argv[1:]), end="")
    except UserError as error:
        print(f"render.py: {error}", file=sys.stderr)
        sys.exit(BAD_USE)
