"""Live progress on stderr."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bars:
    """A bar a stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, name: str, steps: int) -> Callable[[], None]:
        """Begins a stage of so many steps; the result is called after each."""
        task = self._progress.add_task(name, total=steps)
        return lambda: self._progress.advance(task)


@contextlib.contextmanager
def bars() -> Iterator[Bars]:
    """Shown until the end of the block."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bars(progress)
