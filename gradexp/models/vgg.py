"""VGG networks: 3x3 convolution, batch normalisation, ReLU; one linear layer at the end (thesis §2.12.1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import Count, Positive, Probability


class VGG(nn.Module):
    """images (B, channels, H, W) -> logits (B, classes).

    layers: output channels of each convolution, and "M" for a 2x2 max-pool; width scales the channels.
    dropout: probability in front of the linear layer. activation: makes one, such as a softplus; None for ReLU.
    head: what the linear layer sees of the last map: its `average` over pixels, or all of it (`flatten`), for which `size`
    gives the images' height and width. Raises UserError where they are missing, or the image is halved to nothing.
    """

    def __init__(
        self,
        *,
        name: str,
        layers: Sequence[int | str],
        width: Positive,
        channels: Count,
        classes: Count,
        dropout: Probability | None,
        activation: Callable[[], nn.Module] | None = None,
        head: str = "average",
        size: Count | None = None,
    ) -> None:
        super().__init__()
        self.name, self.pools = name, list(layers).count("M")
        self.head, self.size = choose("model.head", head, "average", "flatten"), size
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
        self.linear = nn.Linear(channels * self._pixels(), classes)

    def _pixels(self) -> int:
        """How many pixels of the last map the linear layer tells apart."""
        if self.head == "average":
            return 1
        if self.size is None:
            raise UserError(f"{self.name}: model.head=flatten needs the size of the images; set model.size")
        self._check(self.size)
        return (self.size // 2**self.pools) ** 2

    def _check(self, side: int) -> None:
        if side < 2**self.pools:
            raise UserError(
                f"{self.name} halves the image {self.pools} times, which leaves nothing of {side} pixels; "
                f"take a smaller model, or images of at least {2**self.pools} pixels"
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.hidden(images))

    def hidden(self, images: Tensor) -> Tensor:
        """What the linear layer sees: images (B, channels, H, W) -> (B, c)."""
        self._check(min(images.shape[-2:]))
        if self.head == "flatten" and images.shape[-2:] != (self.size, self.size):
            raise UserError(f"{self.name} was made for images of {self.size} pixels, not {images.shape[-1]}: set model.size")
        features = self.features(images)
        return self.dropout(features.flatten(1) if self.head == "flatten" else features.mean(dim=(2, 3)))


class TwoHeadedVGG(VGG):
    """A VGG with a second linear layer `source` on the same hidden layer (thesis §2.6.3): images -> logits (B, classes).

    The logits of the source's classes are the output of the module `source`, for terms that ask for it.
    """

    def __init__(self, *, source_classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.source = nn.Linear(self.linear.in_features, source_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hidden(images)
        self.source(hidden)
        return self.linear(hidden)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over a VGG that was trained on the source; the target's head stays new. Raises UserError for another model."""
        renamed = {name.replace("linear.", "source."): value for name, value in weights.items()}
        mine = {name: value for name, value in self.state_dict().items() if not name.startswith("linear.")}
        if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in renamed.items()}:
            raise UserError(
                f"{self.name} can't start from these weights: upstream.start.model must be the same VGG, on the source"
            )
        self.load_state_dict(renamed, strict=False)
