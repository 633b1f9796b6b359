"""fio, where it is installed, as a second limit of storage reads."""

import json
import os
import shutil
import subprocess

from dualkv.bench.measure import Run
from dualkv.errors import Error

_TIMEOUT_S = 300


def require_fio() -> str:
    """Its version, like ``fio-3.28``. Raises Error, ``unsupported``."""
    if shutil.which("fio") is None:
        raise Error("--fio: no program fio; install it, or leave the option out", "unsupported")
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, timeout=30).stdout.strip()


def read_file(path: str | os.PathLike[str], *, block_bytes: int, total: int, depth: int, direct: bool) -> Run:
    """Reads every block of the file once, in random order, with io_uring; fio's own time and CPU seconds.

    fio tells them in milliseconds and percent. Raises Error, ``io``, with what fio said.
    """
    command = [
        *("fio", "--name=dualkv", f"--filename={os.fspath(path)}", "--readonly", "--rw=randread"),
        *("--ioengine=io_uring", f"--iodepth={depth}", f"--bs={block_bytes}", f"--size={total}"),
        *(f"--direct={int(direct)}", "--invalidate=0", "--output-format=json"),
    ]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise Error(f"fio: did not end within {_TIMEOUT_S} s; killed", "timeout") from error
    if ran.returncode != 0:
        raise Error(f"fio: ended with {ran.returncode}: {(ran.stderr or ran.stdout).strip()[-300:]}", "io")
    job = json.loads(ran.stdout[ran.stdout.index("{") :])["jobs"][0]
    seconds = max(job["read"]["runtime"], 1) / 1e3
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return Run(seconds, job["read"]["io_bytes"], cpu_s)
