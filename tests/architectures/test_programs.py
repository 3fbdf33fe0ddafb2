"""Programs that people run and train: each dim has the verdict that is told, and values and gradients are eager's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import transformers

from tests.architectures import judging
from tests.architectures.program import CALLS, PADDED, Mode, Program
from tests.architectures.programs import PROGRAMS

BY_NAME = {program.name: program for program in PROGRAMS}
MODES = [(program.name, mode) for program in PROGRAMS for mode in program.modes]
#: Of these many seconds go into tracing: ``python -m tests.architectures --programs`` checks them with all others.
LONG = {
    "Embeddings of last tokens",
    "GPT2",
    "GPT2 (no mask)",
    "Llama (no mask)",
    "Mamba",
    "Mamba (one length)",
    "T5",
    "T5 encoder (no mask)",
    "U-Net",
}
SMALLEST = BY_NAME["Matrix factorisation"]


@pytest.fixture(autouse=True)
def quiet_and_quick() -> Iterator[None]:
    """Small vocabularies lack the special tokens of the real ones; threads cost more than small tensors do."""
    level, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    transformers.logging.set_verbosity(level)
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, mode in MODES if name not in LONG])
def test_program(name: str, mode: Mode) -> None:
    """Every dim has its verdict, and results, gradients and buffers are eager's at all sizes."""
    assert judging.surprise(BY_NAME[name], mode, judging.judge(BY_NAME[name], mode)) is None


def test_names_are_told_once() -> None:
    assert len(BY_NAME) == len(PROGRAMS)
    assert BY_NAME.keys() >= LONG


def test_a_size_tells_its_dim() -> None:
    sizes = [size for lengths in CALLS.values() for size in set(lengths)]
    assert len(sizes) == len(set(sizes))


def test_every_mode_has_a_verdict_on_every_dim() -> None:
    for name, mode in MODES:
        assert BY_NAME[name].expected(mode).keys() - {"between regions"} <= set(BY_NAME[name].dims)
        assert BY_NAME[name].expected(mode)


def _wrong() -> Iterator[tuple[Program, str]]:
    """Programs that say something else than what is found, and what is told of that."""
    yield replace(SMALLEST, training={"batch": "any reason"}), "batch is not to be padded for 'any reason'"
    yield replace(SMALLEST, training={"batch": PADDED, "length": PADDED}), "dims are ['batch']"
    yield replace(BY_NAME["Downsampled (Conv1d)"], training=dict.fromkeys(("batch", "length"))), "is not padded: "
    # What is compiled computes something else than eager:
    loss = SMALLEST.loss
    assert loss is not None
    yield replace(SMALLEST, loss=lambda *a, **b: loss(*a, **b) + torch.compiler.is_compiling()), "is not eager's"


@pytest.mark.slow
@pytest.mark.parametrize(("program", "told"), _wrong())
def test_what_is_wrong_is_told(program: Program, told: str) -> None:
    assert told in str(judging.surprise(program, "training", judging.judge(program, "training")))
