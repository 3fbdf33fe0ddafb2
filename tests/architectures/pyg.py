"""Graph networks of PyTorch Geometric."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as geometric  # type: ignore[import-untyped]
from torch import nn

from tests.architectures.graphs import ALL, BOTH, CLASSES, FEATURES, KIND, OF_GRAPH, OF_GRAPHS, graph, graphs
from tests.architectures.program import BETWEEN, PADDED, Program


class NodeClassifier(nn.Module):
    """Two of PyG's convolutions, of any kind."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.first, self.second = layer(FEATURES, 16), layer(16, CLASSES)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, edges).relu(), edges)


class GraphClassifier(nn.Module):
    """GIN, and a sum or mean over the nodes of each graph; how many graphs there are, the targets tell."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.first, self.second = geometric.GINConv(_mlp(FEATURES)), geometric.GINConv(_mlp(16))
        self.pool, self.head = pool, nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor, edges: torch.Tensor, graph: torch.Tensor, count: int) -> torch.Tensor:
        x = self.second(self.first(x, edges).relu(), edges)
        return self.head(self.pool(x, graph, size=count))


def _mlp(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 16))


def _logits(model: nn.Module, x: torch.Tensor, edges: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(x, edges)


def _node_loss(model: nn.Module, x: torch.Tensor, edges: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x, edges), labels)


def _graph_logits(
    model: nn.Module, x: torch.Tensor, edges: torch.Tensor, graph: torch.Tensor, targets: torch.Tensor, **_: Any
) -> torch.Tensor:
    return model(x, edges, graph, targets.shape[0])


def _graph_loss(model: nn.Module, targets: torch.Tensor, **batch: Any) -> torch.Tensor:
    return F.cross_entropy(_graph_logits(model, targets=targets, **batch), targets)


def _convolutions() -> Iterator[Program]:
    """Those that add self-loops ask whether there are any: Dynamo breaks the graph, and how many there are is data."""
    layers = {
        "GCN (as it is)": partial(geometric.GCNConv, add_self_loops=False, normalize=False),
        "GraphSAGE": geometric.SAGEConv,
        "GraphSAGE (max)": partial(geometric.SAGEConv, aggr="max"),
        "GATv2 (no loops)": partial(geometric.GATv2Conv, heads=2, concat=False, add_self_loops=False),
    }
    for name, layer in layers.items():
        model = partial(NodeClassifier, layer)
        yield Program(f"{name}, PyG", KIND, model, graph, OF_GRAPH, _logits, _node_loss, BOTH, BOTH)
    loops = {**BOTH, BETWEEN: PADDED}
    yield Program(
        "GCN (loops), PyG",
        KIND,
        partial(NodeClassifier, geometric.GCNConv),
        graph,
        OF_GRAPH,
        _logits,
        _node_loss,
        loops,
        loops,
        leaves=("nothing to capture: the region holds no tensor",),
    )
    meet = "rows along different dims meet (aten.cat"
    yield Program(
        "GAT (loops), PyG",
        KIND,
        partial(NodeClassifier, partial(geometric.GATConv, heads=2, concat=False)),
        graph,
        OF_GRAPH,
        _logits,
        _node_loss,
        {**BOTH, BETWEEN: meet},
        {"edges": PADDED, "nodes": "padded rows write to where real rows are (aten.index_put", BETWEEN: meet},
    )


def _pooled() -> Iterator[Program]:
    pools = {
        "sum": geometric.global_add_pool,
        "mean": geometric.global_mean_pool,
        "max": geometric.global_max_pool,
    }
    for name, pool in pools.items():
        model = partial(GraphClassifier, pool)
        yield Program(f"GIN ({name} pooled), PyG", KIND, model, graphs, OF_GRAPHS, _graph_logits, _graph_loss, ALL, ALL)


def programs() -> Iterator[Program]:
    yield from _convolutions()
    yield from _pooled()
