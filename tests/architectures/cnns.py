"""Convolutional networks in plain torch, as torchvision and segmentation tools build them."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


class _Residual(nn.Module):
    """ResNet's basic block, with a projection where the stride changes the size."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.Sequential(_Residual(8, 8, 1), _Residual(8, 16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.pool(self.stem(x)))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class _ChannelsLast(nn.Module):
    """ConvNeXt's block: depthwise convolution, then a row-wise MLP over channels moved last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + (self.scale * self.mlp(self.norm(y))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(_ChannelsLast(8), nn.GroupNorm(1, 8), nn.Conv2d(8, 16, 2, 2), _ChannelsLast(16))
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class _Twice(nn.Sequential):
    """UNet's block: convolution, norm and ReLU, twice."""

    def __init__(self, inputs: int, outputs: int) -> None:
        sizes = ((inputs, outputs), (outputs, outputs))
        layers = [[nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)] for i, o in sizes]
        super().__init__(*chain.from_iterable(layers))


class UNet(nn.Module):
    """Down, across and up again, by a transposed convolution and by resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deeper, self.deepest = _Twice(3, 8), _Twice(8, 16), _Twice(16, 16)
        self.up = nn.ConvTranspose2d(16, 16, 2, 2)
        self.merge, self.last_merge = _Twice(32, 8), _Twice(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down(x)
        second = self.deeper(nn.functional.max_pool2d(first, 2))
        third = self.up(self.deepest(nn.functional.max_pool2d(second, 2)))
        y = self.merge(torch.cat([second, third], 1))
        y = nn.functional.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.last_merge(torch.cat([first, y], 1)))
