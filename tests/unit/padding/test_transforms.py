"""Fourier transforms: fine over any dim but the rows."""

from __future__ import annotations

import pytest
import torch

from tests.support.oracle import dynamic, refute, region

REFUSED = ("transforms over the padded rows", "the padded size reaches values through argument 'last_dim_size'")
TRANSFORMS = {
    "c2c over two dims": (lambda x: torch.fft.fftn(x, dim=(1, 2)).real, {0}),
    "c2c from the end": (lambda x: torch.fft.fft(x, dim=-2).abs(), {0, 2}),
    "r2c": (lambda x: torch.fft.rfft(x, dim=2).abs(), {0, 1}),
    "c2r": (lambda x: torch.fft.irfft(torch.complex(x, x.exp()), dim=1), {0, 2}),
    "c2r over the first dim": (lambda x: torch.fft.irfft(torch.complex(x, x.exp()), dim=0), {1, 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name):
    """By way of Dynamo: traced alone, these operators fix the sizes."""
    function, expected = TRANSFORMS[name]
    safe = set()
    for dim in range(3):
        found = region(function, dynamic(torch.randn(5, 6, 7), dim))
        verdict = found.prove()
        if verdict.refusal is None:
            safe.add(dim)
            assert refute(found, verdict) is None
        else:
            assert verdict.refusal.reason in REFUSED
    assert safe == expected
