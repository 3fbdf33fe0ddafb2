"""Sequence models and CNNs as they are trained: the batch changes, and where there are tokens their number."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tests.architectures import cnns
from tests.architectures.program import PADDED, Batch, Program, Sizes

LANGUAGE, OTHER, VISION, MIXED = "language model", "sequence model", "vision", "mixture of experts"
VOCABULARY, WIDTH, LABELS = 50, 16, 4

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
#: Numbers drawn while training can't be held to eager's.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {**SMALL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
MAMBA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "state_size": 4,
    "time_step_rank": 2,
}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}


class LastToken(nn.Module):
    """Embeddings from a decoder's state at the last token of each text."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = _hugging_face("LlamaModel", "LlamaConfig", **GROUPED)

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        hidden = self.decoder(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return F.normalize(hidden[torch.arange(input_ids.shape[0]), lengths - 1], dim=-1)


class Tagger(nn.Module):
    """A label for each token, by convolutions over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, LABELS)
        self.layers = nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(2)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids).transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x.transpose(1, 2))


class Downsampled(nn.Module):
    """Every other place of a sequence, by a convolution, and a layer that mixes its features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shorten = nn.Embedding(VOCABULARY, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, LABELS)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.shorten(self.embed(input_ids).transpose(1, 2)).relu().transpose(1, 2)
        return self.head(self.mix(x).tanh())


class Sorted(nn.Module):
    """Experts of which each token goes to two: tokens are sorted by expert, and put back with their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, WIDTH, 32) / 4), nn.Parameter(torch.randn(4, 32, WIDTH) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, experts = self.router(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        token, expert = order // 2, experts.flatten()[order]
        h = torch.bmm(x[token].unsqueeze(1), self.up[expert]).relu()
        y = torch.bmm(h, self.down[expert]).squeeze(1) * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, token, y)


class Dense(Sorted):
    """Every token goes to every expert; the weights of all but two are zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, experts = self.router(x).topk(2, -1)
        weights = torch.zeros(x.shape[0], 4).scatter(1, experts, best.softmax(-1))
        y = torch.einsum("neh,ehd->ned", torch.einsum("nd,edh->neh", x, self.up).relu(), self.down)
        return (weights[..., None] * y).sum(1)


class Capacity(Sorted):
    """Each expert takes the tokens that rate it best, as many as are its share."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, token = self.router(x).softmax(0).topk(4, 0)
        y = torch.bmm(torch.bmm(x[token.T], self.up).relu(), self.down) * weights.T[..., None]
        return torch.zeros_like(x).index_add(0, token.T.flatten(), y.flatten(0, 1))


def _hugging_face(model: str, config: str, **settings: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape)


def _texts(sizes: Sizes) -> Batch:
    batch, length = sizes["batch"], sizes["length"]
    lengths = torch.randint(1, length + 1, (batch,))
    lengths[0] = length
    ids, mask = _ids(batch, length), (torch.arange(length) < lengths[:, None]).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "lengths": lengths,
        "labels": ids.masked_fill(mask == 0, -100),
        "classes": torch.randint(0, LABELS, (batch,)),
        "tags": torch.randint(0, LABELS, (batch, length)),
    }


def _fixed(sizes: Sizes) -> Batch:
    return _texts({**sizes, "length": 6})


def _translations(sizes: Sizes) -> Batch:
    return {**_texts(sizes), "labels": _ids(sizes["batch"], sizes["targets"])}


def _sequences(sizes: Sizes) -> Batch:
    return {"x": torch.randn(sizes["batch"], 6, WIDTH), "classes": torch.randint(0, LABELS, (sizes["batch"],))}


def _tokens(sizes: Sizes) -> Batch:
    return {"x": torch.randn(sizes["batch"], WIDTH)}


def _images(sizes: Sizes) -> Batch:
    n = sizes["batch"]
    masks = torch.randint(0, 2, (n, 16, 16))
    return {"x": torch.randn(n, 3, 16, 16), "classes": torch.randint(0, 10, (n,)), "masks": masks}


def _classified(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(input_ids=input_ids, attention_mask=attention_mask).logits


def _classifier_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, classes: torch.Tensor, **_: Any
) -> torch.Tensor:
    return model(input_ids=input_ids, attention_mask=attention_mask, labels=classes).loss


def _scored(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def _language_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **_: Any
) -> torch.Tensor:
    return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss


def _unmasked(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False).logits


def _unmasked_loss(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


def _translated(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **_: Any
) -> torch.Tensor:
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    return model(**given, decoder_input_ids=labels, use_cache=False).logits


def _translation_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **_: Any
) -> torch.Tensor:
    return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss


def _encoded(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(input_ids=input_ids).last_hidden_state


def _encoded_loss(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return _encoded(model, input_ids).mean(1).square().mean()


def _embedded(model: nn.Module, input_ids: torch.Tensor, lengths: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(input_ids, lengths)


def _pair_loss(model: nn.Module, input_ids: torch.Tensor, lengths: torch.Tensor, **_: Any) -> torch.Tensor:
    """Two texts that look alike: the same one, and with its tokens shifted by one."""
    first, second = model(input_ids, lengths), model(input_ids.roll(1, 0), lengths.roll(1, 0))
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(input_ids.shape[0]))


def _tagged(model: nn.Module, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(input_ids).argmax(-1)


def _tag_loss(
    model: nn.Module, input_ids: torch.Tensor, tags: torch.Tensor, attention_mask: torch.Tensor, **_: Any
) -> torch.Tensor:
    right = tags.masked_fill(attention_mask == 0, -100)
    return F.cross_entropy(model(input_ids).flatten(0, 1), right.flatten())


def _shortened(model: nn.Module, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(input_ids)


def _short_loss(model: nn.Module, input_ids: torch.Tensor, classes: torch.Tensor, **_: Any) -> torch.Tensor:
    return F.cross_entropy(model(input_ids).amax(1), classes)


def _forward(model: nn.Module, x: torch.Tensor, **_: Any) -> torch.Tensor:
    return model(x)


def _pooled_loss(model: nn.Module, x: torch.Tensor, classes: torch.Tensor, **_: Any) -> torch.Tensor:
    return F.cross_entropy(model(x).mean(1)[:, :LABELS], classes)


def _square_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x).square().mean()


def _image_loss(model: nn.Module, x: torch.Tensor, classes: torch.Tensor, **_: Any) -> torch.Tensor:
    return F.cross_entropy(model(x), classes)


def _pixel_loss(model: nn.Module, x: torch.Tensor, masks: torch.Tensor, **_: Any) -> torch.Tensor:
    return F.cross_entropy(model(x), masks)


_BATCH, _BOTH = {"batch": PADDED}, {"batch": PADDED, "length": PADDED}
_TEXTS = {
    **dict.fromkeys(("input_ids", "attention_mask", "labels", "tags"), ("batch", "length")),
    **dict.fromkeys(("lengths", "classes"), ("batch",)),
}
_OF_ONE_LENGTH = dict.fromkeys(_TEXTS, ("batch",))


def _language() -> Iterator[Program]:
    bert = partial(
        _hugging_face, "BertForSequenceClassification", "BertConfig", **SMALL, **NO_DROPOUT, num_labels=LABELS
    )
    llama = partial(_hugging_face, "LlamaForCausalLM", "LlamaConfig", **GROUPED)
    gpt2 = partial(_hugging_face, "GPT2LMHeadModel", "GPT2Config", **GPT2)
    yield Program("Bert classifier", LANGUAGE, bert, _texts, _TEXTS, _classified, _classifier_loss, _BOTH, _BOTH)
    yield Program("Llama", LANGUAGE, llama, _texts, _TEXTS, _scored, _language_loss, _BOTH, _BOTH)
    yield Program("Llama (no mask)", LANGUAGE, llama, _texts, _TEXTS, _unmasked, _unmasked_loss, _BOTH, _BOTH)
    yield Program("GPT2", LANGUAGE, gpt2, _texts, _TEXTS, _scored, _language_loss, _BOTH, _BOTH)
    yield Program("GPT2 (no mask)", LANGUAGE, gpt2, _texts, _TEXTS, _unmasked, _unmasked_loss, _BOTH, _BOTH)
    last = LastToken
    yield Program("Embeddings of last tokens", LANGUAGE, last, _texts, _TEXTS, _embedded, _pair_loss, _BOTH, _BOTH)


def _relative() -> Iterator[Program]:
    """T5 looks its biases up for each pair of places: their gradient adds rows along two dims to a table."""
    t5 = partial(_hugging_face, "T5ForConditionalGeneration", "T5Config", **T5)
    translations, all_three = {**_TEXTS, "labels": ("batch", "targets")}, {**_BOTH, "targets": PADDED}
    yield Program("T5", LANGUAGE, t5, _translations, translations, _translated, _translation_loss, all_three, all_three)
    encoder = partial(_hugging_face, "T5EncoderModel", "T5Config", **T5)
    yield Program("T5 encoder (no mask)", LANGUAGE, encoder, _texts, _TEXTS, _encoded, _encoded_loss, _BOTH, _BOTH)


def _other() -> Iterator[Program]:
    """A length that is halved, rounded down, has no rows; nor has a batch then, in products over both."""
    mamba = partial(_hugging_face, "MambaModel", "MambaConfig", **MAMBA)
    halved, joined = "a size is not a multiple of the rows", "sums products over the padded rows (aten.mm"
    scanned, trained = {"batch": PADDED, "length": halved}, {"batch": joined, "length": halved}
    yield Program("Mamba", OTHER, mamba, _texts, _TEXTS, _encoded, _encoded_loss, scanned, trained)
    one = _OF_ONE_LENGTH
    yield Program("Mamba (one length)", OTHER, mamba, _fixed, one, _encoded, _encoded_loss, _BATCH, _BATCH)
    over = "convolves over the padded rows (aten.convolution"
    shortened, trained = {"batch": PADDED, "length": over}, {"batch": joined, "length": over}
    model: Any = Downsampled
    yield Program("Downsampled (Conv1d)", OTHER, model, _texts, _TEXTS, _shortened, _short_loss, shortened, trained)
    yield Program("Tagger (Conv1d)", OTHER, Tagger, _texts, _TEXTS, _tagged, _tag_loss, _BOTH, _BOTH)
    sequences = dict.fromkeys(("x", "classes"), ("batch",))
    model = _transformer
    yield Program("nn.TransformerEncoder", OTHER, model, _sequences, sequences, _forward, _pooled_loss, _BATCH, _BATCH)


def _vision() -> Iterator[Program]:
    images = dict.fromkeys(("x", "classes", "masks"), ("batch",))
    yield Program("ResNet", VISION, cnns.ResNet, _images, images, _forward, _image_loss, _BATCH, _BATCH)
    yield Program("ConvNeXt", VISION, cnns.ConvNeXt, _images, images, _forward, _image_loss, _BATCH, _BATCH)
    yield Program("U-Net", VISION, cnns.UNet, _images, images, _forward, _pixel_loss, _BATCH, _BATCH)


def _mixtures() -> Iterator[Program]:
    tokens = {"x": ("batch",)}
    for name, model in {"sorted by expert": Sorted, "all experts": Dense, "experts choose": Capacity}.items():
        yield Program(f"MoE ({name})", MIXED, model, _tokens, tokens, _forward, _square_loss, _BATCH, _BATCH)
    mixtral = partial(_hugging_face, "MixtralForCausalLM", "MixtralConfig", **EXPERTS)
    sort = "reduces or sorts over the padded rows (aten.sort"
    scored = {"batch": PADDED, "length": sort}
    yield Program("Mixtral", MIXED, mixtral, _texts, _TEXTS, _scored, _language_loss, scored, scored)


def programs() -> Iterator[Program]:
    yield from _language()
    yield from _relative()
    yield from _other()
    yield from _vision()
    yield from _mixtures()
