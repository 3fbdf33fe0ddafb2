"""What the demo says of its results: statistics, table, JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cudagraph_backend.demo import page, ways
from cudagraph_backend.demo.page import DemoResult
from cudagraph_backend.demo.ways import WayResult

STATS: dict[str, Any] = {
    "regions": 2,
    "graphs": 11,
    "captures": 11,
    "replays": 40,
    "fallbacks": {"above the largest bucket": 3},
    "rows_real": 90,
    "rows_padded": 10,
    "output_pool_bytes": 2048,
    "sum_of_buckets_bytes": 10240,
    "staging_bytes": 1,
    "memory_pool_bytes": 2,
}
EAGER = WayResult("eager", 1.5, (0.002, 0.001, 0.003), 0.0, 0)
OURS = WayResult("sharedgraph", 2.5, (0.001,), 3e-7, 11, stats=STATS, explanation="why")
RESULT = DemoResult("cpu", "a CPU", "minilm", "sentences", 3, 0, 2, (EAGER, OURS))


def off_by(error: float) -> DemoResult:
    return replace(RESULT, ways=(EAGER, replace(OURS, max_abs_error=error)))


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], q: float):
    assert ways.quantile(values, q) == pytest.approx(np.quantile(values, q), abs=1e-9)


def test_a_quantile_of_nothing_raises():
    with pytest.raises(ValueError, match="at least one value"):
        ways.quantile([], 0.5)


def test_median_and_p95_are_in_milliseconds():
    assert EAGER.median_ms == pytest.approx(2.0)
    assert EAGER.p95_ms == pytest.approx(2.9)


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (torch.tensor([1.0, 2.5]), 0.5),
        (torch.tensor([1.0, math.nan]), math.inf),
        (torch.tensor([1.0]), math.inf),
        (torch.tensor([1.0, 2.0], dtype=torch.float64), math.inf),
    ],
)
def test_max_abs_error_lets_nothing_wrong_pass(result: torch.Tensor, error: float):
    assert ways.max_abs_error(result, torch.tensor([1.0, 2.0])) == error


def test_empty_results_are_equal():
    assert ways.max_abs_error(torch.empty(0, 3), torch.empty(0, 3)) == 0.0


def test_the_data_survive_json_and_name_what_was_asked_for():
    data = json.loads(json.dumps(page.as_data(RESULT), allow_nan=False))
    assert data["stats"] == STATS
    assert (data["device"], data["device_name"], data["torch"]) == ("cpu", "a CPU", torch.__version__)
    assert (data["model"], data["requests"], data["max_abs_error"]) == ("minilm", 3, 3e-7)
    assert data["within_tolerance"] is True
    assert [way["name"] for way in data["ways"]] == ["eager", "sharedgraph"]
    keys = {"name", "first_pass_s", "median_ms", "p95_ms", "max_abs_error", "captures", "device_memory_bytes"}
    assert all(set(way) == keys for way in data["ways"])


@pytest.mark.parametrize(("error", "within"), [(1e-4, True), (1.1e-4, False), (math.inf, False)])
def test_the_tolerance_decides(error: float, within: bool):
    result = off_by(error)
    assert result.within_tolerance is within
    assert ("WRONG" in page.as_text(result)) is not within


def test_an_infinite_error_is_null_in_json():
    data = page.as_data(off_by(math.inf))
    assert data["max_abs_error"] is data["ways"][1]["max_abs_error"] is None
    assert data["within_tolerance"] is False


def test_without_sharedgraph_nothing_is_claimed_of_it():
    result = replace(RESULT, ways=(EAGER,))
    assert page.as_data(result)["stats"] is None
    assert page.as_text(result).endswith("sharedgraph was not run")


def test_the_text_gives_graphs_memory_padding_and_fallbacks():
    text = page.as_text(RESULT)
    assert "11 in 2 regions, 40 replays" in text
    assert "2.0 KiB, inputs included, instead of 10.0 KiB with one output per bucket (5.0 × as much)" in text
    assert "10.0% of the sentences that ran" in text
    assert "3 × above the largest bucket" in text


def test_a_pool_without_bytes_is_compared_with_nothing():
    stats = {**STATS, "output_pool_bytes": 0}
    text = page.as_text(replace(RESULT, ways=(EAGER, replace(OURS, stats=stats))))
    assert "0 B, inputs included\n" in text


def test_columns_are_aligned():
    assert page.align([["way", "median"], ["a", "10"], ["longer", "1"]]) == [
        "way     median",
        "--------------",
        "a           10",
        "longer       1",
    ]


def test_gpu_memory_has_a_column_only_if_it_was_measured():
    assert "GPU memory" not in page.way_table([EAGER])[0]
    measured = page.way_table([replace(EAGER, device_memory_bytes=3 << 20)])
    assert measured[0].endswith("GPU memory")
    assert measured[2].endswith("3.0 MiB")


def test_padded_share_of_no_rows_is_nought():
    assert page.padded_share({"rows_real": 0, "rows_padded": 0}) == 0.0
    assert page.padded_share(STATS) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_format_bytes(count: int | None, text: str):
    assert page.format_bytes(count) == text


def test_the_devices_name_says_how_many_threads():
    assert page.device_name(torch.device("cpu")).split(", ")[-1].startswith(f"{torch.get_num_threads()} thread")


def test_a_machine_without_a_description_has_a_name_too(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **kwargs: Any) -> str:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(page.Path, "read_text", fail)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert page.device_name(torch.device("cpu")) == "CPU, 1 thread"


def test_a_gpu_is_named_as_torch_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, number {device.index}")
    assert page.device_name(torch.device("cuda", 1)) == "a GPU, number 1"


def test_free_memory_is_asked_for_when_everything_is_given_back(monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []
    free = iter([1000, 700])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: called.append("wait"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (called.append("ask"), (next(free), 2000))[1])
    device = torch.device("cuda", 0)
    before = ways._free_memory(device)
    assert called == ["empty", "wait", "ask"]
    assert ways._taken(before, device) == 300
