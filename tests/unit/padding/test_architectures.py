"""Architectures that people serve: each has the verdict that the catalogue tells, and it is true when run.

A part of the catalogue that covers every kind; ``python -m tests.architectures`` checks all of it in some minutes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

from tests.architectures.catalogue import ARCHITECTURES, Architecture
from tests.architectures.verdicts import findings, surprise

TABLE = Path(__file__).parents[3] / "docs" / "padding_models.md"
CHECKED = {
    "decoder": ["Bloom", "Falcon", "GPT2", "GPTNeoX", "Gemma2", "Llama"],
    "decoder with cache": [
        "GPT2 (one step, DynamicCache)",
        "Llama (one step, DynamicCache)",
        "Llama (one step, StaticCache)",
        "Llama (prefill, cache returned)",
    ],
    "encoder": ["Bert", "DebertaV2", "DistilBert", "FNet", "ModernBert"],
    "encoder-decoder": ["Bart", "T5"],
    "vision": ["ConvNeXt", "SegFormer", "Swin", "ViT", "ViTMAE"],
    "multimodal": ["CLIP (both, logits of each pair)", "CLIP (text)"],
    "audio": ["Wav2Vec2", "Whisper"],
    "state space": ["Mamba", "Mamba2"],
    "mixture of experts": ["Mixtral", "Mixtral (experts: batched_mm)", "Mixtral (experts: eager)", "Phimoe"],
    "CNN": ["ConvNeXt (plain torch)", "ResNet (plain torch)", "UNet (plain torch)"],
}
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


@pytest.fixture(autouse=True)
def quiet_and_quick():
    """Small vocabularies lack the special tokens of the real ones; threads cost more than small tensors do."""
    level, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    transformers.logging.set_verbosity(level)
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for names in CHECKED.values() for name in names])
def test_verdict(name):
    architecture = BY_NAME[name]
    assert surprise(architecture, findings(architecture)) is None


def test_every_kind_is_checked():
    assert {kind: set(names) for kind, names in CHECKED.items()} == {
        kind: {a.name for a in ARCHITECTURES if a.kind == kind and a.name in CHECKED.get(kind, [])}
        for kind in {a.kind for a in ARCHITECTURES}
    }


@pytest.mark.slow
def test_a_wrong_expectation_is_told():
    vit = BY_NAME["ViT"]
    wrong = Architecture(vit.name, vit.kind, vit.build, vit.batch, refused="anything else")
    assert "to be refused for 'anything else'" in str(surprise(wrong, findings(wrong)))


def test_the_table_lists_every_architecture_with_its_verdict():
    rows = re.findall(r"^\| (.+?) \| \d+ \| (padded|partly|refused) \|", TABLE.read_text(), re.MULTILINE)
    assert [(name, verdict == "padded") for name, verdict in rows] == [(a.name, not a.refused) for a in ARCHITECTURES]
