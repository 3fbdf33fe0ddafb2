"""Losses in which rows of a batch meet: contrastive, metric, distilled, restored; and derivatives of the output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.architectures.program import PADDED, Batch, Program, Sizes

KIND = "loss"
FEATURES, CLASSES, QUEUE = 8, 4, 32


class Towers(nn.Module):
    """CLIP's two towers and its temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _mlp(FEATURES, 16), _mlp(FEATURES, 16)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first, second = F.normalize(self.first(x), dim=-1), F.normalize(self.second(y), dim=-1)
        return self.log_scale.exp() * first @ second.T


class Momentum(nn.Module):
    """MoCo: an encoder, its slow copy, and a queue of earlier keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = _mlp(FEATURES, 16), _mlp(FEATURES, 16)
        self.queue = nn.Buffer(F.normalize(torch.randn(QUEUE, 16), dim=-1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        query = F.normalize(self.query(x), dim=-1)
        with torch.no_grad():
            key = F.normalize(self.key(y), dim=-1)
        positive = (query * key).sum(-1, keepdim=True)
        return torch.cat([positive, query @ self.queue.T], 1) / 0.07


class Autoencoder(nn.Module):
    """A variational one, whose noise is given."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _mlp(FEATURES, 2 * 4), _mlp(4, FEATURES)

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance


class Masked(nn.Module):
    """A masked autoencoder over tokens: hidden ones are replaced, and only they are to be restored."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(FEATURES, 16), nn.Linear(16, FEATURES)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.hidden = nn.Parameter(torch.zeros(16))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.outward(self.layer(torch.where(mask[..., None], self.hidden, self.inward(x))))


class Kept(nn.Module):
    """MAE as published: tokens are shuffled by noise, a quarter is encoded, and all are put back in order."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(FEATURES, 16), nn.Linear(16, FEATURES)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.hidden = nn.Parameter(torch.zeros(1, 1, 16))

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = noise.argsort(1)
        kept = order[:, :4]
        encoded = self.layer(self.inward(x.gather(1, kept[..., None].expand(-1, -1, FEATURES))))
        rest = self.hidden.expand(x.shape[0], x.shape[1] - 4, -1)
        back = order.argsort(1)[..., None].expand(-1, -1, 16)
        mask = torch.ones_like(noise).scatter(1, kept, 0.0)
        return self.outward(torch.cat([encoded, rest], 1).gather(1, back)), mask


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = _mlp(FEATURES, CLASSES), _mlp(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            taught = self.teacher(x)
        return self.student(x), taught


def _mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def _embedder() -> nn.Module:
    return _mlp(FEATURES, 16)


def _field() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def _pairs(sizes: Sizes) -> Batch:
    n = sizes["batch"]
    return {"x": torch.randn(n, FEATURES), "y": torch.randn(n, FEATURES)}


def _labelled(sizes: Sizes) -> Batch:
    n = sizes["batch"]
    return {"x": torch.randn(n, FEATURES), "labels": torch.randint(0, 2, (n,))}


def _noisy(sizes: Sizes) -> Batch:
    n = sizes["batch"]
    return {"x": torch.rand(n, FEATURES), "noise": torch.randn(n, 4)}


def _tokens(sizes: Sizes) -> Batch:
    shape = sizes["batch"], sizes["length"]
    return {"x": torch.randn(*shape, FEATURES), "mask": torch.rand(shape) < 0.5, "noise": torch.rand(shape)}


def _patches(sizes: Sizes) -> Batch:
    return {"x": torch.randn(sizes["batch"], 16, FEATURES), "noise": torch.rand(sizes["batch"], 16)}


def _points(sizes: Sizes) -> Batch:
    return {"points": torch.rand(sizes["batch"], 2), "borders": torch.rand(sizes["targets"], 2)}


def _both_ways(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """CLIP's loss."""
    logits = model(x, y)
    own = torch.arange(logits.shape[0])
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _retrieved(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """In-batch negatives: for a query every other one's passage is wrong; with the share of those that were found."""
    scores = model.first(x) @ model.second(y).T
    own = torch.arange(scores.shape[0])
    return F.cross_entropy(scores, own, label_smoothing=0.1) + (scores.argmax(1) == own).float().mean().detach()


def _nt_xent(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SimCLR's loss over both views of all."""
    z = F.normalize(torch.cat([model(x), model(y)]), dim=-1)
    n = x.shape[0]
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(similar, torch.cat([torch.arange(n) + n, torch.arange(n)]))


def _first_is_right(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = model(x, y)
    return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long))


def _hardest(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The triplet loss with the farthest positive and the nearest negative of each."""
    z = model(x)
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels[None]
    positive = (distance * same).amax(1)
    negative = distance.masked_fill(same, 1e4).amin(1)
    return (positive - negative + 1).relu().mean()


def _hardest_plain(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same with squared distances from products."""
    z = F.normalize(model(x), dim=-1)
    distance = 2 - 2 * z @ z.T
    same = labels[:, None] == labels[None]
    positive = distance.masked_fill(~same, -1e4).amax(1)
    negative = distance.masked_fill(same, 1e4).amin(1)
    return (positive - negative + 1).relu().mean()


def _elbo(model: nn.Module, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    restored, mean, log_variance = model(x, noise)
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return F.binary_cross_entropy_with_logits(restored, x, reduction="mean") + divergence


def _hidden_alone(model: nn.Module, x: torch.Tensor, mask: torch.Tensor, **_: Any) -> torch.Tensor:
    error = (model(x, mask) - x).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def _published(model: nn.Module, x: torch.Tensor, noise: torch.Tensor, **_: Any) -> torch.Tensor:
    restored, mask = model(x, noise)
    return ((restored - x).square().mean(-1) * mask).sum() / mask.sum()


def _distilled(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    student, teacher = model(x)
    soft = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean") * 4
    return 0.5 * soft + 0.5 * F.cross_entropy(student, labels)


def _heat(model: nn.Module, points: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
    """How far a network is from solving the heat equation: by derivatives of its output at each point."""

    def slopes(at: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: model(x).sum())(at)

    first = slopes(points)
    second = torch.func.grad(lambda at: slopes(at)[:, 0].sum())(points)
    return (first[:, 1] - second[:, 0]).square().mean() + model(borders).square().mean()


def _slope(model: nn.Module, points: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
    """The derivatives at points, as a user takes them of a sum."""
    return torch.func.grad(lambda at: model(at).sum())(points)


def _slope_loss(model: nn.Module, points: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
    return (_slope(model, points, borders).norm(dim=-1) - 1).square().mean() + model(borders).abs().mean()


_BATCH, _BOTH = {"batch": PADDED}, {"batch": PADDED, "length": PADDED}


def _answer(model: nn.Module, **batch: Any) -> Any:
    return model(**batch)


def _with_x(model: nn.Module, x: torch.Tensor, **_: Any) -> Any:
    return model(x)


def _with_mask(model: nn.Module, x: torch.Tensor, mask: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(x, mask)


def _with_noise(model: nn.Module, x: torch.Tensor, noise: torch.Tensor, **_: Any) -> Any:
    return model(x, noise)


def _contrastive() -> Iterator[Program]:
    pairs, labelled = (dict.fromkeys(names, ("batch",)) for names in (("x", "y"), ("x", "labels")))
    yield Program("CLIP's loss", KIND, Towers, _pairs, pairs, _answer, _both_ways, _BATCH, _BATCH)
    yield Program("In-batch negatives", KIND, Towers, _pairs, pairs, _answer, _retrieved, _BATCH, _BATCH)
    yield Program("MoCo (queue)", KIND, Momentum, _pairs, pairs, _answer, _first_is_right, _BATCH, _BATCH)
    yield Program("SimCLR (NT-Xent)", KIND, _embedder, _pairs, pairs, None, _nt_xent, training=_BATCH)
    yield Program("Triplets by cdist", KIND, _embedder, _labelled, labelled, None, _hardest, training=_BATCH)
    yield Program(
        "Triplets by differences", KIND, _embedder, _labelled, labelled, None, _hardest_plain, training=_BATCH
    )
    yield Program(
        "Distillation (KL batchmean)", KIND, Teacher, _labelled, labelled, _with_x, _distilled, _BATCH, _BATCH
    )


def _restoring() -> Iterator[Program]:
    noisy = dict.fromkeys(("x", "noise"), ("batch",))
    tokens = dict.fromkeys(("x", "mask", "noise"), ("batch", "length"))
    yield Program("VAE (noise given)", KIND, Autoencoder, _noisy, noisy, _answer, _elbo, _BATCH, _BATCH)
    yield Program("Masked autoencoder", KIND, Masked, _tokens, tokens, _with_mask, _hidden_alone, _BOTH, _BOTH)
    yield Program("MAE (patches left out)", KIND, Kept, _patches, noisy, _answer, _published, _BATCH, _BATCH)
    yield Program("MAE (tokens left out)", KIND, Kept, _tokens, tokens, _with_noise, _published, _BOTH, _BOTH)


def _derived() -> Iterator[Program]:
    points = {"points": ("batch",), "borders": ("targets",)}
    both = {"batch": PADDED, "targets": PADDED}
    yield Program("Heat equation (PINN)", KIND, _field, _points, points, _heat, _heat, both, both)
    yield Program("Derivative of the output", KIND, _field, _points, points, _slope, _slope_loss, _BATCH, both)


def programs() -> Iterator[Program]:
    yield from _contrastive()
    yield from _restoring()
    yield from _derived()
