"""Fourier transforms: linear maps over the dims they name."""

from __future__ import annotations

from ..call import Call, rule
from ..lattice import Fact, RefusePadding, Results


@rule("aten::_fft_c2c", "aten::_fft_c2r", "aten::_fft_r2c")
def fourier(call: Call) -> Results:
    """Transforms each row for itself, over other dims."""
    operand = call["self"]
    if operand.row_dim in [operand.dim(dim) for dim in call["dim"]]:
        raise RefusePadding("transforms over the padded rows")
    return call.keep(Fact.REPLICA | Fact.ZERO)
