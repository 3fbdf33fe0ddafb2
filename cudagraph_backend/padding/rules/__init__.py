"""One small function per kind of operator; importing this package registers them all."""

from . import (
    attention,
    collectives,
    contractions,
    convolution,
    factories,
    flex_attention,
    indexing,
    linalg,
    normalisation,
    random,
    reductions,
    scans,
    transforms,
    views,
    writes,
)
from .pointwise import pointwise

__all__ = [
    "attention",
    "collectives",
    "contractions",
    "convolution",
    "factories",
    "flex_attention",
    "indexing",
    "linalg",
    "normalisation",
    "pointwise",
    "random",
    "reductions",
    "scans",
    "transforms",
    "views",
    "writes",
]
