"""Runs programs of this folder, each in a fork of this process, which has imported what takes seconds to import.

Arguments: modules, or module:name for what a module imports when it is asked for it. On standard input a line of JSON a
run: {"program": path, "argument": text, "environment": {...}, "output": path}; answered by a line with its exit status.
"""

import importlib
import json
import os
import runpy
import sys
from typing import Any


def become(asked: dict[str, Any]) -> None:
    output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, stream in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, stream)
    os.environ.update(asked["environment"])
    sys.argv = [asked["program"], asked["argument"]]


def next_program() -> str | None:
    """The program that this process, a fork, is to run; None in the first process, when no more are asked for."""
    while line := sys.stdin.readline():
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(asked)
            return str(asked["program"])
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        module, _, name = wanted.partition(":")
        imported = importlib.import_module(module)
        if name:
            getattr(imported, name)
    if program := next_program():
        runpy.run_path(program, run_name="__main__")
