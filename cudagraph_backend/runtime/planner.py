"""Planning: sizes of a call -> plan -> bucket."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace

import sympy

from cudagraph_backend.errors import Refusal
from cudagraph_backend.fill import Fill
from cudagraph_backend.memory.strides import extent, overlaps_itself
from cudagraph_backend.options import Options
from cudagraph_backend.region import DynamicDim, Region, TensorInput, Values, evaluate
from cudagraph_backend.runtime import buckets
from cudagraph_backend.runtime.compacting import may_be_strided
from cudagraph_backend.runtime.limits import TOO_MANY_GRAPHS
from cudagraph_backend.runtime.plan import Bucket, Plan, Sizes
from cudagraph_backend.runtime.readings import Reading, shape_at
from cudagraph_backend.runtime.served import Served

_PROBES_PER_SIZE = 3  # that couldn't tell; some inputs never do (token types are mostly zeros), and each one costs runs
_MORE_BYTES_PER_DIM = 1 / 8  # of inputs, in a bucket that serves sizes whose own bucket does not exist
_PROVIDED_AT_ONCE = 1 << 28  # bytes of one input; beyond 256 MiB a bound is no reason to take memory in advance


class ChosenSizes:
    """The bucket that the forward of a frame has chosen for each combination of sizes: its backward follows.

    What is saved in a bucket can be read where it lies by a graph of the same bucket.
    """

    def __init__(self) -> None:
        self._chosen: dict[frozenset[tuple[sympy.Symbol, int]], Values] = {}

    def note(self, real: Values, bucket: Values) -> None:
        self._chosen[frozenset(real.items())] = bucket

    def at(self, real: Values) -> Values:
        """Return the forward's bucket at these sizes (the buckets of its parts), as far as both have the same symbols.

        What is noted is gone through, but for a few thousand combinations that takes less than to plan.
        """
        known = list(self._chosen.items())  # at once, as other threads may note
        found = (bucket for key, bucket in known if all(real.get(s, n) == n for s, n in key))
        return {symbol: size for bucket in found for symbol, size in bucket.items()}

    def clear(self) -> None:
        self._chosen.clear()


class Planner:
    """The plans and buckets of one region.

    ``chosen`` are the sizes that its frame's forward has chosen. ``dims`` are the region's, those refused that failed
    the probe. ``probed`` has the buckets in which a dim passed, and ``postponed`` why the probe couldn't tell at a
    call, once per such call. ``served`` counts calls by their sizes and buckets, also where plans are made anew.
    ``has_room`` tells whether one more graph may be held, ``poisons`` whether padded rows hold NaN where they must not
    be read.
    """

    def __init__(
        self,
        region: Region,
        options: Options,
        chosen: ChosenSizes,
        has_room: Callable[[], bool],
        poisons: Callable[[], bool],
    ):
        self.region = region
        self._chosen = chosen
        self.dims = region.dims
        self.probed: dict[str, set[int]] = {}
        self.postponed: dict[Sizes, list[str]] = {}
        self.buckets: dict[Sizes, Bucket] = {}
        self.served: dict[Hashable, Served] = {}
        self._plans: dict[Sizes, Plan | Refusal] = {}
        self._options = options
        self._has_room = has_room
        self._poisons = poisons

    def plan(self, sizes: Sizes) -> Plan | Refusal:
        """Return the plan for a call's sizes, or why such calls run the compiled region."""
        plan = self._plans.get(sizes)
        if plan is None:
            plan = self.plan_without((), sizes)
            if plan is not TOO_MANY_GRAPHS:  # not remembered, as others may make room
                self._plans[sizes] = plan
        return plan

    def refuse(self, sizes: Sizes, refusal: Refusal) -> None:
        """Let calls of these sizes run the compiled region from now on."""
        self._plans[sizes] = refusal

    def refuse_bucket(self, bucket: Bucket, refusal: Refusal) -> None:
        """Let calls of all sizes that the bucket serves run the compiled region from now on."""
        bucket.refusal = refusal
        for sizes, plan in self._plans.items():
            if isinstance(plan, Plan) and plan.bucket is bucket:
                self._plans[sizes] = refusal

    def pass_probe(self, plan: Plan) -> None:
        """Let the plan answer calls from now on."""
        values = self.region.values(plan.bucket.sizes)
        for dim in plan.to_probe:
            self.probed.setdefault(dim.name, set()).add(values[next(iter(dim.symbols))])
        plan.to_probe = ()

    def postpone_probe(self, plan: Plan, reason: str) -> Plan | Refusal:
        """Return the plan to answer a call with that the probe can't tell about: dims without a proof aren't padded.

        Its sizes keep that plan if this goes on.
        """
        unproven = [dim for dim in plan.to_probe if dim.to_probe is not None]
        instead = self.plan_without(unproven, plan.sizes)
        if isinstance(instead, Plan):
            instead.to_probe = ()
        reasons = self.postponed.setdefault(plan.sizes, [])
        reasons.append(reason)
        if len(reasons) == _PROBES_PER_SIZE:
            self._plans[plan.sizes] = instead
        return instead

    def refuse_dims(self, dims: Collection[DynamicDim], refusal: Refusal) -> None:
        """Let ``dims`` not be padded from now on; nothing that was planned with them is used again."""
        self.dims = tuple(replace(dim, refusal=refusal) if dim in dims else dim for dim in self.dims)
        self._plans.clear()
        self.postponed.clear()
        self.buckets.clear()

    def largest(self, values: Values) -> Values:
        """Return the sizes to provide memory for: those of the largest bucket, as far as it is known."""
        largest = dict(values)
        for dim in self._padded_dims():
            size = buckets.largest(self._options.capture_sizes, dim.upper, max(values[s] for s in dim.symbols))
            largest.update(dict.fromkeys(dim.symbols, size))
        return largest

    def _padded_dims(self) -> list[DynamicDim]:
        return [dim for dim in self.dims if dim.refusal is None]

    def plan_without(self, dims: Collection[DynamicDim], sizes: Sizes) -> Plan | Refusal:
        """Return a new plan for a call's sizes, with ``dims`` at their exact sizes."""
        padded = [dim for dim in self._padded_dims() if dim not in dims]
        own = self._own_bucket(sizes, padded)
        if isinstance(own, Refusal):
            return own
        values = self.region.values(sizes)
        if any(t.mutated and overlaps_itself(*shape_at(t, values)) for t in self.region.staged):
            return Refusal("an input that is written in place overlaps itself in memory")
        chosen = self._existing(values, own, padded) or own
        if chosen not in self.buckets and not self._has_room():
            return TOO_MANY_GRAPHS
        bucket = self.buckets.setdefault(chosen, Bucket(chosen))
        if bucket.refusal is not None:
            return bucket.refusal
        if self.region.kind == "forward":
            self._chosen.note(values, self.region.values(chosen))
        return self._plan(sizes, bucket, takes_existing=chosen != own)

    def plan_without_graph(self, sizes: Sizes) -> Plan | None:
        """Return a plan to run the bucket of a call's sizes as compiled code; ``None`` where nothing is padded."""
        own = self._own_bucket(sizes, self._padded_dims())
        return None if isinstance(own, Refusal) or own == sizes else self._plan(sizes, Bucket(own))

    def _plan(self, sizes: Sizes, bucket: Bucket, *, takes_existing: bool = False) -> Plan:
        values, padded = self.region.values(sizes), self.region.values(bucket.sizes)
        return Plan(
            sizes,
            bucket,
            readings=tuple(self._reading(tensor, values, padded) for tensor in self.region.staged),
            served=self._served(sizes, bucket.sizes, takes_existing),
            counts=tuple(count.make(values, self.region.device) for count in self.region.counts),
            to_probe=tuple(self._dims_to_probe(values, padded)),
        )

    def _served(self, sizes: Sizes, bucket: Sizes, takes_existing: bool) -> Served:
        """Return what counts such calls: the same for every plan made for them, as long as the same dims are padded."""
        values, padded = self.region.values(sizes), self.region.values(bucket)
        rows = {dim.name: next(iter(dim.symbols)) for dim in self._padded_dims()}
        by_dim = {name: (values[symbol], padded[symbol] - values[symbol]) for name, symbol in rows.items()}
        return self.served.setdefault((sizes, bucket, takes_existing, *rows), Served(by_dim, takes_existing))

    def _dims_to_probe(self, values: Values, padded: Values) -> list[DynamicDim]:
        if self.region.effect is not None:
            return []
        verifies = self._options.verify == "capture"
        dims = [d for d in self._padded_dims() if verifies or d.to_probe is not None]
        return [d for d in dims if any(values[s] != padded[s] for s in d.symbols)]

    def _own_bucket(self, sizes: Sizes, dims: Sequence[DynamicDim]) -> Sizes | Refusal:
        """Return the capture sizes closest to ``sizes``: padded for ``dims``, where they may be; exact elsewhere.

        Of a region that communicates each dim's depends on that dim alone: all processes must come to the same.
        """
        values = dict(self.region.values(sizes))
        followed = self._followed(values)
        multiplied = 1 if self.region.effect is not None else len(dims)
        for dim in dims:
            found = {values[s] for s in dim.symbols}
            # The proof holds for dims of equal size. Rows of an input that share memory can't be padded apart.
            if len(found) > 1 or self._overlaps(dim, values):
                continue
            n = found.pop()
            if n == 0:  # there is no last row to repeat
                continue
            admits = self._admits(dim, values)
            of_forward = {followed.get(s, 0) for s in dim.symbols}
            if len(of_forward) == 1 and max(of_forward) > n and admits(max(of_forward)):
                values.update(dict.fromkeys(dim.symbols, max(of_forward)))
                continue
            size = buckets.choose(n, self._options.capture_sizes, dim.upper, admits, multiplied)
            if size is None:
                return Refusal(f"dim {dim.name} is larger than the largest of capture_sizes")
            values.update(dict.fromkeys(dim.symbols, size))
        kept = self._kept_equal(self.region.values(sizes), values, dims)
        return tuple(evaluate(s.size, kept) for s in self.region.sizes)

    def _followed(self, real: Values) -> Values:
        """Return the bucket of the forward, which a backward follows, unless other processes have another one."""
        return self._chosen.at(real) if self.region.kind == "backward" and self.region.effect is None else {}

    def allowance(self, dims: Sequence[DynamicDim] | None = None) -> float | None:
        """Return how many more bytes, as a share, a call's inputs may have in a bucket that exists than in its own.

        ``None`` where calls get no bucket but their own: where the user has chosen the sizes, and where the region
        communicates, as other processes may have other buckets. ``dims`` are those padded; all that may be, if not
        given.
        """
        count = len(self._padded_dims() if dims is None else dims)
        if count < 2 or self._options.capture_sizes != "auto" or self.region.effect is not None:
            return None
        return count * _MORE_BYTES_PER_DIM

    def _existing(self, real: Values, own: Sizes, dims: Sequence[DynamicDim]) -> Sizes | None:
        """Return a bucket that exists and holds a call's sizes at little more cost than its ``own``; the least such.

        Sizes of several dims seldom come in the same combination again: nodes, edges and graphs, batch and length.
        """
        allowance = self.allowance(dims)
        if allowance is None or own in self.buckets or self._followed(real):
            return None
        padded = {symbol for dim in dims if dim.to_probe is None for symbol in dim.symbols}
        needed = self.region.values(own)
        most = self._input_bytes(needed) * (1 + allowance)

        def serves(sizes: Sizes) -> bool:
            there = self.region.values(sizes)
            holds = all(
                there[s] >= real[s] if s in padded and needed[s] != real[s] else there[s] == needed[s] for s in real
            )
            alike = all(len({there[s] for s in dim.symbols}) == len({needed[s] for s in dim.symbols}) for dim in dims)
            return holds and alike and self.buckets[sizes].refusal is None and self._input_bytes(there) <= most

        return min(
            filter(serves, self.buckets), key=lambda sizes: self._input_bytes(self.region.values(sizes)), default=None
        )

    def _input_bytes(self, values: Values) -> int:
        return sum(math.prod(shape_at(t, values)[0]) * t.dtype.itemsize for t in self.region.staged)

    def _kept_equal(self, real: Values, padded: Values, dims: Sequence[DynamicDim]) -> Values:
        """Return ``padded``, but dims without proof are padded only where sizes equal in the call stay equal.

        Such sizes may belong together, though neither a guard nor a proof says so: an index made of one may run out of
        the range of the other, which on a GPU is the end of the process's CUDA context.
        """
        apart = [
            s
            for dim in dims
            for s in dim.symbols
            if dim.to_probe is not None and len({padded[t] for t in real if real[t] == real[s]}) > 1
        ]
        if not apart:
            return padded
        kept = {**padded, **{s: real[s] for s in apart}}
        return kept if self.region.shapes.admits([evaluate(s.size, kept) for s in self.region.sizes]) else real

    def _admits(self, dim: DynamicDim, values: Values) -> Callable[[int], bool]:
        def admits(size: int) -> bool:
            padded = {**values, **dict.fromkeys(dim.symbols, size)}
            if self._overlaps(dim, padded):
                return False
            return self.region.shapes.admits([evaluate(s.size, padded) for s in self.region.sizes])

        return admits

    def _overlaps(self, dim: DynamicDim, values: Values) -> bool:
        return any(overlaps_itself(*shape_at(t, values)) for t in self.region.staged if t.symbols & dim.symbols)

    def _reading(self, tensor: TensorInput, values: Values, padded: Values) -> Reading:
        provided = extent(*shape_at(tensor, self.largest(padded))) * tensor.dtype.itemsize
        return Reading(
            tensor.index,
            tensor.dtype,
            real=shape_at(tensor, values),
            shape=shape_at(tensor, padded),
            row_entries=tuple(self._row_entries(size, values) for size in tensor.size),
            fill=self._fill(tensor),
            provided=provided if provided <= _PROVIDED_AT_ONCE else 0,
            is_fixed=not tensor.symbols,
            is_saved=self.region.kind == "backward" and may_be_strided(tensor),
        )

    def _row_entries(self, size: sympy.Expr, values: Values) -> int:
        """Count the entries per row of a dim: 2 for a size ``2*s``."""
        padded = next((s for s in size.free_symbols if any(s in dim.symbols for dim in self._padded_dims())), None)
        if padded is None:
            return 1
        return evaluate(size, {**values, padded: values[padded] + 1}) - evaluate(size, values)

    def _fill(self, tensor: TensorInput) -> Fill:
        irrelevant = not any(d.needs_fill for d in self._padded_dims() if d.symbols & tensor.symbols)
        if self._poisons() and irrelevant and tensor.dtype.is_floating_point:
            return float("nan")
        return tensor.fill
