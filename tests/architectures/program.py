"""A program: a model with a forward pass, a training step, or both, of which several dims change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

Batch: TypeAlias = dict[str, Any]
Mode: TypeAlias = Literal["inference", "training"]
Shape: TypeAlias = tuple[str | None, ...]
Sizes: TypeAlias = dict[str, int]

PADDED: str | None = None
"""The verdict on a dim of which every region pads all symbols; otherwise it is a piece of the reason."""

BETWEEN = "between regions"
"""Names all dims that the inputs lack: sizes that are computed, and that another region gets after a graph break."""

#: What the dims are long in each call. No number is there twice but for the last call, so that a size tells its dim.
CALLS: Mapping[str, tuple[int, ...]] = {
    "batch": (5, 13, 7, 26, 5),
    "length": (9, 6, 11, 14, 9),
    "nodes": (10, 18, 25, 12, 10),
    "edges": (23, 31, 17, 41, 23),
    "graphs": (3, 4, 2, 8, 3),
    "lookups": (20, 29, 33, 16, 20),
    "targets": (19, 27, 15, 22, 19),
    "steps": (24, 28, 21, 30, 24),
}
CALL_COUNT = 5
CAPTURE_SIZES = [8, 16, 32, 64, 512]  #: The last is beyond every product of two of them.


@dataclass(frozen=True, slots=True)
class Program:
    """A model, its batches, and what is to be found of each dim that changes.

    Attributes:
        name: as its users call it, with what sets this entry apart.
        kind: the heading in the table.
        build: makes the model.
        batch: the inputs, by name, from the sizes of the dims.
        shapes: the names of the inputs' leading dims; ``None`` for one that stays as it is.
        answer: what is computed without gradients, from the model and the inputs; None if nothing is.
        loss: what a training step derives; None if there is no such step.
        inference: the verdict on each dim: ``PADDED``, or a piece of the reason why it is not.
        training: the same of the forward and the backward of ``loss``.
        leaves: pieces of the reasons for which a region of it runs uncaptured.
        draws: whether it draws random numbers: then it is held to the same graphs run at their exact sizes.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[Sizes], Batch]
    shapes: Mapping[str, Shape]
    answer: Callable[..., Any] | None = None
    loss: Callable[..., torch.Tensor] | None = None
    inference: Mapping[str, str | None] = field(default_factory=dict)
    training: Mapping[str, str | None] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    draws: bool = False

    @property
    def dims(self) -> list[str]:
        """The names of the dims that change."""
        return list(dict.fromkeys(name for shape in self.shapes.values() for name in shape if name is not None))

    @property
    def modes(self) -> list[Mode]:
        """How it is run."""
        modes: list[Mode] = ["inference"] if self.answer is not None else []
        return modes + ["training"] if self.loss is not None else modes

    def expected(self, mode: Mode) -> Mapping[str, str | None]:
        """The verdicts that are to be found."""
        return self.inference if mode == "inference" else self.training

    def sizes(self, call: int) -> Sizes:
        """The length of each dim in a call."""
        return {name: CALLS[name][call] for name in self.dims}
