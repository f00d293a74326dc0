"""VGG networks of the thesis (§2.12.1): 3x3 convolution, batch normalisation, ReLU; one linear layer at the end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gradexp.errors import UserError


class VGG(nn.Module):
    """images (B, channels, H, W) -> logits (B, classes).

    layers: output channels of each convolution, and "M" for a 2x2 max-pool; width scales the channels.
    dropout: probability in front of the linear layer. activation: makes one, such as a softplus; None for ReLU.
    """

    def __init__(
        self,
        *,
        name: str,
        layers: Sequence[int | str],
        width: float,
        channels: int,
        classes: int,
        dropout: float | None,
        activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.pools = name, list(layers).count("M")
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for layer in layers:
            if layer == "M":
                blocks[f"pool{sum(key.startswith('pool') for key in blocks) + 1}"] = nn.MaxPool2d(2)
                continue
            number = sum(key.startswith("conv") for key in blocks) + 1
            out = max(1, round(int(layer) * width))
            blocks[f"conv{number}"] = nn.Conv2d(channels, out, kernel_size=3, padding=1)
            blocks[f"norm{number}"] = nn.BatchNorm2d(out)
            blocks[f"relu{number}"] = activation() if activation else nn.ReLU()  # never in-place: captured values stay
            channels = out
        self.features = nn.Sequential(blocks)
        self.dropout = nn.Dropout(dropout or 0.0)
        self.linear = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 2**self.pools:
            raise UserError(
                f"{self.name} halves the image {self.pools} times, which leaves nothing of {images.shape[-1]} pixels; "
                f"take a smaller model, or images of at least {2**self.pools} pixels"
            )
        features = self.features(images).mean(dim=(2, 3))  # global average pooling
        return self.linear(self.dropout(features))
