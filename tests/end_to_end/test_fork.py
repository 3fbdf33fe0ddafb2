"""A forked child starts anew: it never waits for a thread that it does not have, nor writes to the parent's memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PARENT = """
import os, sys, threading, time, traceback
import torch
import cudagraph_backend as sg

def in_child(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, f"the child failed: {status}"
            return
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")

def check(compiled, n, expected):
    x = torch.randn(n, 4)
    torch.testing.assert_close(compiled(x), expected(x))

torch.set_grad_enabled(False)
compiled = torch.compile(lambda x: x.sin() * 2, backend="sharedgraph")
expected = lambda x: x.sin() * 2
for n in (3, 5, 3):
    check(compiled, n, expected)
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", PARENT + script], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


def test_a_fork_while_another_thread_is_inside_a_call():
    run("""
entered, leave = threading.Event(), threading.Event()

@torch.library.custom_op("sharedgraph_fork::wait", mutates_args=())
def wait(x: torch.Tensor) -> torch.Tensor:
    if entered.is_set() is False and threading.current_thread() is not threading.main_thread():
        entered.set()
        leave.wait()
    return x * 2

wait.register_fake(torch.empty_like)
slow = torch.compile(lambda x: wait(x) + 1, backend="sharedgraph")
for n in (3, 5, 3):
    check(slow, n, lambda x: x * 2 + 1)
kept, results = torch.randn(5, 4), []

def call():
    with torch.no_grad():
        results.append(slow(kept))

thread = threading.Thread(target=call)
thread.start()
assert entered.wait(60)

def work():
    for n in (5, 3, 9):
        check(compiled, n, expected)
        check(slow, n, lambda x: x * 2 + 1)
    assert sg.stats().fallbacks == {}
    assert sg.stats().captures == 6  # all three sizes of both: none of the parent's graphs is there
    sg.reset()
    check(compiled, 5, expected)

try:
    in_child(work)
finally:
    leave.set()
    thread.join()
torch.testing.assert_close(results[0], kept * 2 + 1)
check(compiled, 5, expected)
""")


def test_a_child_and_its_parent_write_to_memory_of_their_own():
    run("""
x = torch.randn(5, 4)
kept = compiled(x)

def work():
    torch.testing.assert_close(kept, expected(x))
    for n in (5, 3, 5, 9):
        check(compiled, n, expected)
    torch.testing.assert_close(kept, expected(x))
    kept.fill_(7)  # a copy of the parent's
    sg.output_pool("cpu").tensor.fill_(7)

in_child(work)
torch.testing.assert_close(kept, expected(x))
for n in (5, 3):
    check(compiled, n, expected)
torch.testing.assert_close(kept, expected(x))
""")


def test_a_fork_from_within_a_call():
    """The child ends the call that it was forked in, on what that call has."""
    run("""
pids = []

@torch.library.custom_op("sharedgraph_fork::fork", mutates_args=())
def fork(x: torch.Tensor) -> torch.Tensor:
    if armed:
        armed.clear()
        pids.append(os.fork())
        if pids[-1] == 0:
            torch.set_num_threads(1)
            check(compiled, 5, expected)  # on another region, inside this one
    return x * 2

fork.register_fake(torch.empty_like)
armed = []
forking = torch.compile(lambda x: fork(x) + 1, backend="sharedgraph")
for n in (3, 5, 3):
    check(forking, n, lambda x: x * 2 + 1)
armed.append(True)
try:
    check(forking, 5, lambda x: x * 2 + 1)
    for n in (5, 3):
        check(compiled, n, expected)
        check(forking, n, lambda x: x * 2 + 1)
except BaseException:
    if pids == [0]:
        os._exit(1)
    raise
if pids == [0]:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
""")


def test_children_of_children_and_what_is_watched_once():
    run("""
calls = []
begin = type(sg.sharedgraph).begin_in_child
type(sg.sharedgraph).begin_in_child = lambda self: (calls.append(os.getpid()), begin(self))

def grandchild():
    assert len(calls) == 2
    check(compiled, 5, expected)

def child():
    assert len(calls) == 1
    check(compiled, 5, expected)
    in_child(grandchild)
    check(compiled, 5, expected)

in_child(child)
assert not calls
""")
