"""Graph networks: nodes, edges and the number of graphs change from call to call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.architectures.program import PADDED, Batch, Program, Shape, Sizes

KIND = "graph network"
FEATURES, CLASSES = 8, 4
BOTH = {"nodes": PADDED, "edges": PADDED}
ALL = {**BOTH, "graphs": PADDED}
OF_GRAPH: dict[str, Shape] = {"x": ("nodes",), "edges": (None, "edges"), "labels": ("nodes",)}
OF_GRAPHS: dict[str, Shape] = {**OF_GRAPH, "graph": ("nodes",), "targets": ("graphs",)}


class Equivariant(nn.Module):
    """EGNN's layer: messages from distances, which move the atoms along their differences."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(2 * FEATURES + 1, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU())
        self.move = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1, bias=False))
        self.node = nn.Sequential(nn.Linear(FEATURES + 16, 16), nn.SiLU(), nn.Linear(16, FEATURES))

    def forward(self, x: torch.Tensor, places: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = edges
        away = places[target] - places[source]
        distance = away.square().sum(-1, keepdim=True)
        message = self.edge(torch.cat([x[target], x[source], distance], -1))
        steps = away / (distance.sqrt() + 1) * self.move(message)
        moved = places + torch.zeros_like(places).index_add(0, target, steps)
        gathered = torch.zeros(x.shape[0], 16).index_add(0, target, message)
        return x + self.node(torch.cat([x, gathered], -1)), moved


class ContinuousFilters(nn.Module):
    """SchNet with its edges given: filters from distances expanded in Gaussians, energies summed per molecule."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.centres = nn.Buffer(torch.linspace(0, 4, 8))
        self.filter = nn.Sequential(nn.Linear(8, 16), nn.Softplus(), nn.Linear(16, 16))
        self.inner, self.outer = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, 1))

    def forward(
        self, numbers: torch.Tensor, places: torch.Tensor, edges: torch.Tensor, graph: torch.Tensor, count: int
    ) -> torch.Tensor:
        source, target = edges
        h = self.embed(numbers)
        distance = (places[source] - places[target]).norm(dim=-1)
        weight = self.filter((-(distance[:, None] - self.centres).square()).exp())
        weight = weight * (0.5 * ((distance * torch.pi / 4).cos() + 1))[:, None]
        messages = self.inner(h)[source] * weight
        h = h + self.outer(torch.zeros_like(h).index_add(0, target, messages))
        return torch.zeros(count, 1).index_add(0, graph, self.head(h)).squeeze(-1)


def graph(sizes: Sizes) -> Batch:
    nodes, edges = sizes["nodes"], sizes["edges"]
    return {
        "x": torch.randn(nodes, FEATURES),
        "edges": torch.randint(0, nodes, (2, edges)),
        "labels": torch.randint(0, CLASSES, (nodes,)),
    }


def graphs(sizes: Sizes) -> Batch:
    """Several graphs in one: of none are there no nodes."""
    nodes, count = sizes["nodes"], sizes["graphs"]
    numbers = torch.cat([torch.arange(count), torch.randint(0, count, (nodes - count,))]).sort().values
    return {**graph(sizes), "graph": numbers, "targets": torch.randint(0, CLASSES, (count,))}


def _atoms(sizes: Sizes) -> Batch:
    return {**graph(sizes), "places": torch.randn(sizes["nodes"], 3)}


def _molecules(sizes: Sizes) -> Batch:
    nodes = sizes["nodes"]
    numbers, energies = torch.randint(0, 10, (nodes,)), torch.randn(sizes["graphs"])
    return {**graphs(sizes), "numbers": numbers, "places": torch.randn(nodes, 3), "energies": energies}


def _moved(model: nn.Module, x: torch.Tensor, places: torch.Tensor, edges: torch.Tensor, **_: Any) -> Any:
    return model(x, places, edges)


def _move_loss(model: nn.Module, x: torch.Tensor, places: torch.Tensor, edges: torch.Tensor, **_: Any) -> torch.Tensor:
    x, moved = model(x, places, edges)
    return F.mse_loss(moved, places.flip(1)) + x.square().mean()


def _energies(
    model: nn.Module,
    numbers: torch.Tensor,
    places: torch.Tensor,
    edges: torch.Tensor,
    graph: torch.Tensor,
    energies: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    return model(numbers, places, edges, graph, energies.shape[0])


def _energy_loss(model: nn.Module, energies: torch.Tensor, **batch: Any) -> torch.Tensor:
    return F.mse_loss(_energies(model, energies=energies, **batch), energies)


def _forces(model: nn.Module, places: torch.Tensor, **batch: Any) -> torch.Tensor:
    """The derivatives of all molecules' energies by the places of their atoms."""
    return -torch.func.grad(lambda at: _energies(model, places=at, **batch).sum())(places)


def _force_loss(model: nn.Module, **batch: Any) -> torch.Tensor:
    return _energy_loss(model, **batch) + _forces(model, **batch).square().mean()


def programs() -> Iterator[Program]:
    atoms = {**OF_GRAPH, "places": ("nodes",)}
    yield Program("EGNN", KIND, Equivariant, _atoms, atoms, _moved, _move_loss, BOTH, BOTH)
    molecules = {**OF_GRAPHS, "numbers": ("nodes",), "places": ("nodes",), "energies": ("graphs",)}
    yield Program(
        "SchNet (edges given)",
        KIND,
        ContinuousFilters,
        _molecules,
        molecules,
        _energies,
        _energy_loss,
        ALL,
        ALL,
    )
    yield Program("SchNet (forces)", KIND, ContinuousFilters, _molecules, molecules, _forces, _force_loss, ALL, ALL)
