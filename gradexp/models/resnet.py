"""ResNets for 32x32 images (He et al., 2016): a 3x3 stem and no max-pool, as in Chapter 5 (§5.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gradexp.base.ranges import Count, Positive


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; (B, C, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.act2 = activation()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            # A pool picks every second pixel, instead of a 1x1 convolution with a stride, whose backward in torch 2.14 has
            # corrupted memory on the CPU (8 to 16 channels, 99 images, channels_last).
            self.shortcut = nn.Sequential(nn.AvgPool2d(1, stride), nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, features: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(features)))))
        return self.act2(inner + self.shortcut(features))


class ResNet(nn.Module):
    """images (B, channels, H, W) -> logits (B, classes).

    blocks: number of blocks in each stage. Stage i (from 0) has 64 * width * 2^i channels; all but the first halve the image.
    activation: returns a new activation, such as nn.ReLU. stem_stride: of the first convolution.
    """

    def __init__(
        self,
        *,
        name: str,
        blocks: Sequence[Count],
        width: Positive,
        channels: Count,
        classes: Count,
        activation: Callable[[], nn.Module],
        stem_stride: Count = 1,
    ) -> None:
        super().__init__()
        self.name = name
        first = max(1, round(64 * width))
        self.stem = nn.Conv2d(channels, first, 3, stride=stem_stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(first)
        self.act = activation()
        stages: list[nn.Module] = []
        channels = first
        for i, count in enumerate(blocks):
            out = first * 2**i
            strides = [1 if i == 0 else 2] + [1] * (count - 1)
            stage = [Block(channels if j == 0 else out, out, stride, activation) for j, stride in enumerate(strides)]
            stages.append(nn.Sequential(*stage))
            channels = out
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(self.act(self.norm(self.stem(images))))
        return self.linear(features.mean(dim=(2, 3)))
