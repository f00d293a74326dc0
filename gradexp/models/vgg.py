"""VGG networks: 3x3 convolutions, batch normalisation, ReLU, one linear layer (§2.12.1, §4.7.1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import Count, Positive, Probability


class VGG(nn.Module):
    """images (B, channels, H, W) -> logits (B, classes).

    layers: output channels of each convolution, times `width`, and "M" for a 2x2 max-pool with stride 2.
    dropout: probability before the linear layer, None for 0. activation: returns a new activation; None for ReLU.
    head: input of the linear layer: the `average` of the last map over pixels, or all of it (`flatten`).
    size: height and width of the images, for `flatten`. Raises UserError without it, and for images too small for the pools.
    init: `author` for `initialise_as_author`, None for torch's initialisation.
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
        init: str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.pools = name, list(layers).count("M")
        self.head, self.size = choose("model.head", head, "average", "flatten"), size
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        convolutions = pools = 0
        for layer in layers:
            if layer == "M":
                pools += 1
                modules[f"pool{pools}"] = nn.MaxPool2d(2)
                continue
            if type(layer) is not int or layer < 1:
                raise UserError(f"model.layers: {layer!r} is neither a number of channels nor M, which is max-pooling")
            convolutions += 1
            out = max(1, round(layer * width))
            modules[f"conv{convolutions}"] = nn.Conv2d(channels, out, kernel_size=3, padding=1)
            modules[f"norm{convolutions}"] = nn.BatchNorm2d(out)
            modules[f"relu{convolutions}"] = activation() if activation else nn.ReLU()  # not in-place: captured values stay
            channels = out
        self.features = nn.Sequential(modules)
        self.dropout = nn.Dropout(dropout or 0.0)
        self.linear = nn.Linear(channels * self._pixels(), classes)
        if init is not None:
            choose("model.init", init, "author")
            self.apply(initialise_as_author)

    def _pixels(self) -> int:
        """Number of inputs of the linear layer per channel of the last map."""
        if self.head == "average":
            return 1
        if self.size is None:
            raise UserError(f"{self.name}: model.head=flatten needs the size of the images; set model.size")
        self._check(self.size)
        return (self.size // 2**self.pools) ** 2

    def _check(self, side: int) -> None:
        if side < 2**self.pools:
            raise UserError(
                f"{self.name} halves images {self.pools} times, and these have {side} pixels: "
                f"take a smaller model, or images of at least {2**self.pools} pixels"
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.hidden(images))

    def hidden(self, images: Tensor) -> Tensor:
        """The input of the linear layer: images (B, channels, H, W) -> (B, c)."""
        self._check(min(images.shape[-2:]))
        if self.head == "flatten" and images.shape[-2:] != (self.size, self.size):
            raise UserError(f"{self.name} was made for images of {self.size} pixels, not {images.shape[-1]}; set model.size")
        features = self.features(images)
        return self.dropout(features.flatten(1) if self.head == "flatten" else features.mean(dim=(2, 3)))


def initialise_as_author(module: nn.Module) -> None:
    """Draws the parameters of a convolution or linear layer as the author's published VGGs for CIFAR do.

    Convolutions: weights N(0, 2 / (9 c)) for c output channels, biases N(0, 0.1²). Linear layers: weights N(0, 0.01²), biases
    N(0, 1). With 512 channels, torch's weights of a convolution have 0.4 of this deviation, and those of the linear layer 2.6
    times. The thesis does not state it.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.normal_(module.bias)


class TwoHeadedVGG(VGG):
    """A VGG with a second linear layer, `source`, on the same input (§2.6.3): images -> logits (B, classes).

    The logits of the source's classes, (B, source_classes), are the output of the module `source`, for terms with head=source.
    """

    def __init__(self, *, source_classes: int, **options: Any) -> None:
        super().__init__(**options)
        self.source = nn.Linear(self.linear.in_features, source_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hidden(images)
        self.source(hidden)
        return self.linear(hidden)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Loads the weights of a VGG trained on the source; `linear` keeps its own. Raises UserError for another model."""
        renamed = {name.replace("linear.", "source."): value for name, value in weights.items()}
        expected = {name: value for name, value in self.state_dict().items() if not name.startswith("linear.")}
        if {name: value.shape for name, value in expected.items()} != {name: value.shape for name, value in renamed.items()}:
            raise UserError(
                f"{self.name} can't start from these weights: upstream.start.model must be the same VGG, trained on the source"
            )
        self.load_state_dict(renamed, strict=False)
