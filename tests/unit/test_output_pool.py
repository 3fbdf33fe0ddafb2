"""The output pool: live ranges never overlap, live bytes never change."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cudagraph_backend.drivers.host import HostMemory
from cudagraph_backend.memory import output_pool
from cudagraph_backend.memory.output_pool import ALIGNMENT, OutputPool
from cudagraph_backend.memory.output_range import Loan, OutputRange
from cudagraph_backend.torch_internals import CAN_FORBID_ACCESS

LOAN = Loan("region 0 (inference)", ((0, 0, 64),), ("model.py:3 in f: return x * 2",))
sizes = st.integers(0, 3 * ALIGNMENT)


def output_on(pool: OutputPool, taken: OutputRange, nbytes: int) -> torch.Tensor:
    """A tensor as a call returns it: on the range's storage, and no view of the range's own tensor."""
    storage = pool.lend(taken, nbytes, LOAN, (1, 0)).storage
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (nbytes,), (1,))


def fill(pool: OutputPool, taken: OutputRange, byte: int) -> None:
    pool.bytes(taken.offset, taken.nbytes).fill_(byte)


@pytest.fixture
def pool() -> OutputPool:
    return OutputPool(HostMemory())


@dataclass
class Kept:
    """A tensor that the user holds, its range and its values."""

    taken: OutputRange
    tensor: torch.Tensor
    values: torch.Tensor


class PoolMachine(RuleBasedStateMachine):
    """Outputs are lent, kept, viewed and dropped, on ranges that overlap when they are dead."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = OutputPool(HostMemory())
        self.ranges: list[OutputRange] = []
        self.kept: list[Kept] = []
        self.nbytes = 0

    def live(self) -> set[OutputRange]:
        return {k.taken for k in self.kept}

    @rule(nbytes=sizes, data=st.data())
    def find_room(self, nbytes: int, data: st.DataObject) -> None:
        taken = data.draw(st.lists(st.sampled_from(self.ranges), max_size=2)) if self.ranges else []
        found = self.pool.find_room(nbytes, [r.span for r in taken], [r.span for r in self.ranges[-2:]])
        assert found.nbytes >= nbytes
        assert found.offset % ALIGNMENT == 0
        assert found.end <= self.pool.nbytes
        for other in (*taken, *self.live()):
            assert found.end <= other.offset or other.end <= found.offset
        self.ranges.append(found)

    @precondition(lambda self: self.ranges)
    @rule(data=st.data(), byte=st.integers(0, 255))
    def write_and_lend(self, data: st.DataObject, byte: int) -> None:
        taken = data.draw(st.sampled_from(self.ranges))
        if self.pool.live.within(taken.span):
            return
        nbytes = data.draw(st.integers(1, taken.nbytes))
        fill(self.pool, taken, byte)
        output = output_on(self.pool, taken, nbytes)
        assert self.pool.holder(output.untyped_storage()) is taken
        self.kept.append(Kept(taken, output, torch.full((nbytes,), byte, dtype=torch.uint8)))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def view(self, data: st.DataObject) -> None:
        of = self.kept[data.draw(st.integers(0, len(self.kept) - 1))]
        half = of.values.numel() // 2
        self.kept.append(Kept(of.taken, of.tensor[half:], of.values[half:]))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.kept[data.draw(st.integers(0, len(self.kept) - 1))]

    @precondition(lambda self: self.ranges)
    @rule(data=st.data())
    def forget_a_range(self, data: st.DataObject) -> None:
        self.ranges.remove(data.draw(st.sampled_from(self.ranges)))

    @rule()
    def poison_what_is_dead(self) -> None:
        for first, end in self.pool.free_spans():
            self.pool.bytes(first, end - first).fill_(0xFF)

    @invariant()
    def kept_tensors_have_their_values(self) -> None:
        for kept in self.kept:
            assert torch.equal(kept.tensor, kept.values)
            assert self.pool.holder(kept.tensor.untyped_storage()) is kept.taken

    @invariant()
    def liveness_is_that_of_the_tensors(self) -> None:
        assert set(self.pool.live.all()) == self.live()
        free = [byte for span in self.pool.free_spans() for byte in range(*span, ALIGNMENT)]
        used = [byte for taken in self.live() for byte in range(*taken.span, ALIGNMENT)]
        assert sorted(free + used) == list(range(0, self.pool.nbytes, ALIGNMENT))

    @invariant()
    def live_ranges_are_found_by_their_bytes(self) -> None:
        for taken in self.ranges:
            overlapping = {r for r in self.live() if r.offset < taken.end and taken.offset < r.end}
            assert set(self.pool.live.within(taken.span)) == overlapping

    @invariant()
    def the_pool_never_shrinks(self) -> None:
        assert self.pool.nbytes >= self.nbytes
        self.nbytes = self.pool.nbytes


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_ranges_are_aligned_and_follow_what_is_taken(pool: OutputPool):
    taken: list[tuple[int, int]] = []
    for nbytes in (1, ALIGNMENT, ALIGNMENT + 1, 0):
        taken.append(pool.find_room(nbytes, taken).span)
    assert taken == [(ALIGNMENT * a, ALIGNMENT * b) for a, b in ((0, 1), (1, 2), (2, 4), (4, 5))]
    assert pool.nbytes == 5 * ALIGNMENT


def test_the_first_gap_that_is_large_enough_is_used(pool: OutputPool):
    ranges = [pool.find_room(5 * ALIGNMENT, [])]
    taken = [(ALIGNMENT, 2 * ALIGNMENT), (4 * ALIGNMENT, 5 * ALIGNMENT)]
    assert pool.find_room(2 * ALIGNMENT, taken).offset == 2 * ALIGNMENT
    assert pool.find_room(ALIGNMENT, taken).offset == 0
    assert pool.find_room(3 * ALIGNMENT, taken).offset == ranges[0].end


def test_the_bytes_of_a_dead_output_are_used_again(pool: OutputPool):
    output = output_on(pool, pool.find_room(64, []), 64).fill_(3)
    assert pool.find_room(64, []).offset == ALIGNMENT
    assert (output == 3).all()
    del output
    assert pool.find_room(64, []).offset == 0


def test_a_preferred_range_is_used_if_it_is_as_long_and_free(pool: OutputPool):
    first, second, long = (0, ALIGNMENT), (ALIGNMENT, 2 * ALIGNMENT), (0, 3 * ALIGNMENT)
    pool.find_room(3 * ALIGNMENT, [])
    assert pool.find_room(64, [], [long, second]).span == second
    assert pool.find_room(64, [second], [second]).span == first
    kept = output_on(pool, pool.find_room(64, [first], [second]), 64)
    assert pool.find_room(64, [first], [second]).span == (2 * ALIGNMENT, 3 * ALIGNMENT)
    del kept


def test_equal_bytes_are_one_range(pool: OutputPool):
    assert pool.find_room(64, []) is pool.find_room(1, [])
    assert pool.find_room(64, []) is not pool.find_room(ALIGNMENT + 1, [])


class FullMemory(HostMemory):
    """Has room for 1 KiB."""

    def grow(self, nbytes: int) -> None:
        if nbytes > 1024:
            raise torch.OutOfMemoryError("full")
        super().grow(nbytes)


def test_a_full_device_leaves_the_pool_as_it_was():
    pool = OutputPool(FullMemory())
    taken = pool.find_room(512, [])
    with pytest.raises(torch.OutOfMemoryError):
        pool.find_room(1024, [taken.span])
    assert pool.nbytes == 512
    assert pool.find_room(512, [taken.span]).offset == 512


def test_outputs_lie_in_the_pooled_tensor(pool: OutputPool):
    taken = pool.find_room(64, [(0, 1)])
    output = output_on(pool, taken, 64)
    output.copy_(torch.arange(64))
    assert output.data_ptr() == pool.tensor.data_ptr() + taken.offset == pool.address + ALIGNMENT
    assert torch.equal(pool.tensor[taken.offset : taken.offset + 64], output)
    assert pool.tensor.nbytes == pool.nbytes


def test_the_pool_does_not_move_when_it_grows(pool: OutputPool):
    pool.find_room(1, [])
    address = pool.tensor.data_ptr()
    pool.find_room(1 << 20, [])
    assert pool.tensor.data_ptr() == address


def test_storages_are_made_once_per_size(pool: OutputPool):
    taken = pool.find_room(64, [])
    seen = {pool.lend(taken, nbytes, LOAN, (1, 0)).storage._cdata for nbytes in (64, 32, 64, 32)}
    assert len(seen) == 2
    assert pool.lend(taken, 32, LOAN, (1, 0)).storage.nbytes() == 32


def test_bytes_and_lent_storage_are_the_same_memory(pool: OutputPool):
    taken = pool.find_room(64, [])
    output = output_on(pool, taken, 16)
    fill(pool, taken, 9)
    assert (output == 9).all()


HOLDERS: dict[str, Callable[[torch.Tensor], object]] = {
    "the tensor": lambda output: output,
    "a view": lambda output: output[4:8].view(2, 2),
    "a detached tensor": lambda output: output.detach(),
    "its storage": lambda output: output.untyped_storage(),
    "a NumPy array": lambda output: output.numpy(),
    "a capsule": lambda output: output.__dlpack__(),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_whatever_holds_the_storage_keeps_it_alive(pool: OutputPool, holder: str):
    taken = pool.find_room(64, [])
    assert not taken.is_live()
    output = output_on(pool, taken, 64)
    kept = HOLDERS[holder](output)
    del output
    assert taken.is_live()
    del kept
    assert not taken.is_live()


def test_an_output_saved_for_backward_is_alive(pool: OutputPool):
    taken = pool.find_room(16, [])
    output = torch.empty(0).set_(pool.lend(taken, 16, LOAN, (1, 0)).storage, 0, (4,), (1,)).fill_(3.0)
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * output).sum()
    del output
    assert taken.is_live()
    loss.backward()
    del loss
    assert not taken.is_live()
    assert torch.equal(weight.grad, torch.full((4,), 3.0))


def test_a_range_knows_its_loan_and_the_tensors_on_it(pool: OutputPool):
    first = pool.find_room(64, [])
    output = output_on(pool, first, 64)
    other = output_on(pool, pool.find_room(64, []), 64)
    assert (first.loan, first.step) == (LOAN, (1, 0))
    assert pool.holder(output[3:].untyped_storage()) is first
    assert pool.holder(other.untyped_storage()) is not first
    assert pool.holder(output.clone().untyped_storage()) is None


def test_a_live_output_is_known_when_nobody_else_holds_its_range(pool: OutputPool):
    output = output_on(pool, pool.find_room(64, []), 64)
    gc.collect()
    assert [taken.span for taken in pool.live.all()] == [(0, ALIGNMENT)]
    assert pool.holder(output.untyped_storage()) is pool.live.all()[0]


def test_only_overlapping_bytes_are_live(pool: OutputPool):
    first, second = pool.find_room(64, []), pool.find_room(64, [(0, ALIGNMENT)])
    long = pool.find_room(3 * ALIGNMENT, [])
    kept = [output_on(pool, first, 8), output_on(pool, second, 8)]
    assert pool.live.within(first.span) == [first]
    assert set(pool.live.within(long.span)) == {first, second}
    assert pool.live.within((2 * ALIGNMENT, 3 * ALIGNMENT)) == []
    assert pool.live.within((ALIGNMENT, ALIGNMENT)) == []
    kept.clear()
    output = output_on(pool, long, 8)
    assert pool.live.within(second.span) == [long]
    del output
    assert pool.live.within(second.span) == []


def test_an_invalidated_output_raises_with_its_source_line_and_the_cure(pool: OutputPool):
    taken = pool.find_room(64, [])
    output = output_on(pool, taken, 64).fill_(1)
    view = output[8:]
    pool.invalidate(taken)
    for tensor in (output, view):
        with pytest.raises(RuntimeError, match=r"(?s)model.py:3 in f.*clone"):
            tensor + 1
    if taken.is_live():  # a CPU build of torch, which can't see all accesses, keeps the bytes for the rest
        assert not CAN_FORBID_ACCESS
        del output, view, tensor
    assert (output_on(pool, taken, 64).fill_(2) == 2).all()


def test_to_invalidate_an_output_twice_does_no_more(pool: OutputPool):
    """A CPU build of torch, which keeps the range taken, meets it again at the next step."""
    taken = pool.find_room(64, [])
    output = output_on(pool, taken, 64).fill_(1)
    pool.invalidate(taken)
    if taken.lent is not None:
        pool.invalidate(taken)
    with pytest.raises(RuntimeError, match=r"(?s)model.py:3 in f.*clone"):
        output + 1


def test_where_every_access_can_be_forbidden_the_range_is_free_at_once(
    pool: OutputPool, monkeypatch: pytest.MonkeyPatch
):
    """As with CUDA builds of torch; forbidding itself is left to what this build can do."""
    monkeypatch.setattr(output_pool, "CAN_FORBID_ACCESS", True)
    taken = pool.find_room(64, [])
    output = output_on(pool, taken, 64).fill_(1)
    forgotten = taken.lent
    assert forgotten is not None
    pool.invalidate(taken)
    assert not taken.is_live()
    assert pool.live.all() == []
    assert pool.holder(forgotten.storage) is None
    later = output_on(pool, taken, 64).fill_(2)
    assert pool.live.all() == [taken]
    assert taken.lent is not forgotten, "the storage of the output that was lost is lent to nobody"
    assert (later == 2).all()
    with pytest.raises(RuntimeError, match=r"model\.py:3 in f"):
        output + 1


def test_a_range_that_begins_before_a_new_one_is_listed_no_more_when_it_is_dead(pool: OutputPool):
    long, second = pool.find_room(3 * ALIGNMENT, []), pool.find_room(64, [(0, ALIGNMENT)])
    output_on(pool, long, 8)  # and dropped
    output = output_on(pool, second, 8)
    assert pool.live.all() == [second]
    assert pool.live.within((0, ALIGNMENT)) == []
    del output
    later = output_on(pool, long, 8)
    assert pool.live.all() == [long]
    del later
    assert pool.live.all() == []


def test_a_live_output_outlives_the_pool():
    pool = OutputPool(HostMemory())
    output = output_on(pool, pool.find_room(64, []), 64).fill_(7)
    del pool
    gc.collect()
    assert (output == 7).all()
