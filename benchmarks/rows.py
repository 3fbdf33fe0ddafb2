"""The record of one result, of where it was measured, and their CSV and JSON files."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LEFT_OUT = "left out"  # the metric of a row that says why there is no result


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and when something was measured."""

    gpu: str
    driver: str
    torch: str
    triton: str
    python: str
    commit: str
    date: str

    @property
    def short_gpu(self) -> str:
        """For file names: ``h100`` for "NVIDIA H100 80GB HBM3"."""
        words = [word for word in self.gpu.lower().split() if word not in ("nvidia", "tesla", "geforce")]
        return "".join(character for character in words[0] if character.isalnum()) if words else "unknown"


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes:
        case: what was run, where a topic has several; ``way``: how.
        median, p20, p80: of ``samples`` measurements; ``None`` in a row that only says why there are none.
        step: the position in a series, for plots; ``None`` for a result that belongs in a table.
        error: the greatest difference from eager, as a share of eager's greatest number; wrong above ``tolerance``.
    """

    topic: str
    case: str
    way: str
    metric: str
    unit: str
    median: float | None
    p20: float | None = None
    p80: float | None = None
    samples: int = 1
    step: int | None = None
    error: float | None = None
    tolerance: float | None = None
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        return self.error is not None and self.tolerance is not None and not self.error <= self.tolerance


def environment(device: str, commit: str | None) -> Environment:
    """Of this machine. ``commit`` is for copies of the repository without its history."""
    on_gpu = device == "cuda"
    return Environment(
        gpu=torch.cuda.get_device_name() if on_gpu else "CPU",
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        torch=torch.__version__,
        triton=_triton_version() if on_gpu else "",
        python=platform.python_version(),
        commit=commit or _first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        date=datetime.date.today().isoformat(),
    )


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"


def left_out(topic: str, case: str, way: str, why: str) -> Row:
    return Row(topic, case, way, LEFT_OUT, "", None, samples=0, note=why)


def as_data(row: Row) -> dict[str, Any]:
    """JSON has no infinity: an error that is not finite becomes ``None``, and ``wrong`` still tells."""
    data = dataclasses.asdict(row) | {"wrong": row.wrong}
    if row.error is not None and not math.isfinite(row.error):
        data["error"] = None
    return data


def from_data(data: Mapping[str, Any]) -> Row:
    fields = {name: value for name, value in data.items() if name != "wrong"}
    if data["wrong"] and fields["error"] is None:
        fields["error"] = math.inf
    return Row(**fields)


def write_json(file: Path, where: Environment | None, rows: Sequence[Row]) -> None:
    data = {"environment": dataclasses.asdict(where) if where else None, "rows": [as_data(row) for row in rows]}
    file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> tuple[Environment | None, list[Row]]:
    data = json.loads(file.read_text(encoding="utf-8"))
    where = Environment(**data["environment"]) if data["environment"] else None
    return where, [from_data(row) for row in data["rows"]]


def read_folder(folder: Path) -> list[tuple[Path, Environment, list[Row]]]:
    """All results in a folder; other JSON files there are passed over."""
    results = []
    for file in sorted(folder.glob("*.json")):
        if "environment" in json.loads(file.read_text(encoding="utf-8")):
            where, found = read_json(file)
            results += [(file, where, found)] if where else []
    return results


def write_csv(file: Path, where: Environment, rows: Sequence[Row]) -> None:
    """Every line says where it was measured, so that files of several machines may be joined."""
    places = dataclasses.asdict(where)
    columns = [each.name for each in dataclasses.fields(Row)] + ["wrong", *places]
    with file.open("w", encoding="utf-8", newline="") as target:
        writer = csv.DictWriter(target, columns)
        writer.writeheader()
        for row in rows:
            settings = "; ".join(f"{name}={value}" for name, value in row.settings.items())
            writer.writerow({**as_data(row), "settings": settings, **places})
