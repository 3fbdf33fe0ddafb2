"""A seeded stream of requests for a model: what changes from call to call is the batch size (and the token length)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from cudagraph_backend import torch_internals
from cudagraph_backend.demo import models

MAX_ROWS = 64
LENGTH_STEP = 32
LLAMA_LENGTH = 16
# How often the longest sentence of a request is of that padded length: questions are many, paragraphs few.
LENGTH_WEIGHTS = {32: 0.7, 64: 0.22, 96: 0.08}

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class ChangingDim:
    """A dim of every input that changes from request to request, and the values it takes."""

    dim: int
    min: int
    max: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and the requests it is to serve, all on one device.

    Attributes:
        name: the model, as on the command line.
        unit: what one row is, in the plural.
        requests: the model's arguments, one tuple per request.
    """

    name: str
    unit: str
    module: nn.Module
    requests: tuple[Batch, ...]

    @property
    def distinct_shapes(self) -> int:
        """How many input shapes the stream has: as many graphs a backend needs that has one per shape."""
        return len({tuple(tuple(tensor.shape) for tensor in batch) for batch in self.requests})


def build(name: str, requests: int, seed: int, device: torch.device) -> Workload:
    """Return the workload of model ``name``; equal arguments give equal requests and weights."""
    builders: dict[str, Callable[[int, int], tuple[str, nn.Module, list[Batch], tuple[ChangingDim, ...]]]] = {
        "minilm": _minilm,
        "llama": _llama,
        "mlp": _mlp,
    }
    unit, module, batches, dims = builders[name](requests, seed)
    placed = tuple(mark(tuple(tensor.to(device) for tensor in batch), dims) for batch in batches)
    return Workload(name, unit, module.to(device), placed)


def mark(batch: Batch, dims: Sequence[ChangingDim]) -> Batch:
    """Tell Dynamo which dims change, and up to what size: the bounds let every bucket be known from the start.

    A single row is left unmarked: Dynamo compiles size 1 on its own, and a mark that forbids it would raise.
    """
    for tensor in batch:
        for each in dims:
            if tensor.shape[each.dim] >= each.min:
                torch_internals.mark_dim(tensor, each.dim, (each.min, each.max))
    return batch


def row_counts(requests: int, seed: int) -> list[int]:
    """Draw batch sizes from 1 to ``MAX_ROWS``: 1–8 about as often as 8–64, as when a server takes what has arrived."""
    draw = random.Random(seed)
    return [int((MAX_ROWS + 1) ** draw.random()) for _ in range(requests)]


def read_sentences() -> list[str]:
    text = resources.files("cudagraph_backend.demo").joinpath("sentences.txt").read_text(encoding="utf-8")
    return text.splitlines()


def draw_sentences(by_length: dict[int, list[str]], rows: int, draw: random.Random) -> list[str]:
    """Draw ``rows`` sentences: first the longest kind, then one sentence of it, then others up to that length."""
    kinds = [length for length in LENGTH_WEIGHTS if by_length.get(length)]
    longest = draw.choices(kinds, [LENGTH_WEIGHTS[length] for length in kinds])[0]
    shorter = [sentence for length in kinds if length <= longest for sentence in by_length[length]]
    chosen = [draw.choice(by_length[longest]), *draw.choices(shorter, k=rows - 1)]
    draw.shuffle(chosen)
    return chosen


def padded_length(tokens: int) -> int:
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP


def group_by_length(sentences: Sequence[str], tokenizer: Any) -> dict[int, list[str]]:
    """Group sentences by the padded length that each has on its own."""
    groups: dict[int, list[str]] = {}
    for sentence, ids in zip(sentences, tokenizer(list(sentences))["input_ids"], strict=True):
        groups.setdefault(padded_length(len(ids)), []).append(sentence)
    return groups


def _minilm(requests: int, seed: int) -> tuple[str, nn.Module, list[Batch], tuple[ChangingDim, ...]]:
    module, tokenizer = models.load_minilm()
    by_length = group_by_length(read_sentences(), tokenizer)
    draw = random.Random(seed + 1)  # apart from the batch sizes, so that these are the same for every model
    batches: list[Batch] = []
    for rows in row_counts(requests, seed):
        sentences = draw_sentences(by_length, rows, draw)
        coded = tokenizer(sentences, padding=True, pad_to_multiple_of=LENGTH_STEP, return_tensors="pt")
        batches.append((coded["input_ids"], coded["attention_mask"]))
    lengths = ChangingDim(1, min(LENGTH_WEIGHTS), max(LENGTH_WEIGHTS))
    return "sentences", module, batches, (ChangingDim(0, 2, MAX_ROWS), lengths)


def _llama(requests: int, seed: int) -> tuple[str, nn.Module, list[Batch], tuple[ChangingDim, ...]]:
    module = models.build_llama(seed)
    draw = torch.Generator().manual_seed(seed)
    batches: list[Batch] = [
        (torch.randint(models.LLAMA_VOCABULARY, (rows, LLAMA_LENGTH), generator=draw),)
        for rows in row_counts(requests, seed)
    ]
    return "prompts", module, batches, (ChangingDim(0, 2, MAX_ROWS),)


def _mlp(requests: int, seed: int) -> tuple[str, nn.Module, list[Batch], tuple[ChangingDim, ...]]:
    module = models.build_mlp(seed)
    draw = torch.Generator().manual_seed(seed)
    batches: list[Batch] = [
        (torch.randn(rows, models.MLP_FEATURES, generator=draw),) for rows in row_counts(requests, seed)
    ]
    return "rows", module, batches, (ChangingDim(0, 2, MAX_ROWS),)
