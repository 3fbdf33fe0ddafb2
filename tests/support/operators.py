"""Custom operators that tests put between those of torch."""

from __future__ import annotations

import torch


@torch.library.custom_op("sharedgraph_tests::wave", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def wave(x: torch.Tensor) -> torch.Tensor:
    """No part of any graph: the region is divided around it."""
    return x.sin()


wave.register_fake(torch.empty_like)
