"""The output pool: ranges never overlap, live bytes never change, and moved outputs keep their values."""

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
from cudagraph_backend.output_pool import ALIGNMENT, Loan, OutputPool, OutputRange, can_move_out

LOAN = Loan("region 0 (inference)", ((0, 0, 64),), (1, 0))
sizes = st.integers(0, 3 * ALIGNMENT)
needs_move = pytest.mark.skipif(not can_move_out(), reason="this torch can't exchange the memory of storages")


def output_on(taken: OutputRange, nbytes: int) -> torch.Tensor:
    """A tensor as a call returns it: on the range's storage, and no view of the range's own tensor."""
    storage = taken.lend(nbytes, LOAN)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (nbytes,), (1,))


@pytest.fixture
def pool() -> OutputPool:
    return OutputPool(HostMemory())


@dataclass
class Kept:
    """A tensor that the user holds: its range, its values, and whether it was moved out."""

    taken: OutputRange
    tensor: torch.Tensor
    values: torch.Tensor
    moved: bool = False


class PoolMachine(RuleBasedStateMachine):
    """Outputs are lent, kept, viewed, dropped and moved out while ranges come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = OutputPool(HostMemory())
        self.held: list[OutputRange] = []
        self.freed: list[OutputRange] = []
        self.kept: list[Kept] = []
        self.nbytes = 0

    def live(self, taken: OutputRange) -> bool:
        return any(k.taken is taken and not k.moved for k in self.kept)

    def draw_range(self, data: st.DataObject) -> OutputRange:
        return self.held[data.draw(st.integers(0, len(self.held) - 1))]

    @rule(nbytes=sizes)
    def allocate(self, nbytes: int) -> None:
        self.held.append(self.pool.allocate(nbytes))
        assert self.held[-1].nbytes >= nbytes
        assert not self.held[-1].is_live()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=sizes)
    def extend(self, data: st.DataObject, more: int) -> None:
        taken = self.draw_range(data)
        before, need = taken.nbytes, taken.nbytes + more
        if self.pool.extend(taken, need):
            assert taken.nbytes >= need
        else:
            assert taken.nbytes == before

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        taken = self.draw_range(data)
        self.held.remove(taken)
        self.freed.append(taken)
        self.pool.free([taken])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), byte=st.integers(0, 255))
    def write_and_lend(self, data: st.DataObject, byte: int) -> None:
        taken = self.draw_range(data)
        if self.live(taken):
            return
        nbytes = data.draw(st.integers(1, taken.nbytes))
        taken.bytes(nbytes).fill_(byte)
        output = output_on(taken, nbytes)
        self.kept.append(Kept(taken, output, torch.full((nbytes,), byte, dtype=torch.uint8)))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def view(self, data: st.DataObject) -> None:
        of = self.kept[data.draw(st.integers(0, len(self.kept) - 1))]
        half = of.values.numel() // 2
        self.kept.append(Kept(of.taken, of.tensor[half:], of.values[half:], of.moved))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.kept[data.draw(st.integers(0, len(self.kept) - 1))]

    @precondition(lambda self: can_move_out() and any(not k.moved for k in self.kept))
    @rule(data=st.data())
    def move_out(self, data: st.DataObject) -> None:
        taken = data.draw(st.sampled_from([k.taken for k in self.kept if not k.moved]))
        taken.move_out()
        for kept in self.kept:
            kept.moved |= kept.taken is taken
        assert taken.loan is None

    @rule()
    def poison_what_is_dead(self) -> None:
        for dead in self.pool.dead_ranges():
            dead.bytes(dead.nbytes).fill_(0xFF)

    @invariant()
    def kept_tensors_have_their_values(self) -> None:
        for kept in self.kept:
            assert torch.equal(kept.tensor, kept.values)

    @invariant()
    def liveness_is_that_of_the_tensors(self) -> None:
        for taken in self.held + self.freed:
            assert taken.is_live() == self.live(taken)

    @invariant()
    def ranges_in_use_never_overlap(self) -> None:
        used = self.held + [taken for taken in self.freed if self.live(taken)]
        ends = [0]
        for taken in sorted(used, key=lambda r: r.offset):
            assert taken.offset >= ends[-1]
            assert taken.offset % ALIGNMENT == 0
            ends.append(taken.offset + taken.nbytes)
        assert ends[-1] <= self.pool.nbytes

    @invariant()
    def the_pool_never_shrinks(self) -> None:
        assert self.pool.nbytes >= self.nbytes
        self.nbytes = self.pool.nbytes

    @invariant()
    def every_address_leads_to_its_range(self) -> None:
        for taken in self.held + [taken for taken in self.freed if self.live(taken)]:
            for inside in (0, taken.nbytes - 1):
                assert self.pool.find(self.pool._memory.address + taken.offset + inside) is taken


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_ranges_are_aligned_and_follow_each_other(pool: OutputPool):
    ranges = [pool.allocate(n) for n in (1, ALIGNMENT, ALIGNMENT + 1, 0)]
    assert [(r.offset, r.nbytes) for r in ranges] == [
        (0, ALIGNMENT),
        (ALIGNMENT, ALIGNMENT),
        (2 * ALIGNMENT, 2 * ALIGNMENT),
        (4 * ALIGNMENT, ALIGNMENT),
    ]
    assert pool.nbytes == 5 * ALIGNMENT


def test_the_first_gap_that_is_large_enough_is_reused(pool: OutputPool):
    ranges = [pool.allocate(n * ALIGNMENT) for n in (1, 1, 3, 1)]
    pool.free([ranges[0], ranges[2]])
    assert pool.allocate(2 * ALIGNMENT).offset == ranges[2].offset
    assert pool.allocate(ALIGNMENT).offset == 0
    assert pool.allocate(ALIGNMENT).offset == ranges[2].offset + 2 * ALIGNMENT
    assert pool.nbytes == 6 * ALIGNMENT


def test_a_range_that_is_freed_while_live_is_reused_when_it_is_dead(pool: OutputPool):
    taken = pool.allocate(64)
    output = output_on(taken, 64).fill_(3)
    pool.free([taken])
    assert pool.allocate(64).offset != taken.offset
    assert (output == 3).all()
    del output
    assert pool.allocate(64).offset == taken.offset


def test_a_live_range_stays_when_others_that_were_freed_with_it_are_dropped(pool: OutputPool):
    dead, live = pool.allocate(64), pool.allocate(64)
    output = output_on(live, 64).fill_(3)
    pool.free([dead, live])
    assert [pool.allocate(64).offset for _ in range(2)] == [dead.offset, 2 * ALIGNMENT]
    assert pool.find(output.data_ptr()) is live
    del output
    assert pool.allocate(64).offset == live.offset


def test_extending_needs_room_behind(pool: OutputPool):
    first, second = pool.allocate(1), pool.allocate(1)
    assert not pool.extend(first, 2 * ALIGNMENT)
    assert first.nbytes == ALIGNMENT
    assert pool.extend(second, 2 * ALIGNMENT)
    assert (second.nbytes, pool.nbytes) == (2 * ALIGNMENT, 3 * ALIGNMENT)


def test_extending_takes_the_room_of_a_dead_range_and_not_of_a_live_one(pool: OutputPool):
    first, second = pool.allocate(1), pool.allocate(1)
    output = output_on(second, 8)
    pool.free([second])
    assert not pool.extend(first, 2 * ALIGNMENT)
    del output
    assert pool.extend(first, 2 * ALIGNMENT)
    assert first.offset + first.nbytes == 2 * ALIGNMENT


def test_a_live_range_grows_where_it_stands(pool: OutputPool):
    taken = pool.allocate(64)
    output = output_on(taken, 64).fill_(5)
    address = output.data_ptr()
    assert pool.extend(taken, 8 * ALIGNMENT)
    assert output.data_ptr() == address
    assert taken.is_live()
    assert (output == 5).all()


class FullMemory(HostMemory):
    """Has room for 1 KiB."""

    def grow(self, nbytes: int) -> None:
        if nbytes > 1024:
            raise torch.OutOfMemoryError("full")
        super().grow(nbytes)


def test_a_full_device_leaves_the_pool_as_it_was():
    pool = OutputPool(FullMemory())
    taken = pool.allocate(512)
    with pytest.raises(torch.OutOfMemoryError):
        pool.allocate(1024)
    with pytest.raises(torch.OutOfMemoryError):
        pool.extend(taken, 2048)
    assert (taken.nbytes, pool.nbytes) == (512, 512)
    assert pool.allocate(512).offset == 512


def test_outputs_lie_in_the_pooled_tensor(pool: OutputPool):
    pool.allocate(1)
    taken = pool.allocate(64)
    output = output_on(taken, 64)
    output.copy_(torch.arange(64))
    assert output.data_ptr() == pool.tensor.data_ptr() + taken.offset
    assert torch.equal(pool.tensor[taken.offset : taken.offset + 64], output)
    assert pool.tensor.nbytes == pool.nbytes


def test_the_pool_does_not_move_when_it_grows(pool: OutputPool):
    pool.allocate(1)
    address = pool.tensor.data_ptr()
    pool.allocate(1 << 20)
    assert pool.tensor.data_ptr() == address


def test_storages_are_made_once_per_size(pool: OutputPool):
    taken = pool.allocate(64)
    seen = {taken.lend(nbytes, LOAN)._cdata for nbytes in (64, 32, 64, 32)}
    assert len(seen) == 2
    assert taken.lend(32, LOAN).nbytes() == 32


def test_bytes_and_lent_storage_are_the_same_memory(pool: OutputPool):
    taken = pool.allocate(64)
    output = output_on(taken, 16)
    taken.bytes(64).fill_(9)
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
    taken = pool.allocate(64)
    assert not taken.is_live()
    output = output_on(taken, 64)
    kept = HOLDERS[holder](output)
    del output
    assert taken.is_live()
    del kept
    assert not taken.is_live()


def test_an_output_saved_for_backward_is_alive(pool: OutputPool):
    taken = pool.allocate(16)
    output = torch.empty(0).set_(taken.lend(16, LOAN), 0, (4,), (1,)).fill_(3.0)
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * output).sum()
    del output
    assert taken.is_live()
    loss.backward()
    del loss
    assert not taken.is_live()
    assert torch.equal(weight.grad, torch.full((4,), 3.0))


def test_a_range_knows_its_loan_and_the_tensors_on_it(pool: OutputPool):
    taken, other = pool.allocate(64), pool.allocate(64)
    output = output_on(taken, 64)
    assert taken.loan == LOAN
    assert taken.is_lent_to(output)
    assert taken.is_lent_to(output[3:])
    assert not taken.is_lent_to(output_on(other, 64))
    assert not taken.is_lent_to(output.clone())


def test_addresses_outside_of_all_ranges_lead_nowhere(pool: OutputPool):
    first, second = pool.allocate(1), pool.allocate(1)
    start = pool.tensor.data_ptr()
    assert pool.find(start + second.offset) is second
    pool.free([first])
    pool.extend(second, 2 * ALIGNMENT)  # ranges that are dead are dropped here
    assert pool.find(start + 2 * ALIGNMENT) is second
    assert pool.find(start) is None
    assert pool.find(start + ALIGNMENT - 1) is None
    assert pool.find(start - 1) is None
    assert pool.find(start + pool.nbytes) is None
    assert pool.find(0) is None


def test_the_address_of_a_live_output_leads_to_its_range_after_that_is_freed(pool: OutputPool):
    taken = pool.allocate(64)
    output = output_on(taken, 64)
    pool.free([taken])
    neighbour = pool.allocate(64)
    assert pool.find(output.data_ptr()) is taken
    assert taken.is_lent_to(output)
    address = output.data_ptr()
    del output
    again = pool.allocate(64)
    assert pool.find(address) is again
    assert pool.find(address + ALIGNMENT) is neighbour


def test_freeing_looks_at_no_range(pool: OutputPool, monkeypatch: pytest.MonkeyPatch):
    """A finaliser frees ranges at any time, in the midst of a change of the pool's ranges too."""
    taken, known = pool.allocate(64), pool._ranges
    with monkeypatch.context() as patch:
        patch.setattr(OutputRange, "is_live", lambda self: pytest.fail("looked at"))
        pool.free([taken])
    assert pool._ranges is known
    assert known == [taken]
    assert pool.allocate(64).offset == taken.offset
    assert len(pool._ranges) == 1


@needs_move
def test_a_moved_output_takes_its_views_along(pool: OutputPool):
    taken = pool.allocate(64)
    output = torch.empty(0).set_(taken.lend(64, LOAN), 0, (4, 4), (4, 1))
    output.copy_(torch.arange(16.0).view(4, 4))
    column, expected = output.t()[1], output.clone()
    taken.move_out()
    taken.bytes(64).fill_(0xFF)
    assert torch.equal(output, expected)
    assert torch.equal(column, expected[:, 1])
    output[0, 1] = 50.0
    assert column[0] == 50.0
    assert pool.find(output.data_ptr()) is None


@needs_move
def test_after_moving_out_the_range_is_free_and_can_be_lent_again(pool: OutputPool):
    taken = pool.allocate(64)
    first = output_on(taken, 64).fill_(1)
    address = first.data_ptr()
    taken.move_out()
    assert not taken.is_live()
    assert taken.loan is None
    assert not taken.is_lent_to(first)
    second = output_on(taken, 64).fill_(2)
    assert second.data_ptr() == address
    assert (first == 1).all()
    taken.move_out()
    assert ((first == 1) & (second == 2)).sum() == 64


@needs_move
def test_an_output_moved_in_inference_mode_can_be_used_outside_of_it(pool: OutputPool):
    taken = pool.allocate(16)
    with torch.inference_mode():
        output = torch.empty(0).set_(taken.lend(16, LOAN), 0, (4,), (1,)).fill_(2.0)
        taken.move_out()
        taken.lend(16, LOAN)
    taken.bytes(16).fill_(0xFF)
    assert not taken.bytes(16).is_inference()
    assert torch.equal(output, torch.full((4,), 2.0))


def test_a_live_output_outlives_the_pool():
    pool = OutputPool(HostMemory())
    output = output_on(pool.allocate(64), 64).fill_(7)
    del pool
    gc.collect()
    assert (output == 7).all()
