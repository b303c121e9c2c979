#!/usr/bin/env python3
"""A Cloud TPU without Google: `gcloud compute tpus ...`, as far as launch/tpu_vm.sh calls it.

What is asked for exists after a few looks. `ssh` really runs its command, each worker in a home of its own; `scp`
copies. FAKE_CLOUD names the folder with all of it; Cloud makes it, and can make things go wrong. Flags are those of
gcloud 528 (`gcloud compute tpus queued-resources create --help`), what it says for errors is in the words of the
real one. By hand:

    python tests/fake_gcloud.py build /tmp/cloud
    export FAKE_CLOUD=/tmp/cloud PATH=/tmp/cloud/bin:$PATH
"""

import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing

# Of a slice. https://cloud.google.com/tpu/docs/v5p and /v6e, column VMs
HOSTS = {"v2-8": 1, "v4-16": 2, "v5p-8": 1, "v5p-16": 2, "v5p-32": 4, "v5litepod-8": 1, "v5litepod-16": 4}
HOSTS |= {"v6e-1": 1, "v6e-4": 1, "v6e-8": 1, "v6e-16": 4, "v6e-32": 8}
COMES = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]  # a step at each look
PROJECT = "projects/my-project"
PYTHON = """#!/bin/bash
# Makes virtual environments in no time: of a python that has everything, and a pip that has nothing to do.
case "$*" in
    *"import ensurepip"*) ;;
    *"-m venv "*)
        mkdir -p "${@: -1}/bin" && touch "${@: -1}/pyvenv.cfg"
        for name in python llm-jax; do cp "$0" "${@: -1}/bin/$name"; done
        ;;
    *"-m pip "* | --version) ;;
    *) exec "$FAKE_PYTHON" "$@" ;;
esac
"""


class Cloud:
    """The state of it, and what happens to it without being asked for."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def build(self, python: str) -> None:
        """python: what the hosts have"""
        programs = {
            "bin/gcloud": f'#!/bin/sh\nexec {shlex.quote(python)} -I {shlex.quote(os.path.abspath(__file__))} "$@"\n',
            "host/hostname": '#!/bin/sh\necho "$FAKE_HOST"\n',
            "host/python3.12": PYTHON,
        }
        for name, text in programs.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        (self.folder / "python").write_text(python)

    @contextlib.contextmanager
    def alone(self):
        with open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def calls(self) -> list[list[str]]:
        """What gcloud was called with, after `gcloud compute tpus`."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """The same, only the verbs, and only those that change what there is."""
        return [call[1] for call in self.calls() if call[1] in ("create", "delete")]

    def fail(self, verb: str, *errors: str) -> None:
        """Lets the next calls of the verb do nothing but say so: "CODE TEXT"; "" for one that works, "late CODE TEXT"
        for one that does what it should, too."""
        with self.alone(), open(self.folder / f"{verb}.errors", "a") as file:
            file.writelines(error.replace("\n", " ") + "\n" for error in errors)

    def next_error(self, verb: str) -> str:
        path = self.folder / f"{verb}.errors"
        with self.alone():
            errors = path.read_text().splitlines() if path.exists() else []
            path.write_text("".join(f"{error}\n" for error in errors[1:]))
        return errors[0] if errors else ""

    def resource(self, name: str) -> dict | None:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def save(self, name: str, resource: dict) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(resource))

    def set(self, name: str, **changes) -> None:
        """state, message, or capacity=False for it never to come"""
        with self.alone():
            self.save(name, {**(self.resource(name) or {"nodes": []}), **changes})

    def nodes(self, name: str) -> list[str]:
        return (self.resource(name) or {"nodes": []})["nodes"]

    def homes(self, node: str) -> list[pathlib.Path]:
        """Of its hosts, by number."""
        return sorted((self.folder / "nodes" / node).iterdir(), key=lambda home: int(home.name))

    def reboot(self, home: pathlib.Path) -> None:
        """Everything that runs on the host is killed; its disk stays."""
        wanted = f"\0HOME={home}\0".encode()
        while True:
            found = []
            for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):
                    if wanted in b"\0" + path.read_bytes() and "State:\tZ" not in (path.parent / "status").read_text():
                        found.append(int(path.parent.name))
            if not found:
                return
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)

    def wipe(self, name: str) -> None:
        for node in self.nodes(name):
            for home in self.homes(node):
                self.reboot(home)
            shutil.rmtree(self.folder / "nodes" / node)

    def preempt(self, name: str, state: str = "SUSPENDED") -> None:
        """Hosts and disks are gone."""
        with self.alone():
            self.wipe(name)
            self.save(name, {**self.resource(name), "state": state, "nodes": []})

    def end(self) -> None:
        for home in self.folder.glob("nodes/*/*"):
            self.reboot(home)


def fail(verb: str, text: str, code: int = 1) -> typing.NoReturn:
    print(f"ERROR: (gcloud.compute.tpus.{verb}) {text}", file=sys.stderr)
    sys.exit(code)


def parse(group: str, verb: str, words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project")
    parser.add_argument("--quiet", action="store_true")
    if verb == "create":
        parser.add_argument("--accelerator-type", required=True)
        parser.add_argument("--runtime-version", required=True)
        nodes = parser.add_mutually_exclusive_group(required=True)
        nodes.add_argument("--node-id")
        nodes.add_argument("--node-count", type=int)
        for flag in ("node-prefix", "valid-until-duration", "network", "subnetwork", "service-account"):
            parser.add_argument(f"--{flag}")
        for flag in ("spot", "reserved", "internal-ips"):
            parser.add_argument(f"--{flag}", action="store_true")
    elif verb == "delete":
        parser.add_argument("--force", action="store_true")
    elif verb == "describe":
        parser.add_argument("--format")
    else:
        parser.add_argument("--worker", default="0")
        parser.add_argument("--internal-ip", action="store_true")
        parser.add_argument(f"--{verb}-flag", action="append")
        if verb == "ssh":
            parser.add_argument("--command")
        else:
            parser.add_argument("--recurse", action="store_true")
    flags, unknown = parser.parse_known_args(words)
    if unknown:
        fail(f"{group}.{verb}", f"unrecognized arguments: {' '.join(unknown)}", 2)
    return flags


def create(cloud: Cloud, verb: str, flags: argparse.Namespace) -> None:
    (name,) = flags.names
    path = f"{PROJECT}/locations/{flags.zone}/queuedResources/{name}"
    if cloud.resource(name):
        fail(verb, f"ALREADY_EXISTS: Resource '{path}' already exists")
    if flags.accelerator_type not in HOSTS:
        fail(verb, f"INVALID_ARGUMENT: Invalid accelerator type {flags.accelerator_type}")
    if flags.node_count == 1:
        fail(verb, "Invalid value for [--node-count]: Node count must be greater than 1")
    nodes = [flags.node_id] if flags.node_id else [f"{flags.node_prefix or name}-{i}" for i in range(flags.node_count)]
    capacity = not (cloud.folder / "no_capacity").exists()
    cloud.save(name, {"state": COMES[0], "type": flags.accelerator_type, "wanted": nodes, "nodes": [],
                      "capacity": capacity, "flags": vars(flags)})  # fmt: skip
    print(f"Create request issued for: [{name}]", file=sys.stderr)


def describe(cloud: Cloud, verb: str, flags: argparse.Namespace) -> None:
    (name,) = flags.names
    resource = cloud.resource(name)
    if not resource:
        path = f"{PROJECT}/locations/{flags.zone}/queuedResources/{name}"
        fail(verb, f"NOT_FOUND: Resource '{path}' was not found. This command is authenticated as me@example.com")
    assert flags.format == 'value[separator="|"](state.state,state.failedData.error.message)', flags.format
    print(f"{resource['state']}|{resource.get('message', '')}")
    if resource["state"] == "DELETING":
        (cloud.folder / f"{name}.json").unlink()
    elif resource["state"] in COMES[:-1] and (resource["capacity"] or resource["state"] == COMES[0]):
        resource["state"] = COMES[COMES.index(resource["state"]) + 1]
        if resource["state"] == "ACTIVE":
            resource["nodes"] = resource["wanted"]
            for node in resource["nodes"]:
                for worker in range(HOSTS[resource["type"]]):
                    (cloud.folder / "nodes" / node / str(worker)).mkdir(parents=True)
        cloud.save(name, resource)


def delete(cloud: Cloud, verb: str, flags: argparse.Namespace) -> None:
    (name,) = flags.names
    resource = cloud.resource(name)
    if not resource:
        fail(verb, f"NOT_FOUND: Resource '{PROJECT}/locations/{flags.zone}/queuedResources/{name}' was not found")
    if not flags.force and resource["state"] not in ("ACCEPTED", "FAILED", "SUSPENDED"):
        fail(verb, "FAILED_PRECONDITION: the queued resource has nodes; use --force")
    cloud.wipe(name)
    cloud.save(name, {**resource, "state": "DELETING", "nodes": []})


def homes(cloud: Cloud, verb: str, flags: argparse.Namespace, node: str) -> list[pathlib.Path]:
    if not (cloud.folder / "nodes" / node).exists():
        fail(verb, f"NOT_FOUND: Resource '{PROJECT}/locations/{flags.zone}/nodes/{node}' was not found.")
    found = cloud.homes(node)
    return found if flags.worker == "all" else [found[int(flags.worker)]]


def ssh(cloud: Cloud, verb: str, flags: argparse.Namespace) -> None:
    (node,) = flags.names
    found = homes(cloud, verb, flags, node)
    print(f"Using ssh batch size of 1. Attempting to SSH into 1 nodes with a total of {len(found)} workers.",
          file=sys.stderr)  # fmt: skip
    running = []
    for home in found:
        print(f"SSH: Attempting to connect to worker {home.name}...", file=sys.stderr)
        environment = {
            "HOME": str(home),
            "PATH": f"{cloud.folder}/host:/usr/local/bin:/usr/bin:/bin",
            "USER": "me",
            "FAKE_HOST": f"t1v-n-{node}-w-{home.name}",
            "FAKE_PYTHON": (cloud.folder / "python").read_text(),
            "TMUX_TMPDIR": str(home),
            "LLM_JAX_DEVICES": f"{home}/dev",
            "LLM_JAX_TPU_LOCK": f"{home}/libtpu_lockfile",
        }
        words = flags.command.split(" ")  # as gcloud does; ssh puts them together again
        running.append(subprocess.Popen(["bash", "-c", " ".join(words)], cwd=home, env=environment))
    codes = [process.wait() for process in running]
    sys.exit(next((code for code in codes if code), 0))


def scp(cloud: Cloud, verb: str, flags: argparse.Namespace) -> None:
    *sources, target = flags.names
    node, _, folder = target.partition(":")
    for home in homes(cloud, verb, flags, node):
        for source in map(pathlib.Path, sources):
            if source.is_dir() and not flags.recurse:
                fail(verb, f"scp: {source}: not a regular file")
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, home / folder / source.name, **({"dirs_exist_ok": True} if source.is_dir() else {}))


def main() -> None:
    if sys.argv[1] == "build":
        Cloud(pathlib.Path(sys.argv[2]).absolute()).build(sys.executable)
        return
    cloud = Cloud(pathlib.Path(os.environ["FAKE_CLOUD"]))
    words = sys.argv[1:]
    assert words[:2] == ["compute", "tpus"], words
    group, verb, *rest = words[2:]
    with cloud.alone(), open(cloud.folder / "calls.jsonl", "a") as file:
        file.write(json.dumps(words[2:]) + "\n")
    flags = parse(group, verb, rest)
    error = cloud.next_error(verb)
    late = error.startswith("late ")
    code, _, text = error.removeprefix("late ").partition(" ")
    if error and not late:
        fail(f"{group}.{verb}", text, int(code))
    do = {
        ("queued-resources", "create"): create,
        ("queued-resources", "describe"): describe,
        ("queued-resources", "delete"): delete,
        ("tpu-vm", "ssh"): ssh,
        ("tpu-vm", "scp"): scp,
    }[group, verb]
    with cloud.alone() if group == "queued-resources" else contextlib.nullcontext():
        do(cloud, f"{group}.{verb}", flags)
    if late:
        fail(f"{group}.{verb}", text, int(code))


if __name__ == "__main__":
    main()
