"""Regions that communicate: every call does so exactly once, on every process, whatever one of them measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

pytestmark = pytest.mark.slow

PROCESSES = 2
START = """
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import torch._inductor.config as inductor

import cudagraph_backend as sg
from cudagraph_backend.drivers.host import HostDriver

if hasattr(inductor, "fallback_by_default"):
    inductor.fallback_by_default = True  # quick to compile
inductor.compile_threads = 1

rank = int(sys.argv[1])
dist.init_process_group(
    "gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
HostDriver.poison = True


def total(x):
    return funcol.all_reduce(x * 2, "sum", dist.group.WORLD) + 1


def check(compiled, sizes):
    for number, n in enumerate(sizes):
        x = torch.arange(n * 2.0).view(n, 2) + rank
        torch.testing.assert_close(compiled(x), (torch.arange(n * 2.0).view(n, 2) * 2 + 1) * 2 + 1)
        mine = torch.tensor([float(number)])
        dist.all_reduce(mine)  # answered by the other process's collective of the same number, or all is off
        assert mine.item() == 2 * number, f"rank {rank}, call {number}: got {mine.item()}"
"""
END = """
sg.reset()
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def run(tmp_path: Path, program: str) -> None:
    """``program`` in each of the processes, which must come to its end."""
    command = [sys.executable, "-c", START + program + END]
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=240)[0].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [text.split()[-1] for text in said] == ["done"] * PROCESSES, "\n".join(said)


def test_this_build_of_torch_has_collectives():
    assert distributed.is_gloo_available()


def test_no_measurement_runs_a_collective_again(tmp_path):
    """What replaces the driver's clock is what a GPU's does: it runs the call. It differs between the processes."""
    run(
        tmp_path,
        """
count = 0

def seconds(self, run):
    global count
    run()
    count += 1
    return 1.0 if rank == 0 and count % 2 == 0 else 2.0

HostDriver.seconds = seconds
check(torch.compile(total, backend="sharedgraph", dynamic=True), (8, 4, 6, 3, 8))
assert sg.stats().replays == 5 and sg.stats().fallbacks == {}
""",
    )


def test_no_probe_runs_a_collective_again(tmp_path):
    """One process asks for it, the other one does not."""
    run(
        tmp_path,
        """
options = {"pad": "probe"} if rank == 0 else {"pad": "off"}
check(torch.compile(total, backend="sharedgraph", dynamic=True, options={**options, "capture_sizes": [2, 8]}),
      (8, 4, 6, 3, 8))
assert rank == 1 or "no probe: the region communicates with other processes" in sg.explain(), sg.explain()
""",
    )


def test_a_proof_is_not_verified_by_running_a_collective_again(tmp_path):
    run(
        tmp_path,
        """
from cudagraph_backend.padding import Fact, padding_rule

padding_rule("_c10d_functional::all_reduce", "_c10d_functional::wait_tensor")(lambda call: call.keep(Fact.REPLICA))
options = {"verify": "capture"} if rank == 0 else {}
check(torch.compile(total, backend="sharedgraph", dynamic=True, options={**options, "capture_sizes": [2, 8]}),
      (8, 4, 6, 3, 8))
assert sg.stats().rows_padded > 0, sg.explain()
""",
    )


def test_a_process_that_has_no_graph_communicates_as_those_that_have(tmp_path):
    """With a rule of the user's for the collective it is padded: in the plain runs of one process, too."""
    run(
        tmp_path,
        """
from cudagraph_backend.errors import CaptureError
from cudagraph_backend.padding import Fact, padding_rule

padding_rule("_c10d_functional::all_reduce", "_c10d_functional::wait_tensor")(lambda call: call.keep(Fact.REPLICA))
captures = HostDriver.capture
allowed = 1

def capture(self, run, **kwargs):
    global allowed
    allowed -= 1
    if rank == 1 and allowed < 0:
        raise CaptureError("no memory") from torch.OutOfMemoryError("no memory")
    return captures(self, run, **kwargs)

HostDriver.capture = capture
check(torch.compile(total, backend="sharedgraph", dynamic=True, options={"capture_sizes": [8, 16]}),
      (5, 7, 11, 13, 6, 9, 16))
stats = sg.stats()
assert stats.rows_padded > 0, sg.explain()
assert bool(stats.fallbacks) == (rank == 1), sg.explain()
""",
    )
