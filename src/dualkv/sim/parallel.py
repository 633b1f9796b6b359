"""Many simulations at once: each releases the GIL while it runs."""

import concurrent.futures
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

Stage = Callable[[str, int], Callable[[], None]]
"""Begins a stage of so many steps; what it returns is called after each."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def run_all(stage: Stage, name: str, jobs: Mapping[_Key, Callable[[], _Value]]) -> dict[_Key, _Value]:
    """Results by key, on all cores; jobs begin in order. What one raises ends the others that have not begun."""
    step = stage(name, len(jobs))
    out: dict[_Key, _Value] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        pending = {pool.submit(job): key for key, job in jobs.items()}
        try:
            for done in concurrent.futures.as_completed(pending):
                out[pending[done]] = done.result()
                step()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return out
