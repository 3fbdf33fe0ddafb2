"""The study of shared executables, on made-up numbers: what could be shared, and what that saves and costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.micro_executables import MIB, Executable, Switch, main, summarise, told

EXECUTABLES = [Executable(size, 97, mib * MIB, 1e-3, 0, 1e-4) for size, mib in ((8, 2), (16, 3), (32, 4), (64, 5))]


def works(start: int, end: int, extra_us: float = 10.0) -> Switch:
    return Switch(start, end, "SUCCESS", 9.0, 5.0 + extra_us, 5.0, 40.0 + 2 * extra_us, 40.0, 0.0)


def fails(start: int, end: int) -> Switch:
    return Switch(start, end, "ERROR_TOPOLOGY_CHANGED")


def test_sizes_share_as_far_as_updates_succeed_both_ways():
    switches = [
        works(8, 16, 10),
        works(16, 8, 20),
        fails(16, 32),
        works(32, 16, 90),
        works(32, 64, 30),
        works(64, 32, 40),
    ]
    summary = summarise(EXECUTABLES[::-1], switches)
    assert summary.groups == ((8, 16), (32, 64))
    assert (summary.executables, summary.separate_bytes, summary.shared_bytes) == (4, 14 * MIB, (3 + 5) * MIB)
    assert summary.switch_host_us == pytest.approx(30.0)
    assert summary.switch_wall_us == pytest.approx(60.0)
    text = told(EXECUTABLES, switches, summary)
    assert "4 executables of 14.00 MiB could be 2 of 8.00 MiB (8, 16; 32, 64)." in text
    assert "Saved: 6.00 MiB. Lost per switch: 30.0 µs of host time, 60.0 µs until" in text
    assert "ERROR_TOPOLOGY_CHANGED" in text


@pytest.mark.parametrize("error", [5.0, float("nan")])
def test_an_update_that_leaves_another_result_is_none(error: float):
    switches = [works(8, 16), dataclasses.replace(works(16, 8), error=error)]
    assert summarise(EXECUTABLES[:2], switches).groups == ((8,), (16,))


def test_nothing_can_be_shared():
    summary = summarise(EXECUTABLES[:2], [fails(8, 16), fails(16, 8)])
    assert summary.groups == ((8,), (16,))
    assert summary.shared_bytes == summary.separate_bytes == 5 * MIB
    assert "Saved: 0.00 MiB. Lost per switch: ? µs" in told(EXECUTABLES[:2], [], summary)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "sees no CUDA GPU here" in capsys.readouterr().err
