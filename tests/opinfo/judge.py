"""Takes the verdict on one case, and finds by execution what is true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from cudagraph_backend.padding.prove import Verdict
from cudagraph_backend.padding.symbolic import ROWS, Sizes
from tests.opinfo.cases import NO_SAMPLE, Dims, Sample, trace
from tests.support.oracle import Fill, Region, equal_runs, outputs_of, refutation

FILLS: tuple[Fill, ...] = ("replica", "zero", "poison", "extreme")
TOLERANCE = 1e-4

#: Why a case can't be judged, if it can't.
Kind = Literal[
    "judged",
    "no samples",
    "no dynamic dim",
    "size is fixed",
    "not traceable",
    "random",
    "no larger size",
    "does not run",
    "crashed",
]


@dataclass(slots=True)
class Outcome:
    """What was said of a case, and what is true.

    Attributes:
        op, sample, dims: the case; ``dims`` as ``0.1`` for dim 1 of tensor 0.
        kind: whether the case could be judged; with any kind but "judged", the rest may be missing.
        detail: the error that prevented judging.
        refusal, operator: why padding was refused, and at which ATen operator; None if judged safe.
        needs_replica: whether the verdict assumes that padded rows of inputs are replicas of the last row.
        zero_safe, needs_zero: the same for a verdict on padding with zeros.
        masked: whether a refused case is judged safe with masks put into its graph.
        masked_truth: how a real row changed in spite of them, or None.
        has_rows: whether the sizes of all results are fixed or multiples of the rows (not, say, one less).
        truth: for each fill that was tried, how a real row changed, or None if none did.
    """

    op: str
    sample: int
    dims: str
    kind: Kind = "not traceable"
    detail: str = ""
    refusal: str | None = None
    operator: str | None = None
    needs_replica: bool = False
    zero_safe: bool = False
    needs_zero: bool = False
    masked: bool = False
    masked_truth: str | None = None
    has_rows: bool = True
    truth: dict[str, str | None] = field(default_factory=dict)

    @property
    def safe(self) -> bool:
        """Judged safe."""
        return self.kind in ("judged", "random", "crashed") and self.refusal is None

    @property
    def truly_safe(self) -> bool:
        """Execution found no way in which a padded row changes a real one."""
        return self.kind == "judged" and all(self.truth.get(fill, "not tried") is None for fill in FILLS)

    def safe_under(self, fill: Fill) -> bool:
        """The same, of one fill."""
        return self.kind == "judged" and self.truth.get(fill, "not tried") is None

    @property
    def wrong(self) -> str | None:
        """How execution refutes a verdict "safe"; None if it doesn't."""
        promised: set[Fill] = set()
        if self.safe:
            promised |= {"replica"} if self.needs_replica else set(FILLS)
        if self.zero_safe:
            promised |= {"zero"} if self.needs_zero else set(FILLS)
        if self.masked_truth is not None:
            return f"masked: {self.masked_truth}"
        return next(
            (f"{fill}: {self.truth[fill]}" for fill in FILLS if fill in promised and self.truth.get(fill)), None
        )


def judge(op: str, sample: Sample, dims: Dims, report: Callable[[Outcome], object] = lambda outcome: None) -> Outcome:
    """The outcome of one case. ``report`` gets it whenever more is known, in case the next step ends the process."""
    outcome = Outcome(op, sample.number, " ".join(f"{arg}.{dim}" for arg, dim in dims))
    report(outcome)
    if not dims:
        outcome.kind = "no samples" if sample is NO_SAMPLE else "no dynamic dim"
        return outcome
    try:
        region = trace(sample, dims)
    except Exception as error:  # whatever an operator may raise on fake tensors
        outcome.detail = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return outcome
    outcome.kind = _kind(region)
    if outcome.kind not in ("judged", "random"):
        return outcome
    verdict = _take_verdicts(region, outcome)
    outcome.has_rows = _has_rows(region)
    buckets = region.buckets(*verdict.symbols)[:2]
    for fill in FILLS:
        outcome.truth[fill] = "ended the process"
        report(outcome)
        outcome.truth[fill] = _truth(region, verdict, buckets, fill)
    masked = region.prove(masked=True)
    if outcome.refusal is not None and masked.refusal is None:
        outcome.masked, outcome.masked_truth = True, "ended the process"
        report(outcome)
        outcome.masked_truth = _truth(region, masked, buckets, "replica")
    return outcome


def _kind(region: Region) -> Kind:
    symbols = region.symbols()
    if not symbols:
        return "size is fixed"
    if not _runs(region):
        return "does not run"
    if not region.buckets(*symbols):
        return "no larger size"
    return "random" if _draws(region) else "judged"


def _runs(region: Region) -> bool:
    try:
        return region.runs()
    except Exception:  # NotImplementedError, AssertionError, ...
        return False


def _draws(region: Region) -> bool:
    """Whether results depend on the random seed; a tag alone is no sign (attention without dropout has it, too)."""
    tags = (tag for node in region.module.graph.nodes for tag in getattr(node.target, "tags", ()))
    return torch.Tag.nondeterministic_seeded in tags and not equal_runs(region, seeds=(0, 1))


def _take_verdicts(region: Region, outcome: Outcome) -> Verdict:
    verdict, with_zeros = region.prove(fill="replica"), region.prove(fill="zero")
    if verdict.refusal is not None:
        outcome.refusal, outcome.operator = verdict.refusal.reason, verdict.refusal.op
    outcome.needs_replica = verdict.needs_fill
    outcome.zero_safe, outcome.needs_zero = with_zeros.refusal is None, with_zeros.needs_fill
    return verdict


def _has_rows(region: Region) -> bool:
    sizes = Sizes(region.symbols())
    shapes = [sizes.shape(meta) for meta in outputs_of(region.module) if isinstance(meta, torch.Tensor)]
    return all((size / ROWS).is_integer or not size.has(ROWS) for shape in shapes for size in shape)


def _truth(region: Region, verdict: Verdict, buckets: list[int], fill: Fill) -> str | None:
    for bucket in buckets:
        try:
            problem = refutation(region, verdict, bucket, fill, TOLERANCE)
        except (
            Exception
        ) as error:  # an index out of range, a matrix that has no inverse, a shape that data decides, ...
            problem = f"{type(error).__name__}: {error}"
        if problem:
            return " ".join(problem.split())[:200]
    return None
