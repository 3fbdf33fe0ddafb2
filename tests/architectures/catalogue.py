"""Architectures that people serve, small and with random weights, each with the inputs of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import transformers
from torch import nn

from tests.architectures import cnns

LENGTH = 6
VOCABULARY = 100
Settings: TypeAlias = dict[str, Any]

COMMON: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Settings = {**COMMON, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
TEXT: Settings = {**COMMON, "max_position_embeddings": 32}
IMAGE: Settings = {**COMMON, "image_size": 32, "patch_size": 8, "num_channels": 3}

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model to build, and its keyword arguments for a batch size; dim 0 of every tensor among them is the batch.

    Attributes:
        name: as its users call it, with what sets this entry apart.
        kind: the heading in the table.
        build: makes the model, in eval mode.
        batch: arguments from the model and a batch size.
        refused: the reason for which padding is refused; None if every region is to be padded.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[nn.Module, int], Batch]
    refused: str | None = None


def build(architecture: Architecture) -> tuple[nn.Module, Callable[[int], Batch]]:
    """The model with fixed random weights, and its batches."""
    torch.manual_seed(0)
    model = architecture.build().eval()
    return model, partial(architecture.batch, model)


def _hugging_face(model: str, config: str | None = None, **settings: Any) -> nn.Module:
    """``transformers``' class ``model``, configured; the configuration's class is named after the family."""
    made = getattr(transformers, config or f"{_family(model)}Config")(**settings)
    return getattr(transformers, model)(made)


def _family(model: str) -> str:
    for ending in ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "Model"):
        if model.endswith(ending):
            return model.removesuffix(ending)
    raise ValueError(f"{model}: got no known ending; name its configuration")


def _mask(n: int, left: bool) -> torch.Tensor:
    """Rows of different lengths, padded with zeros before (``left``) or after."""
    lengths = torch.arange(n)[:, None] % LENGTH + 1
    mask = (torch.arange(LENGTH) < lengths).long()
    return mask.flip(1) if left else mask


def _ids(n: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (n, LENGTH))


def _text(model: nn.Module, n: int) -> Batch:
    return {"input_ids": _ids(n), "attention_mask": _mask(n, left=False)}


def _unmasked(model: nn.Module, n: int) -> Batch:
    return {"input_ids": _ids(n)}


def _prompt(model: nn.Module, n: int) -> Batch:
    return {"input_ids": _ids(n), "attention_mask": _mask(n, left=True), "use_cache": False}


def _prefill(model: nn.Module, n: int) -> Batch:
    return {"input_ids": _ids(n), "attention_mask": _mask(n, left=True), "use_cache": True}


def _decode(model: nn.Module, n: int, static: bool) -> Batch:
    """One token after a prompt whose keys and values are in a cache."""
    prompt = {"input_ids": _ids(n), "attention_mask": _mask(n, left=True)}
    cache: Any = transformers.DynamicCache(config=model.config)
    if static:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        cache = model(**prompt, past_key_values=cache, use_cache=True).past_key_values
    mask = torch.cat([prompt["attention_mask"], torch.ones(n, 1, dtype=torch.long)], 1)
    return {
        "input_ids": _ids(n)[:, :1].contiguous(),
        "attention_mask": mask,
        "past_key_values": cache,
        "use_cache": True,
    }


def _translation(model: nn.Module, n: int) -> Batch:
    return {**_text(model, n), "decoder_input_ids": _ids(n), "decoder_attention_mask": _mask(n, left=False)}


def _image(model: nn.Module, n: int) -> Batch:
    return {"pixel_values": torch.randn(n, 3, 32, 32)}


def _pair(model: nn.Module, n: int) -> Batch:
    return {**_text(model, n), **_image(model, n)}


def _sound(model: nn.Module, n: int) -> Batch:
    return {"input_values": torch.randn(n, 400)}


def _speech(model: nn.Module, n: int) -> Batch:
    return {"input_features": torch.randn(n, 8, 20), "decoder_input_ids": _ids(n)}


def _spectrogram(model: nn.Module, n: int) -> Batch:
    return {"input_values": torch.randn(n, 32, 16)}


def _plain(model: nn.Module, n: int) -> Batch:
    return {"x": torch.randn(n, 3, 32, 32)}


def _decoders() -> Iterator[Architecture]:
    """Language models, called as for scoring: all tokens at once, nothing cached."""
    grouped = """
        Cohere Cohere2 Gemma Gemma2 Gemma3 Glm Granite Helium Llama Ministral Mistral Nemotron Olmo Olmo2 Phi Phi3
        Qwen2 Qwen3 SmolLM3 StableLm Starcoder2
    """
    plain = "BioGpt Bloom CTRL Falcon GPT2 GPTBigCode GPTNeoX Mpt OPT Persimmon XGLM"
    for family in grouped.split():
        yield _decoder(family, **GROUPED)
    for family in plain.split():
        yield _decoder(family, **TEXT)
    yield _decoder("CodeGen", **{**TEXT, "hidden_size": 32, "num_attention_heads": 4}, rotary_dim=4)
    yield _decoder("GPTJ", **TEXT, rotary_dim=4)
    yield _decoder("GPTNeo", **TEXT, attention_types=[[["global"], 1]])


def _decoder(family: str, **settings: Any) -> Architecture:
    model = {"CTRL": "CTRLLMHeadModel", "GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    config = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    return Architecture(family, "decoder", partial(_hugging_face, model, config, **settings), _prompt)


def _cached_decoders() -> Iterator[Architecture]:
    for family, settings in {"Llama": GROUPED, "GPT2": TEXT}.items():
        model = _decoder(family, **settings).build
        batches: dict[str, Callable[[nn.Module, int], Batch]] = {
            "prefill, cache returned": _prefill,
            "one step, DynamicCache": partial(_decode, static=False),
            "one step, StaticCache": partial(_decode, static=True),
        }
        for name, batch in batches.items():
            yield Architecture(f"{family} ({name})", "decoder with cache", model, batch)


def _encoders() -> Iterator[Architecture]:
    families = """
        Albert Bert Camembert ConvBert Deberta DebertaV2 DistilBert Electra Ernie Esm FNet MPNet ModernBert
        MobileBert RoFormer Roberta SqueezeBert XLMRoberta
    """
    narrow: Settings = {"embedding_size": TEXT["hidden_size"]}
    for family in families.split():
        extra = narrow if family in ("Albert", "Electra", "RoFormer", "SqueezeBert") else {}
        model = partial(_hugging_face, f"{family}Model", **TEXT, **extra)
        yield Architecture(family, "encoder", model, _unmasked if family == "FNet" else _text)


def _translators() -> Iterator[Architecture]:
    seq2seq = {
        **TEXT,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "decoder_start_token_id": 2,
    }
    for family in ("Bart", "Blenderbot", "M2M100", "MBart", "Pegasus"):
        yield Architecture(
            family,
            "encoder-decoder",
            partial(_hugging_face, f"{family}ForConditionalGeneration", **seq2seq),
            _translation,
        )
    yield Architecture(
        "Marian", "encoder-decoder", partial(_hugging_face, "MarianMTModel", "MarianConfig", **seq2seq), _translation
    )
    t5 = {**COMMON, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "decoder_start_token_id": 0}
    for family in ("T5", "MT5"):
        model = f"{family}ForConditionalGeneration"
        yield Architecture(family, "encoder-decoder", partial(_hugging_face, model, **t5), _translation)


def _vision() -> Iterator[Architecture]:
    for family in ("Beit", "DeiT", "Dinov2", "ViT", "ViTMAE"):
        model = partial(_hugging_face, f"{family}Model", **IMAGE)
        yield Architecture(family, "vision", model, _image)
    yolos: Settings = {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 4}
    yield Architecture("YOLOS", "vision", partial(_hugging_face, "YolosModel", **yolos), _image)
    swin: Settings = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 2,
    }
    yield Architecture("Swin", "vision", partial(_hugging_face, "SwinModel", **swin), _image)
    yield Architecture("Swinv2", "vision", partial(_hugging_face, "Swinv2Model", **swin), _image)
    stages: Settings = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
    yield Architecture("ConvNeXt", "vision", partial(_hugging_face, "ConvNextModel", **stages), _image)
    yield Architecture("ConvNeXtV2", "vision", partial(_hugging_face, "ConvNextV2Model", **stages), _image)
    yield Architecture("ResNet", "vision", partial(_hugging_face, "ResNetModel", **stages, layer_type="basic"), _image)
    yield Architecture("RegNet", "vision", partial(_hugging_face, "RegNetModel", **stages, groups_width=8), _image)
    segformer: Settings = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "num_attention_heads": [1, 2],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
    }
    model = partial(_hugging_face, "SegformerForSemanticSegmentation", "SegformerConfig", **segformer)
    yield Architecture("SegFormer", "vision", model, _image)


def _multimodal() -> Iterator[Architecture]:
    text: Settings = {**TEXT, "projection_dim": 16}
    image = {**IMAGE, "projection_dim": 16}
    both: Settings = {"text_config": text, "vision_config": image, "projection_dim": 16}
    for family in ("CLIP", "Siglip"):
        yield Architecture(
            f"{family} (images)",
            "multimodal",
            partial(_hugging_face, f"{family}VisionModel", f"{family}VisionConfig", **image),
            _image,
        )
        yield Architecture(
            f"{family} (text)",
            "multimodal",
            partial(_hugging_face, f"{family}TextModel", f"{family}TextConfig", **text),
            _text,
        )
        yield Architecture(
            f"{family} (both, logits of each pair)",
            "multimodal",
            partial(_hugging_face, f"{family}Model", **both),
            _pair,
        )


def _audio() -> Iterator[Architecture]:
    whisper: Settings = {
        **COMMON,
        "num_mel_bins": 8,
        "max_source_positions": 10,
        "max_target_positions": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "decoder_start_token_id": 2,
    }
    yield Architecture(
        "Whisper", "audio", partial(_hugging_face, "WhisperForConditionalGeneration", **whisper), _speech
    )
    wave: Settings = {
        **COMMON,
        "conv_dim": (8, 8),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    for family in ("Wav2Vec2", "Hubert"):
        yield Architecture(family, "audio", partial(_hugging_face, f"{family}Model", **wave), _sound)
    ast: Settings = {
        **COMMON,
        "patch_size": 8,
        "frequency_stride": 8,
        "time_stride": 8,
        "max_length": 32,
        "num_mel_bins": 16,
    }
    yield Architecture("AST", "audio", partial(_hugging_face, "ASTModel", "ASTConfig", **ast), _spectrogram)


def _state_space() -> Iterator[Architecture]:
    for family in ("FalconMamba", "Mamba"):
        mamba: Settings = {**COMMON, "state_size": 4, "time_step_rank": 2}
        yield Architecture(family, "state space", partial(_hugging_face, f"{family}ForCausalLM", **mamba), _prompt)
    mamba2: Settings = {**COMMON, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    yield Architecture("Mamba2", "state space", partial(_hugging_face, "Mamba2ForCausalLM", **mamba2), _prompt)
    yield Architecture(
        "RecurrentGemma",
        "state space",
        partial(
            _hugging_face, "RecurrentGemmaForCausalLM", **{**GROUPED, "num_hidden_layers": 3}, attention_window_size=8
        ),
        _prompt,
    )
    yield Architecture(
        "RWKV",
        "state space",
        partial(_hugging_face, "RwkvForCausalLM", **{**TEXT, "num_hidden_layers": 2}, attention_hidden_size=16),
        _prompt,
    )


def _mixtures() -> Iterator[Architecture]:
    """By default tokens are sorted by expert; alternatives are to gather each token's weights, or to loop."""
    settings: Settings = {
        **GROUPED,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    for family in ("GptOss", "Mixtral", "Olmoe", "Phimoe", "Qwen2Moe", "Qwen3Moe"):
        model = partial(_hugging_face, f"{family}ForCausalLM", **settings)
        yield Architecture(family, "mixture of experts", model, _prompt)
        if family in ("Mixtral", "Qwen3Moe"):
            gathering = partial(_with_experts, model, "batched_mm")
            name = f"{family} (experts: batched_mm)"
            yield Architecture(name, "mixture of experts", gathering, _prompt)
    looping = partial(_with_experts, partial(_hugging_face, "MixtralForCausalLM", **settings), "eager")
    yield Architecture("Mixtral (experts: eager)", "mixture of experts", looping, _prompt)


def _with_experts(model: Callable[[], Any], implementation: str) -> nn.Module:
    made = model()
    made.set_experts_implementation(implementation)
    return made


def _convolutional() -> Iterator[Architecture]:
    for name, model in {"ResNet": cnns.ResNet, "ConvNeXt": cnns.ConvNeXt, "UNet": cnns.UNet}.items():
        yield Architecture(f"{name} (plain torch)", "CNN", model, _plain)


ARCHITECTURES: tuple[Architecture, ...] = (
    *_decoders(),
    *_cached_decoders(),
    *_encoders(),
    *_translators(),
    *_vision(),
    *_multimodal(),
    *_audio(),
    *_state_space(),
    *_mixtures(),
    *_convolutional(),
)
