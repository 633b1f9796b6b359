"""A process that holds memory and touches all of it again and again, so that the kernel has none to spare."""

import mmap
import threading

import numpy as np

from dualkv.bench.processes import answer_calls

_PAGE_BYTES = 4096
_PAUSE_S = 0.05


class Pressure:
    """Each method is a call of the benchmark."""

    def __init__(self) -> None:
        self._passes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, size_bytes: int) -> None:
        """Begins; returns when every page was touched once."""
        area = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages = np.frombuffer(area, np.uint8)[::_PAGE_BYTES]
        self._touch()
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    def passes(self) -> int:
        """How often every page was touched so far."""
        return self._passes

    def _touch(self) -> None:
        self._pages += 1
        self._passes += 1

    def _go_on(self) -> None:
        while not self._stop.wait(_PAUSE_S):
            self._touch()

    def close(self) -> None:
        """Lets go."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def main() -> None:
    """Answers the calls on standard input until it ends."""
    pressure = Pressure()
    try:
        answer_calls(pressure)
    finally:
        pressure.close()


if __name__ == "__main__":
    main()
