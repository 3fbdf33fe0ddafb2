"""Places: the ranges that a region's calls and buckets share, how they grow, and which graph fits them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cudagraph_backend import tree
from cudagraph_backend.drivers.host import HostGraph, HostMemory
from cudagraph_backend.output_pool import ALIGNMENT, Loan, OutputPool, OutputRange, can_move_out
from cudagraph_backend.tree import CapturedGraph, Place, Ranges

needs_move = pytest.mark.skipif(not can_move_out(), reason="this torch can't exchange the memory of storages")


@pytest.fixture
def pool() -> OutputPool:
    return OutputPool(HostMemory())


@pytest.fixture
def place(pool: OutputPool) -> Place:
    return Place(pool)


@pytest.fixture
def unmovable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on torch 2.11: a live output stays where it is."""
    monkeypatch.setattr(tree, "can_move_out", lambda: False)
    monkeypatch.setattr(tree, "_SETS", 4)


def output_on(taken: OutputRange, value: int) -> torch.Tensor:
    storage = taken.lend(64, Loan("region 0", ((0, 0, 64),), (0, 0)))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (64,), (1,)).fill_(value)


def graph_at(ranges: Ranges, count: int | None = None) -> CapturedGraph:
    return CapturedGraph(HostGraph(lambda: None), [], ranges[:count])


def reserved(place: Place, needs: Sequence[int]) -> Ranges:
    ranges = place.free_ranges(None)
    assert ranges is not None
    place.reserve(ranges, needs)
    return ranges


def test_a_new_place_has_no_range_and_takes_no_memory(place: Place, pool: OutputPool):
    assert place.free_ranges(None) == []
    assert place.free_ranges(2) == []
    assert pool.nbytes == 0


def test_all_calls_of_a_place_get_the_same_ranges(place: Place):
    ranges = reserved(place, [100, 200])
    offsets = [r.offset for r in ranges]
    place.reserve(ranges, [50, 60])
    assert place.free_ranges(2) is ranges
    assert [r.offset for r in ranges] == offsets
    assert [r.nbytes >= need for r, need in zip(ranges, [100, 200], strict=True)] == [True, True]


def test_places_have_ranges_of_their_own(pool: OutputPool):
    first, second = Place(pool), Place(pool)
    a, b = reserved(first, [64]), reserved(second, [64])
    assert a[0].offset + a[0].nbytes <= b[0].offset


def test_a_region_with_more_outputs_adds_ranges_behind_the_others(place: Place):
    (first,) = reserved(place, [64])
    ranges = reserved(place, [64, 64])
    assert ranges[0] is first
    assert len(ranges) == 2


def test_the_last_range_grows_where_it_stands(place: Place):
    ranges = reserved(place, [64, 64])
    before, graph = [r.offset for r in ranges], graph_at(ranges)
    place.reserve(ranges, [64, 5 * ALIGNMENT])
    assert [r.offset for r in ranges] == before
    assert ranges[1].nbytes == 5 * ALIGNMENT
    assert graph.fits(ranges)
    assert place.has(graph)


def test_a_range_with_another_behind_it_moves_and_leaves_its_memory(place: Place, pool: OutputPool):
    ranges = reserved(place, [64, 64])
    graph = graph_at(ranges)
    assert place.has(graph)
    place.reserve(ranges, [3 * ALIGNMENT, 64])
    assert [(r.offset, r.nbytes) for r in ranges] == [(2 * ALIGNMENT, 3 * ALIGNMENT), (ALIGNMENT, ALIGNMENT)]
    assert not place.has(graph)
    assert pool.allocate(ALIGNMENT).offset == 0


class FullMemory(HostMemory):
    """Has room for 1 KiB."""

    def grow(self, nbytes: int) -> None:
        if nbytes > 1024:
            raise torch.OutOfMemoryError("full")
        super().grow(nbytes)


def test_on_a_full_device_the_ranges_stay_as_they_were():
    place = Place(OutputPool(FullMemory()))
    ranges = reserved(place, [64, 64])
    graph = graph_at(ranges)
    with pytest.raises(torch.OutOfMemoryError):
        place.reserve(ranges, [2048, 64])
    assert place.free_ranges(None) is ranges
    assert [r.nbytes for r in ranges] == [ALIGNMENT, ALIGNMENT]
    assert place.has(graph)


def test_a_dropped_output_frees_its_range(place: Place):
    ranges = reserved(place, [64])
    output = output_on(ranges[0], 1)
    address = output.data_ptr()
    del output
    assert place.free_ranges(1) is ranges
    assert output_on(ranges[0], 2).data_ptr() == address


def test_dropped_outputs_are_not_moved(place: Place, monkeypatch: pytest.MonkeyPatch):
    ranges = reserved(place, [64, 64])
    monkeypatch.setattr(OutputRange, "move_out", lambda self: pytest.fail("a dead output was moved"))
    for value in range(10):
        outputs = [output_on(r, value) for r in ranges]
        del outputs
        assert place.free_ranges(None) is ranges


@needs_move
def test_live_outputs_are_moved_out_and_keep_their_values(place: Place):
    ranges = reserved(place, [64, 64])
    outputs = [output_on(r, value) for value, r in enumerate(ranges)]
    assert place.free_ranges(2) is ranges
    again = [output_on(r, 9) for r in ranges]
    assert [int(o[5]) for o in (*outputs, *again)] == [0, 1, 9, 9]
    assert len({o.data_ptr() for o in (*outputs, *again)}) == 4


@needs_move
def test_only_the_ranges_that_will_be_written_are_moved_out_of(place: Place):
    ranges = reserved(place, [64, 64])
    first, second = output_on(ranges[0], 1), output_on(ranges[1], 2)
    address = second.data_ptr()
    place.free_ranges(1)
    assert not ranges[0].is_live()
    assert ranges[1].is_live()
    assert second.data_ptr() == address
    assert (int(first[0]), int(second[0])) == (1, 2)


@pytest.mark.usefixtures("unmovable")
def test_where_outputs_can_not_move_another_set_of_ranges_is_used(place: Place):
    kept, sets = [], []
    for value in range(4):
        ranges = reserved(place, [64, 64])
        sets.append(ranges)
        kept.append([output_on(r, value) for r in ranges])
    assert len({r.offset for ranges in sets for r in ranges}) == 8
    assert place.free_ranges(2) is None
    assert place.free_ranges(None) is None
    assert [[int(o[7]) for o in outputs] for outputs in kept] == [[0, 0], [1, 1], [2, 2], [3, 3]]


@pytest.mark.usefixtures("unmovable")
def test_where_outputs_can_not_move_a_set_whose_outputs_are_dropped_is_used_again(place: Place):
    first = reserved(place, [64])
    a = output_on(first[0], 1)
    second = reserved(place, [64])
    b = output_on(second[0], 2)
    assert second is not first
    del a
    assert place.free_ranges(1) is first
    assert (b == 2).all()


@pytest.mark.usefixtures("unmovable")
def test_a_graph_belongs_to_its_set(place: Place):
    first = reserved(place, [64])
    graph, output = graph_at(first), output_on(first[0], 1)
    second = reserved(place, [64])
    assert graph.fits(first)
    assert not graph.fits(second)
    assert place.has(graph)
    assert place.has(graph_at(second))
    del output


@pytest.mark.usefixtures("unmovable")
def test_a_graph_does_not_fit_ranges_that_are_shorter_than_it_writes(place: Place, pool: OutputPool):
    """A long range stood at the offset; it moved away, and a short one of another set took the offset."""
    first = reserved(place, [2 * ALIGNMENT])
    graph = graph_at(first)  # writes 2 * ALIGNMENT bytes from offset 0
    pool.allocate(64)
    place.reserve(first, [4 * ALIGNMENT])
    output = output_on(first[0], 1)
    second = reserved(place, [ALIGNMENT])
    neighbour = pool.allocate(ALIGNMENT)
    assert (second[0].offset, neighbour.offset) == (0, ALIGNMENT)
    assert not graph.fits(second)
    del output


def test_a_graph_fits_by_the_ranges_that_it_writes(place: Place):
    ranges = reserved(place, [64, 64, 64])
    assert graph_at(ranges, 2).fits(ranges)
    assert not graph_at(list(reversed(ranges)), 2).fits(ranges)
    assert not graph_at(ranges, 3).fits(ranges[:2])
    assert not graph_at(ranges, 1).fits([])
    assert graph_at([]).fits(ranges)


def test_a_place_that_is_gone_gives_its_ranges_back(pool: OutputPool):
    place = Place(pool)
    offset = reserved(place, [64])[0].offset
    del place
    assert pool.allocate(64).offset == offset


def test_a_place_that_is_gone_leaves_live_outputs_alone(pool: OutputPool):
    place = Place(pool)
    ranges = reserved(place, [64])
    output = output_on(ranges[0], 4)
    del place, ranges
    taken = pool.allocate(64)
    taken.bytes(64).fill_(0xFF)
    assert (output == 4).all()
