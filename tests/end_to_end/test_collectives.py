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
import os
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
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), (torch.arange(n * 2.0).view(n, 2) * 2 + 1) * 2 + 1)
        mine = torch.tensor([float(number)])
        dist.all_reduce(mine)  # answered by the other process's collective of the same number, or all is off
        assert mine.item() == 2 * number, f"rank {rank}, call {number}: got {mine.item()}"
"""
END = """
sg.reset()
dist.barrier()
dist.destroy_process_group()
print("done", flush=True)
os._exit(0)  # threads of gloo that are left may end the process while Python does ("terminate called")
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
def total(x):
    return funcol.all_reduce(x * 2, "sum", dist.group.WORLD) + 1 + 0 * x.median(0).values

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
options = {"verify": "capture"} if rank == 0 else {}
check(torch.compile(total, backend="sharedgraph", dynamic=True, options={**options, "capture_sizes": [2, 8]}),
      (8, 4, 6, 3, 8))
assert sg.stats().rows_padded > 0, sg.explain()
""",
    )


def test_a_process_that_has_no_graph_communicates_as_those_that_have(tmp_path):
    """It is padded in the plain runs of one process, too."""
    run(
        tmp_path,
        """
from cudagraph_backend.errors import CaptureError

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


def test_processes_that_have_met_other_sizes_choose_the_same_bucket(tmp_path):
    """One has a bucket of two dims that would do for what both send then; and it knows more sizes of the same code.

    At sizes that are buckets of their own it may be sent rows without padding, as the other process does here.
    """
    run(
        tmp_path,
        """
def both(shapes, call):
    for shape in shapes:
        for time in range(2):
            x = torch.arange(float(shape[0] * shape[1])).view(shape) / 100 + rank + time
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            torch.testing.assert_close(call(x), total(x))

def in_place(x):
    y = x * 2
    dist.all_reduce(y)
    return y + 1

for function in (total, in_place):
    compiled = torch.compile(function, backend="sharedgraph")
    both([(64, 80)], compiled if rank == 1 else function)
    both([(60, 61), (257, 70), (60, 78), (60, 61)], compiled)
    if rank == 0:
        sg.reset()
    both([(60, 62), (59, 62)], compiled)
stats = sg.stats()
assert stats.fallbacks == {} and stats.rows_padded > 0, sg.explain()
assert all(one.calls_in_existing == 0 for one in stats.padding), sg.explain()
""",
    )


def test_what_one_process_takes_for_fixed_no_other_pads(tmp_path):
    """For the second one Dynamo finds that a size changes, as it was called for a group of its own before."""
    run(
        tmp_path,
        """
alone = [dist.new_group([one]) for one in range(2)][rank]

def total(x, group):
    return funcol.all_reduce(x * 2, "sum", group) + 1

compiled = torch.compile(total, backend="sharedgraph")
if rank == 1:
    for n in (3, 4, 9):
        compiled(torch.ones(n, 2), alone)
for n in (5, 5, 5, 7, 7):
    x = torch.arange(n * 2.0).view(n, 2) + rank
    torch.testing.assert_close(compiled(x, dist.group.WORLD), total(x, dist.group.WORLD))
assert sg.stats().rows_padded == 0, sg.explain()
assert "mark the dim with torch._dynamo.mark_dynamic in all of them" in sg.explain(), sg.explain()
""",
    )


def test_a_tensor_parallel_model_is_padded(tmp_path):
    """Columns, then rows of a weight in each process; at last a gather of columns, and one of rows that is cut out."""
    run(
        tmp_path,
        """
torch.manual_seed(rank)
up, down, out = torch.randn(4, 6), torch.randn(6, 4), torch.randn(4, 3)

def model(x):
    x = funcol.all_reduce((x @ up).relu() @ down, "sum", dist.group.WORLD)
    return funcol.all_gather_tensor(x @ out, 1, dist.group.WORLD).softmax(-1)

def gathers_rows(x):
    return funcol.all_gather_tensor(x * 2, 0, dist.group.WORLD) + 1

def outcome(function, options):
    compiled = torch.compile(function, backend="sharedgraph", options=options)
    before = sg.stats().rows_padded
    for n in (5, 7, 30, 3, 17, 7, 2, 30):
        x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), function(x))
    return sg.stats().rows_padded > before

gather = {"uncapturable_ops": ["_c10d_functional::all_gather_into_tensor"]}
assert outcome(model, {}) and sg.stats().fallbacks == {}, sg.explain()
assert not outcome(gathers_rows, {}), sg.explain()
assert "padded rows come between the real rows of an output" in sg.explain(), sg.explain()
assert outcome(gathers_rows, gather), sg.explain()
""",
    )
