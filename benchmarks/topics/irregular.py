"""Inputs of which several dims change at every step: batches of graphs, and texts to fine-tune a language model on."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import rows, runners, streams
from benchmarks.rows import Row
from benchmarks.runners import Model, Served, Way
from benchmarks.topics import Settings
from cudagraph_backend.demo.workload import Batch, ChangingDim, mark

JOBS = ("gin", "fine_tuning")
LIMIT_S = 290
WAYS = (runners.EAGER, runners.INDUCTOR, runners.STOCK, runners.HAND_PADDED, runners.SHAREDGRAPH)
EDGES_PER_NODE = (2, 5)
PADDING_TOKEN, IGNORED = 0, -100

Bounds: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Graphs:
    """Sizes of a graph network, and of its batches: the fewest and the most graphs, and nodes of each graph."""

    features: int
    width: int
    layers: int
    graphs: Bounds
    nodes: Bounds
    batches: int
    timed_passes: int


@dataclass(frozen=True, slots=True)
class Texts:
    """Sizes of a language model, and of its batches: the fewest and the most texts, and tokens of each text."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    texts: Bounds
    tokens: Bounds
    batches: int
    timed_passes: int


FULL_GRAPHS = Graphs(16, 128, 5, graphs=(8, 32), nodes=(10, 40), batches=60, timed_passes=5)
QUICK_GRAPHS = Graphs(4, 16, 2, graphs=(2, 6), nodes=(3, 8), batches=10, timed_passes=2)
FULL_TEXTS = Texts(512, 4, 8, 8192, texts=(4, 16), tokens=(64, 256), batches=40, timed_passes=3)
QUICK_TEXTS = Texts(32, 1, 2, 64, texts=(2, 6), tokens=(8, 20), batches=8, timed_passes=2)


def run(job: str, settings: Settings) -> list[Row]:
    return graph_network(settings) if job == "gin" else fine_tuning(settings)


# ---- a graph network in inference: nodes, edges and the number of graphs change


def graph_network(settings: Settings) -> list[Row]:
    sizes, device = (QUICK_GRAPHS if settings.quick else FULL_GRAPHS), settings.device
    torch.manual_seed(0)
    module = GraphNetwork(sizes).to(device).eval()
    draw = random.Random(0)
    requests = [mark_graphs(draw_graphs(sizes, draw, device), sizes) for _ in range(sizes.batches)]

    def prepare(way: Way) -> Served:
        served = way.prepare(Model(module, requests[0], (), ()))
        return padding_graphs(served) if way is runners.HAND_PADDED else served

    stream = streams.Stream(
        topic="irregular",
        case="gin",
        requests=requests,
        prepare=prepare,
        tolerance=1e-3,
        settings={
            "convolution": module.origin,
            "layers": sizes.layers,
            "width": sizes.width,
            "dtype": "float32",
            "graphs": told(sizes.graphs),
            "nodes per graph": told(sizes.nodes),
            "edges per node": told(EDGES_PER_NODE),
        },
        percentiles=(10, 90, 99),
        shuffled=True,
        must_be_right=True,
        timed_passes=sizes.timed_passes,
    )
    return streams.run_stream(stream, WAYS, settings)


class GraphNetwork(nn.Module):
    """GIN: features of nodes ``[N, features]``, edges ``[2, E]`` and each node's graph → a number per graph.

    How many graphs there are, ``bounds`` tells: torch_geometric's ``ptr``, the first node of each and their number.
    """

    def __init__(self, sizes: Graphs) -> None:
        super().__init__()
        convolution, self.pool, self.origin = graph_operators()
        inputs = [sizes.features, *[sizes.width] * (sizes.layers - 1)]
        self.convolutions = nn.ModuleList(convolution(perceptron(each, sizes.width)) for each in inputs)
        self.head = nn.Linear(sizes.width, 1)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor, bounds: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = convolution(x, edges).relu()
        return self.head(self.pool(x, graph, size=bounds.shape[0] - 1))


class Convolution(nn.Module):
    """What torch_geometric's ``GINConv`` computes, for where that is not installed."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        return self.network(x + torch.zeros_like(x).index_add(0, target, x[source]))


def add_pool(x: Tensor, graph: Tensor, size: int) -> Tensor:
    """Add up the nodes of each graph, as torch_geometric's ``global_add_pool`` does."""
    return x.new_zeros(size, x.shape[1]).index_add(0, graph, x)


def graph_operators() -> tuple[Callable[[nn.Module], nn.Module], Callable[..., Tensor], str]:
    """Return a convolution, a pooling, and whose they are."""
    try:
        import torch_geometric
        from torch_geometric.nn import GINConv, global_add_pool
    except ImportError:
        return Convolution, add_pool, "index_add"
    return GINConv, global_add_pool, f"torch_geometric {torch_geometric.__version__}"


def perceptron(inputs: int, width: int) -> nn.Module:
    # The norm keeps numbers small where a node has many neighbours.
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))


def draw_graphs(sizes: Graphs, draw: random.Random, device: torch.device) -> Batch:
    """Draw graphs, and join them to one whose parts no edge connects."""
    nodes = [draw.randint(*sizes.nodes) for _ in range(draw.randint(*sizes.graphs))]
    bounds = torch.tensor([0, *nodes]).cumsum(0)
    edges = [
        start + torch.randint(count, (2, int(count * draw.uniform(*EDGES_PER_NODE))))
        for start, count in zip(bounds[:-1], nodes, strict=True)
    ]
    graph = torch.arange(len(nodes)).repeat_interleave(torch.tensor(nodes))
    batch = torch.randn(sum(nodes), sizes.features), torch.cat(edges, 1), graph, bounds
    return tuple(tensor.to(device) for tensor in batch)


def mark_graphs(batch: Batch, sizes: Graphs) -> Batch:
    """Tell Dynamo which dims change, and up to what size."""
    x, edges, graph, bounds = batch
    nodes = ChangingDim(0, 2, sizes.graphs[1] * sizes.nodes[1])
    mark((x, graph), (nodes,))
    mark((edges,), (ChangingDim(1, 2, nodes.max * EDGES_PER_NODE[1]),))
    mark((bounds,), (ChangingDim(0, 3, sizes.graphs[1] + 1),))  # a single graph would be compiled apart
    return batch


def padding_graphs(served: Served) -> Served:
    """Add, as MACE does, a graph of unused nodes: all edges that are added begin and end at its first node."""

    def call(x: Tensor, edges: Tensor, graph: Tensor, bounds: Tensor) -> Tensor:
        nodes, graphs = x.shape[0], bounds.shape[0] - 1
        more_nodes = quarter_step(nodes + 1) - nodes
        more_graphs = quarter_step(graphs + 1) - graphs
        more_edges = quarter_step(edges.shape[1]) - edges.shape[1]
        result = served(
            F.pad(x, (0, 0, 0, more_nodes)),
            F.pad(edges, (0, more_edges), value=nodes),
            F.pad(graph, (0, more_nodes), value=graphs),
            F.pad(bounds, (0, more_graphs), value=nodes + more_nodes),
        )
        return result[:graphs]

    return call


# ---- a training step of a language model: the number of texts and their length change


def fine_tuning(settings: Settings) -> list[Row]:
    try:
        base = language_model(settings)
    except ImportError:
        return [rows.left_out("irregular", "fine_tuning", way.name, "needs transformers") for way in WAYS]
    sizes, device = (QUICK_TEXTS if settings.quick else FULL_TEXTS), settings.device
    # Each way trains its own; made before memory is measured.
    modules = {way.name: copy.deepcopy(base) for way in WAYS}
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    stream = streams.Stream(
        topic="irregular",
        case="fine_tuning",
        requests=draw_texts(sizes, device),
        prepare=lambda way: FineTuning(modules[way.name], base.state_dict(), way),
        tolerance=1e-3 if dtype == "float32" else 0.02,
        settings={
            "model": "Llama of transformers",
            "layers": sizes.layers,
            "hidden": sizes.hidden,
            "vocabulary": sizes.vocabulary,
            "optimizer": "SGD, gradients clipped",
            "dtype": dtype,
            "batch": told(sizes.texts),
            "length": told(sizes.tokens),
        },
        begin=_start_anew,
        grad=True,
        percentiles=(10, 90, 99),
        shuffled=True,
        must_be_right=True,
        timed_passes=sizes.timed_passes,
    )
    return streams.run_stream(stream, WAYS, settings)


def language_model(settings: Settings) -> nn.Module:
    """Build a small Llama with random weights.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = QUICK_TEXTS if settings.quick else FULL_TEXTS
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 11 // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=2 * sizes.tokens[1],
        pad_token_id=PADDING_TOKEN,
    )
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    module: nn.Module = LlamaForCausalLM(config)
    return module.to(settings.device, dtype)


def draw_texts(sizes: Texts, device: torch.device) -> list[Batch]:
    """Draw batches of token ids and labels, no two of one shape. A tenth of the labels is ignored, as prompts are.

    Their dims are not marked: torch asks whether a length is a multiple of 8, which it must not ask of a marked one.
    """
    fewest, most = sizes.texts
    shapes = [(texts, n) for texts in range(fewest, most + 1) for n in range(sizes.tokens[0], sizes.tokens[1] + 1)]
    batches: list[Batch] = []
    for shape in random.Random(0).sample(shapes, sizes.batches):
        ids = torch.randint(PADDING_TOKEN + 1, sizes.vocabulary, shape, device=device)
        labels = ids.masked_fill(torch.rand(shape, device=device) < 0.1, IGNORED)
        batches.append((ids, labels))
    return batches


def _start_anew(step: Served) -> None:
    assert isinstance(step, FineTuning)
    step.start_anew()


class FineTuning:
    """Trains a model; answers a batch with its loss and the norm of all gradients, which tells of each of them."""

    def __init__(self, module: nn.Module, initial: Mapping[str, Any], way: Way) -> None:
        self._module, self._initial = module.train(), initial
        self._optimizer = torch.optim.SGD(module.parameters(), lr=0.1, foreach=True)

        def loss(ids: Tensor, labels: Tensor) -> Tensor:
            return module(input_ids=ids, labels=labels, use_cache=False).loss

        served = way.prepare(Model(loss, (), (), ()))
        self._loss = padding_texts(served) if way is runners.HAND_PADDED else served
        self._is_stock = way in (runners.STOCK, runners.HAND_PADDED)

    def start_anew(self) -> None:
        self._module.load_state_dict(self._initial)

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        if self._is_stock:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self._loss(ids, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return torch.stack((loss.detach().float(), norm.float()))


def padding_texts(served: Served) -> Served:
    """Add texts and tokens whose labels the loss ignores. No mask is needed, as tokens see only what precedes them."""

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        texts, tokens = ids.shape
        more = 0, quarter_step(tokens) - tokens, 0, quarter_step(texts) - texts
        return served(F.pad(ids, more, value=PADDING_TOKEN), F.pad(labels, more, value=IGNORED))

    return call


# ----


def quarter_step(size: int) -> int:
    """Round up to a power of two or one of three sizes between two of them: 8, 10, 12, 14, 16, 20, …"""
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step


def told(bounds: Bounds) -> str:
    return f"{bounds[0]} to {bounds[1]}"
