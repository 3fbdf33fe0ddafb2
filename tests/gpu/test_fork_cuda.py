"""A child forked by a process that uses CUDA: CUDA is closed to it, which torch says; the CPU is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os
import traceback
import torch

torch.set_grad_enabled(False)
torch.set_num_threads(1)  # Dynamo guards it, and can compile nothing in the child; its threads are the parent's
compiled = torch.compile(lambda x: x.sin() * 2, backend="sharedgraph", options={"capture": "always"})
x, y = torch.randn(5, 4, device="cuda"), torch.randn(5, 4)
kept = compiled(x)
torch.testing.assert_close(kept, x.sin() * 2)
torch.testing.assert_close(compiled(y), y.sin() * 2)
pid = os.fork()
if pid == 0:
    status = 1
    try:
        for _ in range(2):
            try:
                compiled(x)
            except RuntimeError as error:
                assert "Cannot re-initialize CUDA in forked subprocess" in str(error), error
            else:
                raise AssertionError("the child has called a graph of the parent's")
            torch.testing.assert_close(compiled(y), y.sin() * 2)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
torch.testing.assert_close(kept, x.sin() * 2)
torch.testing.assert_close(compiled(x), x.sin() * 2)
"""


@pytest.mark.slow
def test_the_error_is_torchs_own():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
