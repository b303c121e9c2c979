"""What is compared runs in processes of their own, which take turns: one works while the others wait at a pipe.

Each side has its own threads, memory and environment, and a change in the load of the machine meets all of them alike.
Only the standard library: the other side may be a Python without llm_jax.
"""

import json
import os
import subprocess
import sys
import traceback


class Failed(RuntimeError):
    """The other side could not do what it was asked; its output has said why."""


class Peer:
    """A process that runs serve(); peer.call("name", ...) is its object.name(...), by way of JSON."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(self, name: str, *arguments):
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise Failed(f"{name}: the process ended with {self._process.wait()}")
        if "error" in (reply := json.loads(reply)):
            raise Failed(f"{name}: {reply['error']}")
        return reply["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve(target: object) -> None:
    """Answers the calls of a Peer until it closes the pipe. What is printed goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            reply = {"result": getattr(target, name)(*arguments)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(reply), file=replies, flush=True)
