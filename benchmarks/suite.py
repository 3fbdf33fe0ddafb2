"""Runs jobs, each in a process of its own with a time limit, and writes what they found."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks import plots, rows, topics
from benchmarks.rows import Environment, Row
from cudagraph_backend.demo.page import align

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a topic went. ``problems`` are jobs that failed or were not run, and results that are wrong."""

    topic: str
    jobs: int
    seconds: float
    rows: tuple[Row, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Suite:
    """What to run, where, and until when (``time.monotonic``)."""

    device: str
    out: Path
    quick: bool
    where: Environment
    deadline: float

    def run(self, names: Sequence[str]) -> list[Outcome]:
        return [self.run_topic(name) for name in names]

    def run_topic(self, name: str) -> Outcome:
        topic = topics.load(name)
        began = time.monotonic()
        found: list[Row] = []
        problems: list[str] = []
        (self.out / f"{name}.log").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="benchmark") as folder:  # of caches, which a topic's jobs share
            for job in topic.JOBS:
                results, problem = self.run_job(name, job, topic.LIMIT_S, Path(folder))
                found += results
                problems += [problem] if problem else []
        problems += sorted({f"{row.way}, {row.case}: {row.note}" for row in found if row.note.startswith("failed")})
        wrong = sorted({f"{row.way}, {row.case}: off by {row.error:.1e} of the greatest" for row in found if row.wrong})
        if found:
            self.write(name, found)
        return Outcome(name, len(topic.JOBS), time.monotonic() - began, tuple(found), (*problems, *wrong))

    def run_job(self, topic: str, job: str, limit: float, folder: Path) -> tuple[list[Row], str]:
        """Its rows, and what went wrong ("" if nothing)."""
        left = self.deadline - time.monotonic()
        if left < 10:
            return [], f"{job}: not started, the time was up"
        print(f"{topic}: {job} …", end=" ", flush=True)
        began = time.monotonic()
        file = folder / "rows.json"
        file.unlink(missing_ok=True)
        status = self.run_process(topic, job, file, min(limit, left), str(folder))
        results = rows.read_json(file)[1] if file.exists() else []
        seconds = time.monotonic() - began
        print(f"{status or 'done'} ({seconds:.0f} s)", flush=True)
        return results, f"{job}: {status}" if status else ""

    def run_process(self, topic: str, job: str, file: Path, limit: float, folder: str) -> str:
        """Run a job; returns "" or what went wrong. Temporary files, caches among them, go to ``folder``."""
        command = [sys.executable, "-m", "benchmarks.job", topic, job, "--device", self.device, "--out", str(file)]
        command += ["--quick"] if self.quick else []
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": folder, **cache}
        with (self.out / f"{topic}.log").open("a", encoding="utf-8") as log:
            log.write(f"---- {job}\n")
            log.flush()
            with process_group(command, environment, log) as process:
                try:
                    status = process.wait(limit)
                except subprocess.TimeoutExpired:
                    return f"stopped after {limit:.0f} s"
        return "" if status == 0 else f"failed with exit status {status}, see {topic}.log"

    def write(self, name: str, found: Sequence[Row]) -> None:
        stem = self.out / f"{name}_{self.where.short_gpu}_{self.where.date}"
        rows.write_json(stem.with_suffix(".json"), self.where, found)
        rows.write_csv(stem.with_suffix(".csv"), self.where, found)
        try:
            plots.draw(stem.with_suffix(".png"), self.where, found)
        except ImportError:
            print(f"{name}: no plot, as matplotlib is not installed")


@contextlib.contextmanager
def process_group(
    command: Sequence[str], environment: dict[str, str], log: IO[Any] | int
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, so that its compile workers end with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_table(outcomes: Sequence[Outcome]) -> str:
    lines = [("topic", "time", "rows", "greatest error", "result")]
    for outcome in outcomes:
        errors = [row.error for row in outcome.rows if row.error is not None]
        verdict = f"{len(outcome.problems)} problems" if outcome.problems else "right"
        greatest = f"{max(errors):.1e}" if errors else "-"
        lines.append((outcome.topic, f"{outcome.seconds:.0f} s", str(len(outcome.rows)), greatest, verdict))
    problems = [f"{outcome.topic}: {problem}" for outcome in outcomes for problem in outcome.problems]
    return "\n".join([*align(lines), *problems])
