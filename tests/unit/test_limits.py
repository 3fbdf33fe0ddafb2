"""Limits on what is remembered: it is forgotten all at once when there is too much of it, and remembered anew."""

from __future__ import annotations

from dataclasses import replace

from cudagraph_backend.drivers.host import HostMemory
from cudagraph_backend.memory.output_pool import OutputPool
from cudagraph_backend.runtime.finder import Finder
from cudagraph_backend.runtime.limits import LIMITS, Admission


def test_sizes_from_data_are_met_for_the_first_time_once():
    admission = Admission(replace(LIMITS, sizes_remembered=2), sizes_from_data=True)
    assert [admission.is_met_once((n,)) for n in (5, 5, 7, 5, 7)] == [True, False, True, False, False]
    assert [admission.is_met_once((n,)) for n in (9, 9, 5)] == [True, False, True]  # 5 was forgotten for 9
    assert not Admission(LIMITS, sizes_from_data=False).is_met_once((5,))


def test_addresses_are_put_off_once_after_many_captures_without_use():
    admission = Admission(replace(LIMITS, unused_captures=3, places=2), sizes_from_data=False)
    assert not admission.is_put_off((8,), "a")
    admission.unused[8,] = 3
    assert [admission.is_put_off((8,), where) for where in "aabab"] == [True, False, True, False, False]
    assert [admission.is_put_off((8,), where) for where in "cca"] == [True, False, True]  # a was forgotten for c
    assert not admission.is_put_off((16,), "d")


def test_an_input_that_keeps_moving_is_read_where_it_is_met_often():
    finder = Finder(OutputPool(HostMemory()), replace(LIMITS, found_often=2, found_remembered=3))
    assert [finder._few((8,), 0, offset, 1) for offset in (0, 512, 512, 512)] == [0, None, None, 512]
    assert [finder._few((8,), 0, offset, 1) for offset in (1024, 1536)] == [None, None]  # four are remembered now
    assert finder._few((8,), 0, 512, 1) == 512, "counting starts anew, with this one as the first"
    assert finder._few((8,), 0, 0, 1) is None
