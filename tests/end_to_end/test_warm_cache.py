"""A second process with warm caches is still served by this backend: stock caches must not bypass it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, torch
assert "cudagraph_backend" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
compiled = torch.compile(model, backend="sharedgraph")
for n in (5, 7, 9, 30, 7):
    x = torch.randn(n, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
x = torch.randn(6, 4)
compiled(x).sum().backward()
import cudagraph_backend
print(json.dumps(cudagraph_backend.stats().as_dict()))
"""


@pytest.mark.slow
def test_same_stats_in_a_second_process(tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    stats = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        stats.append(json.loads(done.stdout))
    assert stats[0] == stats[1]
    assert stats[0]["replays"] == 7  # five inferences, a forward and its backward
    assert stats[0]["rows_padded"] > 0
    assert stats[0]["fallbacks"] == {}
