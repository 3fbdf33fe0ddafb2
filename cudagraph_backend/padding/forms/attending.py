"""Attention over a padded length: with a mask, by which padded keys weigh nothing."""

from __future__ import annotations

import sympy
import torch
from torch.fx import Proxy

from cudagraph_backend.torch_internals import operator_schema

from ..editor import value
from ..lattice import RefusePadding
from .form import form
from .site import Site

aten = torch.ops.aten

_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"


@form(_CPU, f"{_CPU}_backward")
def attention_on_cpu(site: Site) -> tuple[Proxy, ...]:
    """Give the kernel a mask of zeros."""
    mask = _mask(site, per_head=False)
    names = [argument.name for argument in operator_schema(site.target).arguments if not argument.kwarg_only]
    result = site.editor(site.target, *(site[name] for name in names), attn_mask=mask, scale=site["scale"])
    return tuple(result[i] for i in range(len(site.val)))


@form(
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
)
def attention_with_bias(site: Site) -> tuple[Proxy | None, ...]:
    """Call the kernel that takes a bias, of zeros, for the output alone: each kernel saves more in a way of its own."""
    bias = _mask(site, per_head=True)
    heads = {site.size(site[name], 1) for name in ("query", "key", "value")}
    if len(heads) > 1:
        raise RefusePadding("heads share keys")
    arguments = (site["query"], site["key"], site["value"], bias, False, 0.0, False)
    result = aten._scaled_dot_product_efficient_attention.default(*arguments, scale=site["scale"])
    return (result[0], *[None] * (len(site.val) - 1))


def _mask(site: Site, per_head: bool) -> Proxy:
    """Make a mask that masks nothing, for the walk to put something else where keys are padded."""
    if site["attn_mask"] is not None or site["attn_bias"] is not None or site["is_causal"] or site["dropout_p"]:
        raise RefusePadding("has a mask")
    query, key, editor = site["query"], site["key"], site.editor
    keys = site.size(key, 2)
    mask = editor.constant(0.0, value(query).dtype, [*[sympy.S.One] * 3, keys])
    leading = [site.size(query, 0), site.size(query, 1)] if per_head else [sympy.S.One] * 2
    made: Proxy = aten.expand.default(mask, [editor.plain(size) for size in (*leading, site.size(query, 2), keys)])
    return made


@form("aten::_transformer_encoder_layer_fwd")
def encoder_layer(site: Site) -> Proxy:
    """Call one operator after the other, as the fused one does."""

    def normed(x: Proxy, which: int) -> Proxy:
        return _layer_norm(x, site[f"norm_weight_{which}"], site[f"norm_bias_{which}"], site["eps"])

    def fed_forward(x: Proxy) -> Proxy:
        hidden = _linear(site, x, site["ffn_weight_1"], site["ffn_bias_1"])
        hidden = _gelu(hidden) if site["use_gelu"] else aten.relu.default(hidden)
        return _linear(site, hidden, site["ffn_weight_2"], site["ffn_bias_2"])

    x = site["src"]
    if site["norm_first"]:
        x = aten.add.Tensor(x, _self_attention(site, normed(x, 1)))
        result: Proxy = aten.add.Tensor(x, fed_forward(normed(x, 2)))
        return result
    x = normed(aten.add.Tensor(x, _self_attention(site, x)), 1)
    return normed(aten.add.Tensor(x, fed_forward(x)), 2)


def _self_attention(site: Site, x: Proxy) -> Proxy:
    plain, heads, width = site.editor.plain, site["num_heads"], site["embed_dim"] // site["num_heads"]
    batch, length = (plain(site.size(x, dim)) for dim in (0, 1))
    mixed = _linear(site, x, site["qkv_weight"], site["qkv_bias"])

    def by_head(part: int) -> Proxy:
        one = aten.slice.Tensor(mixed, 2, part * site["embed_dim"], (part + 1) * site["embed_dim"])
        apart = aten.permute.default(aten.reshape.default(one, [batch, length, heads, width]), [0, 2, 1, 3])
        made: Proxy = aten.reshape.default(apart, [batch * heads, length, width])
        return made

    query, key, val = (by_head(part) for part in range(3))
    scores = aten.bmm.default(aten.mul.Tensor(query, width**-0.5), aten.permute.default(key, [0, 2, 1]))
    scores = aten.reshape.default(scores, [batch, heads, length, length])
    if site["mask"] is not None:
        scores = _hidden(site, scores)
    weights = aten.reshape.default(_softmax(scores), [batch * heads, length, length])
    found = aten.reshape.default(aten.bmm.default(weights, val), [batch, heads, length, width])
    found = aten.reshape.default(aten.permute.default(found, [0, 2, 1, 3]), [batch, length, site["embed_dim"]])
    return _linear(site, found, site["proj_weight"], site["proj_bias"])


def _hidden(site: Site, scores: Proxy) -> Proxy:
    """Let what the layer's mask hides weigh nothing: pairs of places, or (type 1) keys of a sequence."""
    mask, editor = site["mask"], site.editor
    if site["mask_type"] not in (0, 1) or value(mask).ndim != 2:
        raise RefusePadding("has a mask of a kind that is not known")
    if value(mask).dtype != torch.bool:
        mask = aten.ne.Scalar(mask, 0)
    if site["mask_type"] == 1:
        shape = [editor.plain(site.size(mask, dim)) for dim in (0, 1)]
        mask = aten.view.default(mask, [shape[0], 1, 1, shape[1]])
    made: Proxy = aten.where.self(mask, editor.constant(float("-inf"), value(scores).dtype), scores)
    return made


def _linear(site: Site, x: Proxy, weight: Proxy, bias: Proxy) -> Proxy:
    plain = site.editor.plain
    *outer, inner = (site.size(x, dim) for dim in range(value(x).ndim))
    flat = aten.reshape.default(x, [plain(sympy.Mul(*outer)), plain(inner)])
    made = aten.addmm.default(bias, flat, aten.permute.default(weight, [1, 0]))
    whole: Proxy = aten.reshape.default(made, [*map(plain, outer), value(weight).shape[0]])
    return whole


def _softmax(x: Proxy) -> Proxy:
    raised = aten.exp.default(aten.sub.Tensor(x, aten.amax.default(x, [-1], True)))
    made: Proxy = aten.div.Tensor(raised, aten.sum.dim_IntList(raised, [-1], True))
    return made


def _layer_norm(x: Proxy, weight: Proxy, bias: Proxy, eps: float) -> Proxy:
    distance = aten.sub.Tensor(x, aten.mean.dim(x, [-1], True))
    spread = aten.rsqrt.default(aten.add.Tensor(aten.mean.dim(aten.mul.Tensor(distance, distance), [-1], True), eps))
    made: Proxy = aten.add.Tensor(aten.mul.Tensor(aten.mul.Tensor(distance, spread), weight), bias)
    return made


def _gelu(x: Proxy) -> Proxy:
    made: Proxy = aten.mul.Tensor(
        aten.mul.Tensor(x, 0.5), aten.add.Tensor(aten.erf.default(aten.mul.Tensor(x, 2**-0.5)), 1)
    )
    return made
