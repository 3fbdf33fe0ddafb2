"""The results of a demo as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cudagraph_backend.demo.ways import EAGER, WayResult

TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class DemoResult:
    """One run of the demo.

    Attributes:
        unit: what one row of a batch is, in the plural.
        distinct_shapes: how many input shapes the stream had.
    """

    device: str
    device_name: str
    model: str
    unit: str
    requests: int
    seed: int
    distinct_shapes: int
    ways: tuple[WayResult, ...]

    @property
    def sharedgraph(self) -> WayResult | None:
        return next((way for way in self.ways if way.name == "sharedgraph"), None)

    @property
    def within_tolerance(self) -> bool:
        """False only if sharedgraph ran and one of its results was off."""
        return self.sharedgraph is None or self.sharedgraph.max_abs_error <= TOLERANCE


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {_counted(threads, 'thread')}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def as_data(result: DemoResult) -> dict[str, Any]:
    """Return what ``--json`` writes. An error that is not finite is ``None``: JSON has no infinity."""
    ours = result.sharedgraph
    return {
        "device": result.device,
        "device_name": result.device_name,
        "torch": torch.__version__,
        "model": result.model,
        "requests": result.requests,
        "seed": result.seed,
        "distinct_shapes": result.distinct_shapes,
        "tolerance": TOLERANCE,
        "within_tolerance": result.within_tolerance,
        "max_abs_error": _finite(ours.max_abs_error) if ours else None,
        "stats": ours.stats if ours else None,
        "ways": [_way_as_data(way) for way in result.ways],
    }


def _way_as_data(way: WayResult) -> dict[str, Any]:
    return {
        "name": way.name,
        "first_pass_s": way.first_pass_s,
        "median_ms": way.median_ms,
        "p95_ms": way.p95_ms,
        "max_abs_error": _finite(way.max_abs_error),
        "captures": way.captures,
        "device_memory_bytes": way.device_memory_bytes,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_text(result: DemoResult) -> str:
    """Return what the demo prints."""
    head = [
        f"{result.model}, {result.requests} requests of changing size ({result.distinct_shapes} input shapes), fp32",
        f"{result.device_name}, torch {torch.__version__}",
        "",
    ]
    return "\n".join([*head, *way_table(result.ways), "", *sharedgraph_lines(result), verdict(result)])


def way_table(ways: Sequence[WayResult]) -> list[str]:
    """Return one line per way; the column for GPU memory is there only if it was measured."""
    memory = any(way.device_memory_bytes is not None for way in ways)
    header = ["way", "median", "p95", "first pass", "captures", "max error", *(["GPU memory"] if memory else [])]
    rows = [header]
    for way in ways:
        row = [
            way.name,
            f"{way.median_ms:.2f} ms",
            f"{way.p95_ms:.2f} ms",
            f"{way.first_pass_s:.1f} s" if way.name != EAGER.name else "-",
            str(way.captures),
            f"{way.max_abs_error:.1e}" if way.name != EAGER.name else "reference",
        ]
        rows.append([*row, format_bytes(way.device_memory_bytes)] if memory else row)
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns to equal width: the first to the left, all others to the right; a rule goes under the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def sharedgraph_lines(result: DemoResult) -> list[str]:
    """Return what sharedgraph did: graphs, memory of the outputs, padding, fallbacks."""
    way = result.sharedgraph
    if way is None or way.stats is None:
        return []
    stats = way.stats
    pooled, apart = stats["output_pool_bytes"], stats["sum_of_buckets_bytes"]
    fallbacks = ", ".join(f"{count} × {reason}" for reason, count in stats["fallbacks"].items())
    rows = [
        ("graphs", f"{stats['graphs']} in {_counted(stats['regions'], 'region')}, {stats['replays']} replays"),
        ("output pool", f"{format_bytes(pooled)}, inputs included{_instead_of(pooled, apart)}"),
        ("padded rows", f"{padded_share(stats):.1%} of the {result.unit} that ran"),
        ("fallbacks", fallbacks or "none"),
    ]
    return [f"{label:<15}{text}" for label, text in rows]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _instead_of(pooled: int, apart: int) -> str:
    if not pooled:
        return ""
    return f", instead of {format_bytes(apart)} with one output per bucket ({apart / pooled:.1f} × as much)"


def padded_share(stats: dict[str, Any]) -> float:
    """Return padded rows as a share of all rows that ran."""
    rows = stats["rows_real"] + stats["rows_padded"]
    return stats["rows_padded"] / rows if rows else 0.0


def verdict(result: DemoResult) -> str:
    """Return whether the results can be trusted, in one line."""
    way = result.sharedgraph
    if way is None:
        return "sharedgraph was not run"
    off = f"{way.max_abs_error:.1e}"
    if result.within_tolerance:
        return f"{'results':<15}every one equals eager's within {TOLERANCE:g} (greatest difference {off})"
    return f"{'results':<15}WRONG: they differ from eager's by up to {off}, more than {TOLERANCE:g}"


def format_bytes(count: int | None) -> str:
    """Return the bytes in the unit that leaves one to four digits before the point."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
