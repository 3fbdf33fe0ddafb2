"""Arguments of ``python -m cudagraph_backend demo``, and what runs them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cudagraph_backend.demo import DemoError, page, ways, workload

DESCRIPTION = """\
Serves one seeded stream of requests, whose batch size changes between 1 and 64 (small ones are more common), in every
way: eager, inductor (plain torch.compile), reduce-overhead (PyTorch's own CUDA graphs; only on CUDA) and sharedgraph.

Eager gives the reference results. Each other way starts clean and serves the stream untimed first (it compiles and
captures meanwhile; Inductor's disk cache may shorten that), then once more with every call timed. Every result of
every pass is compared with eager's.

Models: minilm is all-MiniLM-L6-v2 with its real weights on real sentences, their token length padded to a multiple
of 32; llama is a Llama of four layers, and mlp three linear layers, both with random weights.
"""
EPILOG = """\
exit status: 0 all right; 1 a result of sharedgraph differs from eager's by more than 1e-4; 2 it can't run as asked.
"""
NAMES = tuple(way.name for way in ways.WAYS)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo`` to the commands of the package."""
    parser = commands.add_parser(
        "demo",
        help="serve a model with changing batch sizes in every way, and compare time, memory and results",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one"
    )
    parser.add_argument("--model", choices=("minilm", "llama", "mlp"), default="minilm", help="default: %(default)s")
    parser.add_argument("--requests", type=positive, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of batch sizes, contents and random weights; default: 0")
    parser.add_argument(
        "--ways",
        type=way_names,
        default=NAMES,
        metavar="NAME,…",
        help=f"only these of {', '.join(NAMES)}; default: all that the device can run",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as well")
    parser.add_argument("--explain", action="store_true", help="print sharedgraph's explain(), too")
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    """Return an argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def way_names(text: str) -> tuple[str, ...]:
    """Return an argparse type: names of ways with commas between."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no way of running; there are {', '.join(NAMES)}")
    return names


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    try:
        check_writable(args.json)
        device = pick_device(args.device)
        chosen = pick_ways(args.ways, device)
        result = serve(args.model, args.requests, args.seed, device, chosen)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page.as_text(result))
    if args.explain and result.sharedgraph:
        print(f"\n{result.sharedgraph.explanation}")
    if args.json:
        args.json.write_text(json.dumps(page.as_data(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if result.within_tolerance else 1


def check_writable(file: Path | None) -> None:
    """Raise now rather than after minutes of work; the file itself is left alone until there is something to write."""
    if file is None:
        return
    if file.is_dir():
        raise DemoError(f"--json {file} is a folder; name a file in it")
    if not file.parent.is_dir():
        raise DemoError(f"--json {file}: there is no folder {file.parent}; make it, or name another")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise DemoError(f"--json {file}: no right to write there; name another file")


def pick_device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise DemoError(f"--device cuda: torch {torch.__version__} sees no CUDA GPU here; use --device cpu")
    use_cuda = wanted == "cuda" or (wanted == "auto" and available)
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def pick_ways(names: Sequence[str], device: torch.device) -> tuple[ways.Way, ...]:
    """Return the named ways in their usual order, without those that the device can't run."""
    chosen = tuple(way for way in ways.WAYS if way.name in names and not (way.cuda_only and device.type != "cuda"))
    if not chosen:
        raise DemoError(f"--ways {','.join(names)}: that needs a CUDA GPU")
    return chosen


def serve(model: str, requests: int, seed: int, device: torch.device, chosen: Sequence[ways.Way]) -> page.DemoResult:
    """Run the workload in each way."""
    load = workload.build(model, requests, seed, device)
    with progress_bar(ways.calls_in_all(chosen, requests)) as progress:
        eager, references = ways.run_eager(load, progress)
        results = tuple(eager if way == ways.EAGER else ways.run_way(way, load, references, progress) for way in chosen)
    return page.DemoResult(
        device=device.type,
        device_name=page.device_name(device),
        model=model,
        unit=load.unit,
        requests=requests,
        seed=seed,
        distinct_shapes=load.distinct_shapes,
        ways=results,
    )


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[ways.Progress]:
    """Show a progress bar on standard error, if that is a terminal and tqdm is there (``--model mlp`` needs none)."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda name: None
        return
    # disable=None: off where standard error is no terminal.
    with tqdm(total=total, unit="call", leave=False, disable=None) as bar:

        def advance(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield advance
