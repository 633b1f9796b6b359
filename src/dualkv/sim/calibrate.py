"""Fits an engine's compute to what the paper published of its Oracle: ``python -m dualkv.sim.calibrate MODEL``.

Oracle's loads and transfers cost nothing, so its figures are those of compute, of the scheduler and of the workload.
JCT of Figure 7 and, where it was run, TTFT of Figure 10 are fitted; decode's times come from its TPOT
(docs/simulator.md).
Needs scipy.
"""

import argparse
import concurrent.futures
import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from dualkv.errors import Error
from dualkv.sim import paper
from dualkv.sim.capacity import run_at
from dualkv.sim.engines import MODELS, Compute
from dualkv.sim.run import Setup, simulate
from dualkv.sim.workload import Workload

FITTED = ("forward_s", "token_s", "context_s", "pair_s")
TTFT = {"ds660b": {0.1: 0.67, 0.45: 2.07}, "ds27b": {0.25: 0.37, 0.75: 0.70}}
"""Of Oracle, mean seconds by agents/s (Fig. 10)."""
_TTFT_WEIGHT = 2.0
_MOST_AGENTS = 2048  # larger cells take long and say the same


def errors(model: str, compute: Compute) -> list[float]:
    """Logarithms of ours over the paper's, weighted."""
    engine = dataclasses.replace(MODELS[model], compute=compute)

    def jct(where: paper.Where, published: float) -> float:
        load = Workload.generated(where.dataset, where.agents)
        return float(np.log(simulate(Setup(engine, load), "oracle").jct_s / published))

    def ttft(rate: float, published: float) -> float:
        outcome = run_at(Setup(engine, Workload.generated("64K", 1)), "oracle", rate, 3000.0)
        return _TTFT_WEIGHT * float(np.log(np.mean(outcome.ttft_s) / published))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(jct, where, row.oracle)
            for where, row in paper.OFFLINE.items()
            if where.model == model and where.agents <= _MOST_AGENTS and row.oracle is not None
        ]
        jobs += [pool.submit(ttft, rate, published) for rate, published in TTFT.get(model, {}).items()]
        return [job.result() for job in jobs]


def calibrate(model: str, evaluations: int) -> tuple[Compute, float]:
    """The fitted compute, and its root mean square error.

    Raises:
        Error: ``unsupported`` without scipy.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise Error("calibration needs scipy: pip install scipy", "unsupported") from error
    known = MODELS[model].compute
    names: Sequence[str] = FITTED if model in TTFT else (*FITTED, "step_s")  # decode was not measured online

    def at(logs: Sequence[float]) -> Compute:
        return dataclasses.replace(known, **{n: float(np.exp(v)) for n, v in zip(names, logs, strict=True)})

    def cost(logs: Sequence[float]) -> float:
        return float(np.sqrt(np.mean(np.square(errors(model, at(logs))))))

    start = np.log([getattr(known, name) for name in names])
    simplex = np.vstack([start, start + 0.25 * np.eye(len(names))])
    found = minimize(cost, start, method="Nelder-Mead", options={"maxfev": evaluations, "initial_simplex": simplex})
    return at(found.x), float(found.fun)


def main() -> None:
    """Prints what was found; constants of ``engines.py`` are changed by hand."""
    parser = argparse.ArgumentParser(prog="python -m dualkv.sim.calibrate", description=__doc__)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--evaluations", type=int, default=60, help="of all cells of the model")
    given = parser.parse_args()
    compute, error = calibrate(given.model, given.evaluations)
    print(f"{compute}\nroot mean square error {error:.1%}")


if __name__ == "__main__":
    main()
