"""ib_write_bw of perftest, as the limit of RDMA writes: the same message size, count and queue pairs."""

import contextlib
import re
import shutil
import socket
import subprocess
import time

from dualkv.bench.measure import Run
from dualkv.errors import Error

_START_S = 10.0
_RUN_S = 120.0
_RESULT = re.compile(r"^\s*\d+\s+\d+\s+[\d.]+\s+([\d.]+)\s+[\d.]+\s*$", re.MULTILINE)


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class WriteBandwidth:
    """Runs it between two devices of this machine. Raises Error ``not_found`` where it is not installed."""

    def __init__(self, devices: tuple[str, str], block_bytes: int, count: int, queue_pairs: int) -> None:
        if shutil.which("ib_write_bw") is None:
            raise Error("ib_write_bw is not installed (Debian: perftest)", "not_found")
        self._devices = devices
        self._command = ["ib_write_bw", "-F", "--report_gbits", "-s", str(block_bytes), "-q", str(queue_pairs)]
        self._command += ["-n", str(max(5, count // queue_pairs))]
        self._bytes = block_bytes * count

    def run(self) -> Run:
        """One transfer: seconds by its own account of the average rate, its set-up not counted. Blocks."""
        port = _free_port()
        command = [*self._command, "-p", str(port)]
        server = subprocess.Popen(
            [*command, "-d", self._devices[1]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            until = time.monotonic() + _START_S
            while True:
                client = [*command, "-d", self._devices[0], "127.0.0.1"]
                done = subprocess.run(client, capture_output=True, text=True, timeout=_RUN_S)
                found = _RESULT.search(done.stdout)
                if found:
                    return Run(self._bytes / (float(found[1]) * 1e9 / 8), self._bytes, 0.0)
                if time.monotonic() > until:
                    raise Error(f"ib_write_bw: {(done.stderr or done.stdout).strip()[-300:]}", "io")
                time.sleep(0.2)  # the server does not listen yet
        finally:
            server.kill()
            server.wait()
