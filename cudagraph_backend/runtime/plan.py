"""Plans: all that is decided about calls of one combination of sizes, before it is known where their arguments are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from cudagraph_backend.errors import Refusal
from cudagraph_backend.region import DynamicDim
from cudagraph_backend.runtime.layout import Layout
from cudagraph_backend.runtime.readings import Reading, Sighting
from cudagraph_backend.runtime.served import Served

Sizes: TypeAlias = "tuple[int, ...]"


@dataclass(slots=True)
class Bucket:
    """One combination of capture sizes of a region.

    ``layout``, of its outputs, is observed at the first capture; ``copied`` of them are copied to their ranges in the
    graph, as the region does not write them there itself. ``refusal`` is why its calls run plain after all.
    """

    sizes: Sizes
    layout: Layout | None = None
    copied: int = 0
    refusal: Refusal | None = None


@dataclass(slots=True)
class Plan:
    """All that is decided for one combination of real sizes.

    ``readings`` are those of the staged inputs. ``counts`` are the region's ``CountInput``s; ``to_probe`` are the
    padded dims that the probe must look at before the plan may answer a call. ``layout`` is that of the real rows of
    outputs. ``sightings`` tell where the arguments of the last calls were found. ``served`` counts the calls answered.
    """

    sizes: Sizes
    bucket: Bucket
    readings: tuple[Reading, ...]
    served: Served
    counts: tuple[torch.Tensor, ...] = ()
    to_probe: tuple[DynamicDim, ...] = ()
    layout: Layout | None = None
    sightings: list[Sighting] = field(default_factory=list)

    @property
    def is_ready(self) -> bool:
        """Whether it answers calls without more ado: it needs no probe, and the layout of its outputs is known."""
        return not self.to_probe and self.layout is not None
