"""Tests with real inference engines. Each engine has an environment of its own, made by `make engine-<name>`."""

import json
import os
import pathlib
import subprocess
from collections.abc import Callable
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


@pytest.fixture
def run_program(tmp_path: pathlib.Path) -> Callable[..., Any]:
    """``run_program(engine, "name", arguments)``: runs programs/name.py in the engine's environment.

    Its argument is JSON on the command line; its result is the JSON it writes to the file named in ``$RESULT``.
    """

    def run(engine: str, name: str, arguments: Any = None, timeout_s: float = 240, **settings: str) -> Any:
        result = tmp_path / f"{name}-{os.urandom(4).hex()}.json"
        ended = subprocess.run(
            [python_of(engine), HERE / "programs" / f"{name}.py", json.dumps(arguments)],
            env={**environment(), "RESULT": str(result), **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if ended.returncode != 0 or not result.exists():
            raise ProgramFailedError(
                f"{name} in the environment of {engine} ended with {ended.returncode}:\n{ended.stdout[-6000:]}"
            )
        return json.loads(result.read_text(encoding="utf-8"))

    return run
