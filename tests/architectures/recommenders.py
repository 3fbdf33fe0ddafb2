"""Recommenders: rows of embedding tables are looked up and pooled in bags; how many are looked up changes, too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.architectures.program import PADDED, Batch, Program, Sizes

KIND = "recommender"
DENSE, TABLE = 8, 40


class Dlrm(nn.Module):
    """Dense features and two bags of ids, of which every pair interacts."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.first, self.second = (nn.EmbeddingBag(TABLE, 16, mode=mode) for _ in range(2))
        self.bottom = nn.Sequential(nn.Linear(DENSE, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 3, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, bags: torch.Tensor) -> Any:
        return self.interact(dense, self.first(ids, offsets), self.second(ids.flip(0), offsets))

    def interact(self, dense: torch.Tensor, *pooled: torch.Tensor) -> torch.Tensor:
        dense = self.bottom(dense)
        features = torch.stack([dense, *pooled], 1)
        row, column = torch.triu_indices(3, 3, 1)
        pairs = (features @ features.transpose(1, 2))[:, row, column]
        return self.top(torch.cat([dense, pairs], 1)).squeeze(-1)


class Added(Dlrm):
    """Bags are given by a number for each look-up, and their rows are added."""

    def forward(self, dense: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, bags: torch.Tensor) -> Any:
        return self.interact(
            dense, *(self.pooled(table, ids, bags, dense.shape[0]) for table in (self.first, self.second))
        )

    def pooled(self, table: Any, ids: torch.Tensor, bags: torch.Tensor, count: int) -> torch.Tensor:
        rows = F.embedding(ids, table.weight)
        summed = torch.zeros(count, 16).index_add(0, bags, rows)
        if self.mode == "sum":
            return summed
        return (
            summed
            / torch.zeros(count).index_add(0, bags, torch.ones_like(ids, dtype=torch.float)).clamp(min=1)[:, None]
        )


class FixedBags(Dlrm):
    """Every bag has five ids, as a matrix."""

    def forward(self, dense: torch.Tensor, ids: torch.Tensor, *_: Any) -> Any:  # type: ignore[override]
        return self.interact(dense, self.first(ids), self.second(ids.flip(1)))


class Factorised(nn.Module):
    """Matrix factorisation with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(TABLE, 8), nn.Embedding(TABLE, 8)
        self.user_bias, self.item_bias = nn.Embedding(TABLE, 1), nn.Embedding(TABLE, 1)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        bias = self.user_bias(user) + self.item_bias(item)
        return (self.users(user) * self.items(item)).sum(-1) + bias.squeeze(-1)


def _bags(sizes: Sizes) -> Batch:
    bags, lookups = sizes["batch"], sizes["lookups"]
    lengths = torch.bincount(torch.randint(0, bags, (lookups,)), minlength=bags)
    return {
        "dense": torch.randn(bags, DENSE),
        "ids": torch.randint(0, TABLE, (lookups,)),
        "offsets": lengths.cumsum(0) - lengths,
        "bags": torch.arange(bags).repeat_interleave(lengths),
        "clicked": torch.randint(0, 2, (bags,)).float(),
    }


def _matrix(sizes: Sizes) -> Batch:
    n = sizes["batch"]
    return {
        "dense": torch.randn(n, DENSE),
        "ids": torch.randint(0, TABLE, (n, 5)),
        "clicked": torch.randint(0, 2, (n,)).float(),
    }


def _ratings(sizes: Sizes) -> Batch:
    n = sizes["batch"]
    return {"user": torch.randint(0, TABLE, (n,)), "item": torch.randint(0, TABLE, (n,)), "rating": torch.randn(n)}


def _odds(model: nn.Module, clicked: torch.Tensor, **batch: Any) -> torch.Tensor:
    return model(**batch).sigmoid()


def _click_loss(model: nn.Module, clicked: torch.Tensor, **batch: Any) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(model(**batch), clicked)


def _rated(model: nn.Module, user: torch.Tensor, item: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(user, item)


def _rating_loss(model: nn.Module, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(user, item), rating)


def programs() -> Iterator[Program]:
    batch, both = {"batch": PADDED}, {"batch": PADDED, "lookups": PADDED}
    shapes = {
        **dict.fromkeys(("dense", "offsets", "clicked"), ("batch",)),
        **dict.fromkeys(("ids", "bags"), ("lookups",)),
    }
    for mode in ("sum", "mean"):
        bagged, added = partial(Dlrm, mode), partial(Added, mode)
        name = f"DLRM (EmbeddingBag, {mode})"
        yield Program(name, KIND, bagged, _bags, shapes, _odds, _click_loss, both, both)
        yield Program(f"DLRM (index_add, {mode})", KIND, added, _bags, shapes, _odds, _click_loss, both, both)
    matrix = dict.fromkeys(("dense", "ids", "clicked"), ("batch",))
    fixed = partial(FixedBags, "sum")
    yield Program("DLRM (bags of five)", KIND, fixed, _matrix, matrix, _odds, _click_loss, batch, batch)
    ratings = dict.fromkeys(("user", "item", "rating"), ("batch",))
    yield Program("Matrix factorisation", KIND, Factorised, _ratings, ratings, _rated, _rating_loss, batch, batch)
