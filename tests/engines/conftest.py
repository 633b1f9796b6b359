"""Tests with real inference engines. Each engine has an environment of its own, made by `make engine-<name>`."""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

HERE = pathlib.Path(__file__).parent
ENVIRONMENTS = pathlib.Path(os.environ.get("DUALKV_ENGINES", HERE.parent.parent / ".engines"))

# No network, no telemetry, and the two cores of a small machine shared by whatever runs.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def python_of(engine: str) -> pathlib.Path:
    """The interpreter of an engine's environment; skips the test where there is none."""
    python = ENVIRONMENTS / engine / "bin" / "python"
    if not (ENVIRONMENTS / engine / "done").exists():
        pytest.skip(f"no environment of {engine}: run `make engine-{engine}`")
    return python


def environment() -> dict[str, str]:
    """Of the processes of engines: these programs are importable, nothing of the tests' own environment is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    path = [str(HERE / "programs"), *filter(None, [os.environ.get("DUALKV_ENGINE_PATH")])]
    return {**kept, **SETTINGS, "PYTHONPATH": os.pathsep.join(path)}


class ProgramFailedError(AssertionError):
    """A program ended badly; the message holds the end of its output."""


class Forks:
    """Programs of one engine, each in a process of its own that need not import the engine first."""

    def __init__(self, engine: str, imports: list[str]) -> None:
        self._process = subprocess.Popen(
            [python_of(engine), HERE / "programs" / "forks.py", *imports],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, program: pathlib.Path, argument: str, settings: dict[str, str], timeout_s: float) -> tuple[int, str]:
        """Exit status and output."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        output = pathlib.Path(settings["RESULT"]).with_suffix(".log")
        asked = {"program": str(program), "argument": argument, "environment": settings, "output": str(output)}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        readable, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not readable:
            self.kill()
            raise ProgramFailedError(f"{program.name} did not end in {timeout_s} s:\n{output.read_text()[-6000:]}")
        return int(self._process.stdout.readline() or 1), output.read_text()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """With all that its programs have left running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


# What takes seconds to import, of engines with many programs: the same few seconds for each of them.
IMPORTS = {"vllm": ["vllm:LLM", "vllm:SamplingParams", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"]}


@pytest.fixture(scope="session")
def forks() -> Iterator[dict[str, Forks]]:
    """By engine, made when first needed."""
    made: dict[str, Forks] = {}
    yield made
    for each in made.values():
        each.kill()


@pytest.fixture
def run_program(tmp_path: pathlib.Path, forks: dict[str, Forks]) -> Callable[..., Any]:
    """``run_program(engine, "name", arguments)``: runs programs/name.py in the engine's environment.

    Its argument is JSON on the command line; its result is the JSON it writes to the file named in ``$RESULT``.
    """

    def run(engine: str, name: str, arguments: Any = None, timeout_s: float = 240, **settings: str) -> Any:
        result = tmp_path / f"{name}-{os.urandom(4).hex()}.json"
        if engine not in forks or forks[engine].ended:
            forks[engine] = Forks(engine, IMPORTS.get(engine, []))
        status, output = forks[engine].run(
            HERE / "programs" / f"{name}.py", json.dumps(arguments), {"RESULT": str(result), **settings}, timeout_s
        )
        if status != 0 or not result.exists():
            raise ProgramFailedError(f"{name} in the environment of {engine} ended with {status}:\n{output[-6000:]}")
        return json.loads(result.read_text(encoding="utf-8"))

    return run
