"""One job in a process of its own: ``python -m benchmarks.job TOPIC JOB --device D --out FILE [--quick]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import rows, topics


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.job")
    parser.add_argument("topic", choices=topics.NAMES)
    parser.add_argument("job")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    # Every way compiles the same code objects, each for more than one size: more than Dynamo allows by default.
    torch._dynamo.config.recompile_limit = 64
    if args.device == "cpu":
        torch.set_num_threads(1)  # the sizes are tiny, and threads that wait for each other are slower
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    results = topics.load(args.topic).run(args.job, topics.Settings(device, args.quick))
    rows.write_json(args.out, None, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
