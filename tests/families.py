"""One small member of each of torchvision's classification families, for images of 32 pixels (a few need 64 or 75)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from make_library_table import perturbed
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

CLASSES = 3
any_: Any = models  # torchvision's constructors are untyped


def narrow(make: Callable[[], Any], first: int, inputs: int) -> Callable[..., nn.Module]:
    """A network whose three linear layers, the first one at place `first`, have 16 units instead of 4,096."""

    def build(num_classes: int) -> nn.Module:
        model: nn.Module = make()
        for place, sizes in zip((first, first + 3, 6), ((inputs, 16), (16, 16), (16, num_classes)), strict=True):
            model.classifier[place] = nn.Linear(*sizes)  # type: ignore[index, operator]
        return model

    return build


def vgg_features() -> nn.Module:
    first = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2))
    return nn.Sequential(*first, nn.Conv2d(8, 8, 1), nn.ReLU(True))


def inverted(*setting: Any) -> InvertedResidualConfig:
    return InvertedResidualConfig(*setting, width_mult=1.0)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "alexnet": narrow(any_.AlexNet, 1, 256 * 36),
    "convnext": partial(any_.ConvNeXt, [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]),
    "densenet": partial(any_.DenseNet, 4, (2, 2), 8),
    "efficientnet": partial(any_.EfficientNet, [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 5, 2, 8, 16, 1)], 0.0),
    "efficientnet_v2": partial(
        any_.EfficientNet, [FusedMBConvConfig(1, 3, 1, 8, 8, 1), FusedMBConvConfig(4, 3, 2, 8, 16, 1)], 0.0
    ),
    "googlenet": partial(any_.GoogLeNet, aux_logits=False, init_weights=True),
    "inception": partial(any_.Inception3, aux_logits=False, init_weights=True),
    "maxvit": partial(any_.MaxVit, (32, 32), 8, 4, [8, 16], [1, 1], 8, 0.0),
    "mnasnet": partial(any_.MNASNet, 0.1),
    "mobilenet_v2": partial(any_.MobileNetV2, width_mult=0.1),
    "mobilenet_v3": partial(
        any_.MobileNetV3, [inverted(8, 3, 16, 8, True, "RE", 2, 1), inverted(8, 5, 16, 16, True, "HS", 2, 1)], 16
    ),
    "regnet": partial(
        any_.RegNet, BlockParams.from_init_params(depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=4, se_ratio=0.25)
    ),
    "resnet": partial(any_.ResNet, models.resnet.BasicBlock, [1, 1, 1, 1]),
    "resnext": partial(any_.ResNet, models.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=2),
    "shufflenet": partial(any_.ShuffleNetV2, [1, 1, 1], [8, 8, 16, 32, 32]),
    "squeezenet": partial(any_.SqueezeNet, "1_1"),
    "swin": partial(any_.SwinTransformer, [4, 4], 8, [2, 2], [2, 2], [4, 4]),
    "swin_v2": partial(
        any_.SwinTransformer, [4, 4], 8, [2, 2], [2, 2], [4, 4], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
    ),
    "vgg": narrow(lambda: any_.VGG(vgg_features(), init_weights=False), 0, 8 * 49),
    "vit": partial(any_.VisionTransformer, 32, 16, 2, 2, 16, 32),
}
SIZES = {"alexnet": 64, "googlenet": 64, "inception": 75}


def family(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """The network in eval mode, with random biases and running statistics; three images for it."""
    torch.manual_seed(0)
    model = perturbed(FAMILIES[name](num_classes=CLASSES).to(dtype).eval())
    return model, torch.randn(3, 3, *[SIZES.get(name, 32)] * 2, dtype=dtype)
