"""Payoff: whether a graph is worth replaying, measured when it is captured.

A graph saves launches, and costs copies of arguments. Where there is little to launch, the plain call is faster: a
quarter of the CUDA graphs in use are slower than what they were captured from (PyGraph, arXiv 2503.19779).
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from cudagraph_backend.drivers import Driver
from cudagraph_backend.errors import Refusal
from cudagraph_backend.runtime.plan import Sizes

SLOWER = Refusal("replaying a graph measured slower than the plain call")
_ROUNDS = 5
_MARGIN = 1.1  # by less than that a measurement may be wrong, and a graph takes the host's time from fewer calls


class Payoff:
    """Of one region's graphs.

    Where replay is clearly faster, it is launches that a plain call spends its time on. That is so at smaller sizes,
    too, as the same launches have less to do there: those are not measured, unless more is copied for their calls.
    """

    def __init__(self, driver: Driver):
        self._driver = driver
        self._faster: list[tuple[int, ...]] = []

    def refusal(
        self, sizes: Sizes, copied: int, plain: Callable[[], object], replay: Callable[[], object]
    ) -> Refusal | None:
        """Return why calls of a bucket had better run plain; ``None`` if replaying is not slower, or can't be measured.

        Both are run several times, in turn. ``copied`` are the bytes of arguments that a replay copies first.
        """
        work = (*sizes, copied)
        if any(all(a <= b for a, b in zip(work, more, strict=True)) for more in self._faster):
            return None
        rounds = [(self._driver.seconds(plain), self._driver.seconds(replay)) for _ in range(_ROUNDS)]
        of_plain, of_replay = (
            [seconds for seconds in column if seconds is not None] for column in zip(*rounds, strict=True)
        )
        if not of_plain or not of_replay:
            return None
        if median(of_replay) * _MARGIN < median(of_plain):
            self._faster.append(work)
        return SLOWER if median(of_replay) > median(of_plain) * _MARGIN else None
