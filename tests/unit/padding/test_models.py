"""Models that people serve: the batch can be padded, proven and true when run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.oracle import Region, dynamic, refute, region

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {
    "vocab_size": 99,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=16)),
    "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1)),
}


def ids() -> torch.Tensor:
    return dynamic(torch.randint(0, 99, (5, 4)))


def mask() -> torch.Tensor:
    lengths = torch.tensor([4, 2, 3, 1, 4])
    return dynamic((torch.arange(4)[None] < lengths[:, None]).long())


def check(found: Region) -> None:
    """Each symbol alone or, where it asks for that, linked to another is safe."""
    for symbol in found.symbols():
        verdict = found.prove(symbol)
        if verdict.link:
            verdict = found.prove(symbol, *verdict.link)
        assert verdict.refusal is None, str(verdict.refusal)
        assert refute(found, verdict) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention", "options"),
    [
        ("bert", "sdpa", "masked"),
        ("bert", "eager", "masked"),
        ("bert", "sdpa", ""),
        ("gpt2", "sdpa", "cached"),
        ("gpt2", "sdpa", "cached masked"),
        ("gpt2", "eager", "masked"),
        ("llama", "sdpa", ""),
        ("llama", "sdpa", "cached masked"),
        ("llama", "eager", "cached masked"),
    ],
)
def test_transformers(name, attention, options):
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention)
    inputs = {"input_ids": ids()}
    if "masked" in options:
        inputs["attention_mask"] = mask()
    if name != "bert":
        inputs["use_cache"] = "cached" in options
    check(region(model, **inputs))


@pytest.mark.slow
def test_dims_of_equal_size_share_a_symbol_without_marks():
    model = MODELS["bert"]().eval()
    with torch._dynamo.config.patch(assume_static_by_default=False):
        found = region(model, input_ids=torch.randint(0, 99, (5, 4)), attention_mask=torch.ones(5, 4, dtype=torch.long))
    (batch,) = {
        meta.shape[0].node.expr
        for meta in found.metas
        if getattr(meta, "dtype", None) == torch.int64 and _is_dynamic(meta)
    }
    verdict = found.prove(batch)
    assert verdict.refusal is None, str(verdict.refusal)
    assert refute(found, verdict) is None


def _is_dynamic(meta: torch.Tensor) -> bool:
    return isinstance(meta.shape[0], torch.SymInt)


def test_mlp():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3), nn.Softmax(-1))
    found = region(model, dynamic(torch.randn(5, 4)))
    check(found)
    assert not found.prove().needs_fill


class Residual(nn.Module):
    """A block as in ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.last_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.last_norm(self.second(self.norm(self.first(x)).relu())) + x).relu()


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_cnn_in_evaluation():
    found = region(resnet().eval(), dynamic(torch.randn(5, 3, 16, 16)))
    check(found)
    assert not found.prove().needs_fill


def test_cnn_in_training_is_refused():
    refusal = region(resnet().train(), dynamic(torch.randn(5, 3, 16, 16))).prove().refusal
    assert refusal is not None
    assert refusal.op == "aten.var_mean.correction"


@pytest.mark.slow
def test_sentence_embeddings_pooled_over_tokens():
    model = MODELS["bert"]().eval()

    def embed(input_ids, attention_mask):
        hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).expand(hidden.size()).float()
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(pooled, p=2, dim=1)

    check(region(embed, ids(), mask()))
