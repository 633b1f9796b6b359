"""Waiting for work in progress: blocking, through an eventfd, or with ``await``."""

import asyncio
import weakref
from collections.abc import Generator
from typing import Any

from dualkv import _dualkv


class Notifier(_dualkv.Notifier):
    """A queue of tokens behind one eventfd, for engines with an event loop of their own.

    ``fileno()`` is readable while tokens wait; ``drain()`` returns and removes them. Give it to ``notify()`` of any
    handle; one serves as many handles as you like.
    """


class _LoopWaiter:
    """One notifier and one eventfd for all that an asyncio loop waits for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._notifier = Notifier()
        self._futures: dict[int, asyncio.Future[None]] = {}
        self._last = 0
        loop.add_reader(self._notifier.fileno(), self._wake)

    def _wake(self) -> None:
        for token in self._notifier.drain():
            future = self._futures.pop(token, None)
            if future is not None and not future.done():
                future.set_result(None)

    async def wait(self, milestones: Any, milestone: int) -> None:
        if not milestones.ended(milestone):
            self._last += 1
            token = self._last
            future = asyncio.get_running_loop().create_future()
            self._futures[token] = future
            milestones.notify(milestone, self._notifier, token)
            try:
                await future
            finally:
                self._futures.pop(token, None)
        milestones.raise_if_failed(milestone)


_waiters: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWaiter]" = weakref.WeakKeyDictionary()


async def until(milestones: Any, milestone: int) -> None:
    """Waits for a milestone on the running loop; raises Error if it failed."""
    loop = asyncio.get_running_loop()
    waiter = _waiters.get(loop)
    if waiter is None:
        waiter = _waiters[loop] = _LoopWaiter(loop)
    await waiter.wait(milestones, milestone)


class Operation:
    """A handle on one asynchronous call: ``wait()``, ``await``, ``notify()`` or ``done``."""

    def __init__(self, core: Any, keep: Any = None) -> None:
        # The order matters: the core ends before the memory it borrows.
        self._core = core
        self._keep = keep
        self._milestones = core.milestones

    @property
    def done(self) -> bool:
        """Ended, well or not."""
        return bool(self._milestones.ended(0))

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks (without the GIL) until it is done.

        Raises:
            Error: why it failed; ``timeout`` if it is still in progress after ``timeout_s``.
        """
        self._milestones.wait(0, timeout_s)

    def notify(self, notifier: Notifier, token: int) -> None:
        """Puts ``token`` on the notifier once the call has ended."""
        self._milestones.notify(0, notifier, token)

    def __await__(self) -> Generator[Any, None, None]:
        return until(self._milestones, 0).__await__()
