"""Places: which calls they can serve, what a call overwrites there, and when a new place or graph is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import sympy
import torch

from cudagraph_backend.drivers.host import HostGraph, HostMemory
from cudagraph_backend.errors import Refusal
from cudagraph_backend.memory.output_pool import ALIGNMENT, OutputPool
from cudagraph_backend.memory.output_range import Loan, OutputRange
from cudagraph_backend.memory.strides import Shape
from cudagraph_backend.options import Options
from cudagraph_backend.region import Region, SizeInput, TensorInput
from cudagraph_backend.runtime import places as places_module
from cudagraph_backend.runtime.limits import LIMITS, Limits
from cudagraph_backend.runtime.places import Places
from cudagraph_backend.runtime.plan import Bucket, Plan
from cudagraph_backend.runtime.readings import Reading
from cudagraph_backend.runtime.route import Place, Route
from cudagraph_backend.runtime.served import Served
from cudagraph_backend.torch_internals import Shapes

LOAN = Loan("region 0 (inference)", ((0, 0, 64),), ("model.py:3 in f: return x * 2",))
ROW = 512  # bytes of a row of the tests' inputs and outputs


def shape(rows: int) -> Shape:
    return (rows, 128), (128, 1)


def region(inputs: int, static: int = 0, mutated: Sequence[int] = (), objects: Sequence[int] = ()) -> Region:
    roles = ["static"] * static + ["staged"] * inputs
    tensors = [TensorInput(i, f"arg{i}", r, i in mutated, torch.float32, (), ()) for i, r in enumerate(roles)]
    return Region(
        number=0,
        kind="inference",
        device=torch.device("cpu"),
        inputs=tuple(tensors),
        sizes=(SizeInput(static, 0, sympy.Symbol("s0")),),
        dims=(),
        counts=(),
        outputs=(),
        shapes=Shapes([]),
        refusal=None,
        has_effects=False,
        source_lines=(),
        objects=tuple(objects),
    )


def plan_for(places: Places, rows: int = 1, bucket: int | None = None, with_cache: bool = False) -> Plan:
    bucket = bucket or rows
    readings = [
        Reading(i.index, torch.float32, shape(rows), shape(bucket), (1, 1), "replica", 0) for i in places._region.staged
    ]
    if with_cache:
        fixed = shape(CACHE_ROWS)
        readings[-1] = Reading(readings[-1].index, torch.float32, fixed, fixed, (1, 1), "replica", 0, is_fixed=True)
    return Plan(
        (rows,), Bucket((bucket,)), tuple(readings), Served({"s0": (rows, bucket - rows)}, takes_existing=False)
    )


@pytest.fixture
def pool() -> OutputPool:
    return OutputPool(HostMemory())


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of the current step, to be changed."""
    number = [1]
    monkeypatch.setattr(places_module, "current_step", lambda: (number[0], 0))
    return number


def lend(pool: OutputPool, taken: OutputRange, step: int, nbytes: int = ROW) -> torch.Tensor:
    storage = pool.lend(taken, nbytes, LOAN, (step, 0)).storage
    return torch.empty(0).set_(storage, 0, *shape(nbytes // ROW)).normal_()


class Caller:
    """Calls a region of one output, as ``Replayer`` does, and keeps count of its captures."""

    def __init__(
        self,
        pool: OutputPool,
        step: list[int],
        inputs: int = 1,
        static: int = 0,
        objects: Sequence[int] = (),
        limits: Limits = LIMITS,
        **options: Any,
    ):
        self.pool = pool
        self.step = step
        self.places = Places(region(inputs, static, objects=objects), pool, Options(**options), limits=limits)
        self.captures = 0
        self.copies = 0
        self.cache = False

    def __call__(self, *args: Any, rows: int = 1, bucket: int | None = None) -> torch.Tensor | Refusal:
        plan, listed = plan_for(self.places, rows, bucket, self.cache), list(args)
        found = self.places.route(plan, listed)
        if isinstance(found, Refusal):
            return found
        if found.graph is not None:
            self.places.note_replay(found)
        elif (refusal := self.places.refused_capture(found)) is not None:
            return refusal
        else:
            needs = [plan.bucket.sizes[0] * ROW]
            found = self.places.provide(found, needs, needs)
            self.places.add(plan, found, HostGraph(lambda: None))
            self.captures += 1
        self.route = found
        output = lend(self.pool, self.route.place.outputs[0], self.step[0], rows * ROW)
        if self.route.place.copied:
            output = output.clone()
            self.copies += 1
            self.places.note_copies(self.route.place, {0: output.untyped_storage()})
        return output


def spans(route: Route | None) -> list[tuple[int, int]]:
    assert route is not None
    return [*route.place.inputs, *(taken.span for taken in route.place.outputs)]


def test_to_look_a_route_up_makes_no_place_and_takes_no_memory(pool: OutputPool, step: list[int]):
    """What a call costs is measured so; nothing must come of it but a number."""
    call = Caller(pool, step, static=1, on_overwrite="error")
    weight, x = torch.ones(4), torch.ones(1, 128)
    kept = call(weight, x)
    plan, before = plan_for(call.places), (pool.nbytes, len(call.places.listed), call.places._admission.calls)
    step[0] += 1
    assert call.places.look_up(plan, [weight, x]) is None, "its output is kept"
    assert call.places.look_up(plan, [torch.ones(4), x]) is None, "there is no graph for other parameters"
    assert (pool.nbytes, len(call.places.listed), call.places._admission.calls) == before
    assert isinstance(kept, torch.Tensor)
    assert kept.isfinite().all(), "it was not invalidated"
    del kept
    assert call.places.look_up(plan, [weight, x]) is call.route


# ------------------------------------------------------------------------------------------------ one place


def test_a_place_reads_what_lies_there_and_takes_copies_of_the_rest(pool: OutputPool):
    place = Place([], ((0, 512), (512, 1536)), frozenset([(0, 512), (512, 1536)]))
    readings = [Reading(i, torch.float32, shape(1), shape(1), (1, 1), "replica") for i in range(2)]
    wide = [readings[0], Reading(1, torch.float32, shape(3), shape(3), (1, 1), "replica")]
    for where, reads, expected in [
        ((None, None), readings, True),
        ((0, None), readings, True),
        ((0, 512), readings, True),
        ((0, 512), wide, True),  # where an argument lies, there is room for it
        ((512, None), readings, False),
        ((0, None), wide, False),
    ]:
        assert place.accepts(reads, where) == expected, where


def test_a_place_is_for_the_objects_it_was_captured_with(pool: OutputPool, step: list[int]):
    """Equal ones are others: a graph has the memory of the one it saw."""
    call = Caller(pool, step, inputs=1, objects=[1])
    x, first, second = torch.randn(shape(1)[0]), [1], [1]
    routes = []
    for group in (first, second, first, second):
        call(x, group)
        assert call.route is not None
        routes.append(call.route)
    assert call.captures == 2
    assert routes[0].place is routes[2].place is not routes[1].place is routes[3].place
    assert [place.objects for place in call.places.listed] == [(first,), (second,)]


def test_objects_that_are_new_at_every_call_are_not_captured_for_ever(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, inputs=1, objects=[1])
    objects = [[number] for number in range(100)]
    results = [call(torch.randn(shape(1)[0]), group) for group in objects]
    assert call.captures == LIMITS.unused_captures
    assert isinstance(results[-1], Refusal)
    call(torch.randn(shape(1)[0]), objects[-1])
    assert call.captures == LIMITS.unused_captures + 1  # it is met again


def test_copies_may_not_meet_each_other(pool: OutputPool, step: list[int]):
    """Two arguments that were views of one output are read at overlapping places, which copies can't be."""
    call = Caller(pool, step, inputs=2)
    x = lend(pool, pool.find_room(2 * ROW, []), step[0], 2 * ROW)
    call(x, x[1:], rows=1)
    (place,) = call.places.listed
    assert place.inputs == ((0, ROW), (ROW, 2 * ROW))
    assert place.staging == {*place.inputs}
    call(x, x[:1], rows=1)
    assert call.places.listed[1].inputs == ((0, ROW), (0, ROW))
    assert call.places.listed[1].staging == frozenset()


# ------------------------------------------------------------------------------------------------ calls


def test_calls_with_equal_addresses_share_a_place(pool: OutputPool, step: list[int]):
    call = Caller(pool, step)
    for _ in range(3):
        call(torch.ones(1, 128))
    assert call.captures == 1
    assert pool.nbytes == 2 * ROW


def test_buckets_share_a_place_whose_room_is_enough(pool: OutputPool, step: list[int]):
    call = Caller(pool, step)
    for rows in (4, 2, 1, 4, 2):
        call(torch.ones(rows, 128), rows=rows)
    assert call.captures == 3
    assert len(call.places.listed) == 1


def test_a_larger_bucket_gets_a_place_of_its_own_and_the_smaller_keeps_its_graph(pool: OutputPool, step: list[int]):
    call = Caller(pool, step)
    for rows in (1, 4, 1, 4):
        call(torch.ones(rows, 128), rows=rows)
    assert call.captures == 2
    assert pool.nbytes == 8 * ROW  # what the larger one alone would take


def test_feedback_alternates_between_two_ranges(pool: OutputPool, step: list[int]):
    call = Caller(pool, step)
    x = torch.ones(1, 128)
    for step[0] in range(20):
        x = call(x)
        assert len(call.route.copies) == (step[0] == 0)
    assert (call.captures, call.copies, pool.nbytes) == (2, 0, 2 * ROW)


def test_feedback_of_two_values_alternates_too(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, inputs=2)
    x, constant = torch.ones(1, 128), torch.ones(1, 128)
    for step[0] in range(20):
        x = call(x, constant)
    assert (call.captures, call.copies, pool.nbytes) == (2, 0, 3 * ROW)


def test_an_input_read_in_place_is_never_written(pool: OutputPool, step: list[int]):
    first, second = Caller(pool, step), Caller(pool, step)
    x = first(torch.ones(1, 128))
    for step[0] in range(2, 5):
        kept = x.clone()
        y = second(x)
        assert len(second.route.in_place) == 1
        assert y.data_ptr() != x.data_ptr()
        assert torch.equal(x, kept)
    assert second.captures == 2  # y is held during the next call


def test_static_inputs_that_moved_lead_to_another_place(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, static=1)
    weights = [torch.ones(4), torch.ones(4)]
    for weight in (*weights, *weights):
        call(weight, torch.ones(1, 128))
    assert call.captures == 2


def test_captures_that_no_call_uses_come_to_an_end(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, static=1)
    weights = [torch.ones(4) for _ in range(60)]
    refused = [isinstance(call(weight, torch.ones(1, 128)), Refusal) for weight in weights]
    assert refused == [False] * 32 + [True] * 28
    assert not isinstance(call(weights[-1], torch.ones(1, 128)), Refusal)  # met again, it is captured
    assert call.captures == 33


def test_no_more_graphs_than_max_graphs(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, max_graphs=2)
    refused = [isinstance(call(torch.ones(rows, 128), rows=rows), Refusal) for rows in (3, 2, 1, 3)]
    assert refused == [False, False, True, False]


# ------------------------------------------------------------------------------------------------ live outputs


def test_outputs_of_this_step_are_left_alone(pool: OutputPool, step: list[int]):
    call = Caller(pool, step)
    kept = [call(torch.ones(1, 128)) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in kept}) == 5
    assert (call.captures, call.copies) == (5, 0)
    del kept
    step[0] += 1
    kept = [call(torch.ones(1, 128)) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in kept}) == call.captures == 5
    assert pool.nbytes == 6 * ROW


def test_after_a_few_kept_outputs_calls_get_copies(pool: OutputPool, step: list[int]):
    """Nothing that was handed out moves: its address stays, and exports of it are right."""
    call, kept, addresses = Caller(pool, step), [], []
    for step[0] in range(1, 30):
        kept.append(call(torch.ones(1, 128)).fill_(step[0]))
        addresses.append(kept[-1].data_ptr())
    assert [float(tensor[0, 0]) for tensor in kept] == [*range(1, 30)]
    assert [tensor.data_ptr() for tensor in kept] == addresses
    assert (call.captures, call.copies, pool.nbytes) == (3, 27, 4 * ROW)


def test_a_caller_who_always_holds_the_last_output_gets_a_second_place(pool: OutputPool, step: list[int]):
    call = Caller(pool, step)
    out = None
    for step[0] in range(30):
        out = call(torch.ones(1, 128)).fill_(step[0])
    assert (out == 29).all()
    assert (call.captures, call.copies, pool.nbytes) == (2, 0, 3 * ROW)


@pytest.mark.parametrize("held", [2, 3, 4])
def test_a_caller_who_holds_a_few_outputs_gets_places_instead_of_copies(pool: OutputPool, step: list[int], held: int):
    call = Caller(pool, step)
    kept: list[torch.Tensor] = []
    for step[0] in range(1, 400):
        kept = [*kept[-held + 1 :], call(torch.ones(1, 128)).fill_(step[0])]
        assert [float(tensor[0, 0]) for tensor in kept] == [*range(max(step[0] - held + 1, 1), step[0] + 1)]
    copies = call.copies
    for step[0] in range(400, 450):
        kept = [*kept[-held + 1 :], call(torch.ones(1, 128))]
    assert call.copies == copies
    assert call.captures == held + 1


def test_places_that_stay_blocked_are_replaced(pool: OutputPool, step: list[int]):
    """Two outputs are kept for ever; all later ones die at once, and are not copied for ever."""
    call = Caller(pool, step)
    kept = [call(torch.ones(1, 128)).fill_(7) for step[0] in range(2)]
    for step[0] in range(2, 100):
        call(torch.ones(1, 128))
    assert call.copies == 9  # until enough copies were seen to die
    assert call.captures == 3
    kept += [call(torch.ones(1, 128)).fill_(7)]
    step[0] += 1
    for step[0] in range(100, 200):
        call(torch.ones(1, 128))
    assert all((tensor == 7).all() for tensor in kept)
    assert call.captures <= 5


@pytest.mark.parametrize("every", [10, 23, 50])
def test_a_caller_who_keeps_an_output_now_and_then_costs_few_captures(pool: OutputPool, step: list[int], every: int):
    call, kept = Caller(pool, step), []
    buckets = (1, 2, 4, 8)
    for step[0] in range(1, 4000):
        rows = buckets[step[0] % 4]
        out = call(torch.ones(rows, 128), rows=rows).fill_(step[0])
        if step[0] % every == 0:
            kept.append((out, step[0]))
        if step[0] == 2000:
            captures = call.captures
    assert all((out == number).all() for out, number in kept)
    assert captures <= 60
    assert call.captures <= captures + 12


def test_where_no_graph_may_be_added_a_blocked_one_is_replaced(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, max_graphs=1)
    out = None
    for step[0] in range(30):
        out = call(torch.ones(1, 128)).fill_(step[0])
    assert (out == 29).all()
    assert (call.captures, call.copies, call.places.graph_count()) == (2, 29, 1)


def test_many_outputs_alive_in_one_step_are_copied_at_last(pool: OutputPool, step: list[int]):
    call = Caller(pool, step)
    kept = [call(torch.ones(1, 128)).fill_(i) for i in range(40)]
    assert [float(tensor[0, 0]) for tensor in kept] == [*range(40)]
    assert (call.captures, call.copies) == (17, 24)


def test_an_output_over_all_that_a_call_writes_sends_it_elsewhere(pool: OutputPool, step: list[int]):
    call = Caller(pool, step)
    call(torch.ones(1, 128))
    kept = lend(pool, pool.find_room(2 * ROW, []), step[0], 2 * ROW).fill_(5)
    step[0] += 1
    call(torch.ones(1, 128)).fill_(6)
    assert (kept == 5).all()
    assert (call.captures, call.copies) == (2, 0)


def test_an_argument_that_is_read_in_place_is_not_overwritten(pool: OutputPool, step: list[int]):
    """A longer output at the same address reaches into what the place writes: another place must be found."""
    call = Caller(pool, step)
    x = lend(pool, pool.find_room(ROW, []), step[0])
    call(x)
    del x
    step[0] += 1
    x = lend(pool, pool.find_room(4 * ROW, []), step[0], 4 * ROW)
    step[0] += 1
    before, address = x.clone(), x.data_ptr()
    y = call(x, rows=4)
    assert x.data_ptr() == address
    assert torch.equal(x, before)
    assert y.data_ptr() >= x.data_ptr() + x.nbytes


def test_outputs_of_earlier_steps_are_invalidated_if_the_user_wants_it(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, on_overwrite="error")
    old = call(torch.ones(1, 128))
    same_step = call(torch.ones(1, 128)).fill_(7)
    assert torch.equal(old, old.clone())
    step[0] += 1
    call(torch.ones(1, 128))
    with pytest.raises(RuntimeError, match=r"model\.py:3"):
        old + 1
    assert (same_step == 7).all()


def test_an_output_is_invalidated_for_another_bucket_that_is_captured_at_its_place(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, on_overwrite="error")
    kept = call(torch.ones(4, 128), rows=4)
    step[0] += 1
    call(torch.ones(2, 128), rows=2)
    assert isinstance(kept, torch.Tensor)
    with pytest.raises(RuntimeError, match="overwritten"):
        kept + 1


def test_no_output_is_invalidated_for_a_bucket_that_is_not_captured(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, on_overwrite="error", max_graphs=1)
    kept = call(torch.ones(4, 128), rows=4)
    step[0] += 1
    assert isinstance(call(torch.ones(2, 128), rows=2), Refusal)
    assert isinstance(kept, torch.Tensor)
    assert kept.isfinite().all()


def test_what_a_backward_may_need_is_not_invalidated(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, on_overwrite="error")
    call(torch.ones(1, 128))
    (place,) = call.places.listed
    saved = Loan("region 0 (forward)", ((0, 0, ROW),), (None,), is_saved=True)
    storage = pool.lend(place.outputs[0], ROW, saved, (1, 0)).storage
    tensor = torch.empty(0).set_(storage, 0, *shape(1)).fill_(3)
    del storage
    step[0] += 1
    call(torch.ones(1, 128))
    assert (tensor == 3).all()


def test_an_argument_of_the_call_is_not_invalidated(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, on_overwrite="error")
    old = call(torch.ones(2, 128), rows=2).fill_(4)
    step[0] += 1
    call(old[:1], rows=1, bucket=2)  # a row with a real one behind is copied
    assert (old == 4).all()


# ------------------------------------------------------------------------------------------------ caches

CACHE_ROWS = 256  # 128 KiB


def cached(pool: OutputPool, step: list[int], mutated: Sequence[int] = ()) -> Caller:
    """A region of a staged input of one row, and of a large one whose size never changes."""
    call = Caller(pool, step, inputs=2)
    call.places._region = region(2, mutated=mutated)
    call.cache = True
    return call


def test_a_large_input_of_fixed_size_is_read_where_it_is(pool: OutputPool, step: list[int]):
    call, cache = cached(pool, step), torch.ones(CACHE_ROWS, 128)
    for _ in range(3):
        call(torch.ones(1, 128), cache)
        assert [copy.index for copy in call.route.copies] == [0]
        assert call.route.inputs[1].data_ptr() == cache.data_ptr()
    assert (call.captures, pool.nbytes) == (1, 2 * ROW)


def test_caches_that_keep_moving_are_copied(pool: OutputPool, step: list[int]):
    call, caches = cached(pool, step), [torch.full((CACHE_ROWS, 128), float(i)) for i in range(4)]
    for _ in range(2):
        for cache in caches:
            call(torch.ones(1, 128), cache)
            assert len(call.route.copies) == (1 if cache[0, 0] < 2 else 2)
    assert call.captures == 3


def test_a_cache_that_is_not_aligned_is_copied(pool: OutputPool, step: list[int]):
    call, memory = cached(pool, step), torch.ones(CACHE_ROWS * 128 + 1)
    call(torch.ones(1, 128), memory[1:].view(CACHE_ROWS, 128))
    assert len(call.route.copies) == 2


def test_no_range_is_placed_where_a_cache_is(pool: OutputPool, step: list[int]):
    """Addresses outside of the pool are no room in it."""
    call, cache = cached(pool, step), torch.ones(CACHE_ROWS, 128)
    kept = [call(torch.ones(1, 128), cache).fill_(7) for _ in range(4)]
    assert (cache == 1).all()
    for tensor in kept:
        assert pool.address <= tensor.data_ptr() < pool.address + pool.nbytes


# ------------------------------------------------------------------------------------------------ arguments that meet


def taken_apart(
    pool: OutputPool, step: list[int], *args: torch.Tensor, mutated: Sequence[int], static: int = 0
) -> bool:
    call = Caller(pool, step, inputs=2, static=static)
    call.places._region = region(2, static, mutated)
    call(*args)
    return call.route.takes_apart(args)


def test_copies_do_not_take_apart_what_a_region_changes_through_both(pool: OutputPool, step: list[int]):
    memory = torch.ones(3, 128)
    first, second, both = memory[:1], memory[1:2], memory[:2].view(-1)[64:192].view(1, 128)
    assert taken_apart(pool, step, first, both, mutated=[0])
    assert taken_apart(pool, step, first, both, mutated=[1])
    assert not taken_apart(pool, step, first, both, mutated=[])
    assert not taken_apart(pool, step, first, second, mutated=[0, 1])
    assert not taken_apart(pool, step, first, second, mutated=[0])


def test_static_inputs_count_too(pool: OutputPool, step: list[int]):
    memory = torch.ones(4, 128)
    weight, other = memory[:2], torch.ones(1, 128)
    for mutated, expected in (([0], True), ([1], True), ([2], False), ([], False)):
        assert taken_apart(pool, step, weight, memory[1:2], other, mutated=mutated, static=1) == expected


def test_what_is_read_in_place_is_not_taken_apart(pool: OutputPool, step: list[int]):
    x = lend(pool, pool.find_room(2 * ROW, []), step[0], 2 * ROW)
    assert not taken_apart(pool, step, x[:1], x[:1].view(1, 128), mutated=[0])


# ------------------------------------------------------------------------------------------------ limits


def test_an_input_found_in_many_places_is_copied(pool: OutputPool, step: list[int]):
    call, kept = Caller(pool, step), []
    for _ in range(12):
        taken = pool.find_room(ROW, [(0, 4 * ROW)])
        kept.append(lend(pool, taken, step[0]))
        call(kept[-1])
    assert len(call.route.copies) == 1
    assert call.captures <= 9


def test_a_place_that_was_not_used_for_long_makes_room(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, static=1, limits=replace(LIMITS, places=3, idle_calls=10))
    weights = [torch.ones(4) for _ in range(4)]
    for weight in weights[:3]:
        call(weight, torch.ones(1, 128))
    assert isinstance(call(weights[3], torch.ones(1, 128)), Refusal)
    for _ in range(10):
        call(weights[2], torch.ones(1, 128))
    assert not isinstance(call(weights[3], torch.ones(1, 128)), Refusal)
    assert len(call.places.listed) == 3
    assert call.places.graph_count() == 3


def test_a_full_pool_is_a_refusal(step: list[int]):
    class Full(HostMemory):
        def grow(self, nbytes: int) -> None:
            raise torch.OutOfMemoryError("full")

    refusal = Caller(OutputPool(Full()), step)(torch.ones(1, 128))
    assert isinstance(refusal, Refusal)
    assert "no memory for the output pool: full" in str(refusal)


def test_output_ranges_keep_clear_of_inputs_and_each_other(pool: OutputPool, step: list[int]):
    call = Caller(pool, step, inputs=3)
    call(*(torch.ones(1, 128) for _ in range(3)))
    taken = sorted(spans(call.route))
    assert all(a_end <= b for (_, a_end), (b, _) in pairwise(taken))
    assert all(first % ALIGNMENT == 0 for first, _ in taken)


def test_what_looks_like_a_storage_that_is_gone_is_looked_at_anew():
    """An address of a storage is used again soon; where an argument was found tells nothing of another one there."""
    pool = OutputPool(HostMemory())
    places = Places(region(1, 0), pool, Options())
    plan = plan_for(places, 1, 2)  # the padded row is filled behind the argument
    pool._memory.grow(1 << 16)

    def output(nbytes: int, rows: int) -> torch.Tensor:
        lent = pool.lend(pool._range(4096, nbytes), rows * ROW, LOAN, (1, 0))
        return lent.tensor(torch.float32, (rows, 128), (128, 1), 0)

    y = output(2 * ROW, 1)
    assert places._finder.where(plan, [y]) == (4096,)
    gone = y.untyped_storage()._cdata
    del y
    output(4 * ROW, 1)  # the range is not listed any more, and nothing holds it
    for k in range(5000):
        y = output((5 + k) * ROW, 2)
        if y.untyped_storage()._cdata == gone:
            assert places._finder.where(plan, [y[:1]]) == (None,)  # a real row comes behind
            return
        del y
    raise AssertionError("no address was used again, so that nothing was tried")


def test_outputs_of_many_steps_in_what_one_call_writes(monkeypatch: pytest.MonkeyPatch):
    step = [1]
    monkeypatch.setattr(places_module, "current_step", lambda: (step[0], 0))
    pool = OutputPool(HostMemory())
    call = Caller(pool, step)
    out = call(torch.ones(8, 128), rows=8)
    first = call.places.listed[0].outputs[0].offset
    del out
    for _ in range(14):
        kept = []
        for k in range(4):
            step[0] += 1
            kept.append(lend(pool, pool._range(first + k * 2 * ROW, 2 * ROW), step[0], ROW))
        step[0] += 1
        assert not isinstance(call(torch.ones(8, 128), rows=8), Refusal)
