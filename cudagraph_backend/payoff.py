"""Payoff: whether a graph is worth replaying, measured once per bucket, when it is captured.

A graph saves launches, and costs copies of arguments. Where there is little to launch, the plain call is faster: a
quarter of the CUDA graphs in use are slower than what they were captured from (PyGraph, arXiv 2503.19779).
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from cudagraph_backend.drivers import Driver
from cudagraph_backend.errors import Refusal

SLOWER = Refusal("replaying a graph measured slower than the plain call")
_ROUNDS = 5
_MARGIN = 1.1  # by less than that a measurement may be wrong, and a graph takes the host's time from fewer calls


def payoff_refusal(driver: Driver, plain: Callable[[], object], replay: Callable[[], object]) -> Refusal | None:
    """Why calls had better run plain; ``None`` if replaying is not slower, or can't be measured.

    Both are run several times, in turn.
    """
    rounds = [(driver.seconds(plain), driver.seconds(replay)) for _ in range(_ROUNDS)]
    if any(seconds is None for pair in rounds for seconds in pair):
        return None
    of_plain, of_replay = (median(seconds) for seconds in zip(*rounds, strict=True))  # type: ignore[type-var]
    return SLOWER if of_replay > of_plain * _MARGIN else None  # type: ignore[operator]
