"""Golden numbers of Chapter 5, by plain autograd on a network written out in operations:   python tests/golden/chapter5.py

Nothing of gradexp is used. The formulas are Eq. 5.4, §5.5 and §5.4.1 of the thesis, as the author's published code reads them
(github.com/idiap/rethinking-saliency: regularizers.py, utils/sgld.py): in train mode, the noisy images as a second pass with
batch statistics of their own, one draw of noise, the gradient of the batch's sum of logits; sampling in eval mode.
Everything is float64 and given: parameters, images, labels, noise. Writes chapter5.json beside this file.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FILE = Path(__file__).with_suffix(".json")
BATCH, CHANNELS, SIZE, CLASSES = 4, 2, 6, 3
SIGMA, LAMBDA, MU = 0.01, 1e-3, 1e-4  # score-matching; LAMBDA of gradient-norm too
LAMBDA_ANTI, CEILING = 1e-4, 1000
STEPS, RATE, PULL = 5, 0.1, 0.01
SIGMAS = (0.0, 0.01, 0.1, 0.5)
NORMS = ("norm", "stages.0.0.norm1", "stages.0.0.norm2", "stages.1.0.norm1", "stages.1.0.norm2", "stages.1.0.shortcut.2")


def parameters() -> dict[str, np.ndarray]:
    """A ResNet of two blocks, 2 and 4 channels, random everywhere; named as the modules of a usual implementation."""
    draw = np.random.default_rng(5)
    shapes = {"stem": (2, CHANNELS, 3, 3), "stages.0.0.conv1": (2, 2, 3, 3), "stages.0.0.conv2": (2, 2, 3, 3)}
    shapes |= {"stages.1.0.conv1": (4, 2, 3, 3), "stages.1.0.conv2": (4, 4, 3, 3), "stages.1.0.shortcut.1": (4, 2, 1, 1)}
    made = {f"{name}.weight": 0.5 * draw.normal(size=shape) for name, shape in shapes.items()}
    for name in NORMS:
        width = 2 if name == "norm" or ".0.0." in name else 4
        made |= {f"{name}.weight": draw.uniform(0.5, 1.5, width), f"{name}.bias": draw.normal(size=width)}
        made |= {f"{name}.running_mean": draw.normal(size=width), f"{name}.running_var": draw.uniform(0.5, 2, width)}
    return made | {"linear.weight": 4 * draw.normal(size=(CLASSES, 4)), "linear.bias": draw.normal(size=CLASSES)}


def inputs() -> dict[str, np.ndarray]:
    """Images in [0, 1], their labels, standard normal noise."""
    draw, shape = np.random.default_rng(55), (BATCH, CHANNELS, SIZE, SIZE)
    return {"images": draw.uniform(size=shape), "labels": draw.integers(CLASSES, size=BATCH), "noise": draw.normal(size=shape)}


class Net:
    """images (B, C, H, W) -> logits (B, K). running: statistics, which a pass in train mode moves by a tenth."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        tensors = {name: torch.tensor(value) for name, value in values.items()}
        self.running = {name: value for name, value in tensors.items() if "running" in name}
        self.weights = {name: value.requires_grad_() for name, value in tensors.items() if "running" not in name}

    def norm(self, x: Tensor, name: str, training: bool) -> Tensor:
        mean, variance = self.running[f"{name}.running_mean"], self.running[f"{name}.running_var"]
        if training:
            count = x.numel() // x.shape[1]
            now = x.mean((0, 2, 3))
            spread = ((x - now.view(-1, 1, 1)) ** 2).mean((0, 2, 3))
            unbiased = spread.detach() * count / (count - 1)
            self.running[f"{name}.running_mean"] = 0.9 * mean + 0.1 * now.detach()
            self.running[f"{name}.running_var"] = 0.9 * variance + 0.1 * unbiased
            mean, variance = now, spread
        scaled = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"].view(-1, 1, 1) + self.weights[f"{name}.bias"].view(-1, 1, 1)

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = self.weights[f"{name}.weight"]
        return functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def block(self, x: Tensor, name: str, stride: int, training: bool) -> Tensor:
        y = curved(self.norm(self.conv(x, f"{name}.conv1", stride), f"{name}.norm1", training))
        y = self.norm(self.conv(y, f"{name}.conv2"), f"{name}.norm2", training)
        if stride > 1:
            x = self.norm(self.conv(x, f"{name}.shortcut.1", stride), f"{name}.shortcut.2", training)
        return curved(y + x)

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        y = curved(self.norm(self.conv(x, "stem"), "norm", training))
        y = self.block(self.block(y, "stages.0.0", 1, training), "stages.1.0", 2, training)
        return y.mean((2, 3)) @ self.weights["linear.weight"].T + self.weights["linear.bias"]


def curved(x: Tensor) -> Tensor:
    return functional.softplus(x, beta=10)


def chosen(logits: Tensor, labels: Tensor) -> Tensor:
    return logits[torch.arange(len(labels)), labels]


def trained(method: str) -> dict[str, Any]:
    """Cross-entropy and a regulariser: their values, the gradients of the sum, the statistics after the step."""
    net, given = Net(parameters()), {name: torch.tensor(value) for name, value in inputs().items()}
    x, labels = given["images"].requires_grad_(), given["labels"]
    logits = net(x, training=True)
    loss = (logits.exp().sum(1).log() - chosen(logits, labels)).mean()
    value = regulariser(method, net, x, labels, given["noise"], logits)
    slopes = torch.autograd.grad(loss + value, list(net.weights.values()))
    return {
        "cross_entropy": loss.item(),
        "regulariser": value.item(),
        "gradients": {name: slope.tolist() for name, slope in zip(net.weights, slopes, strict=True)},
        "running": {name: statistic.tolist() for name, statistic in net.running.items()},
    }


def regulariser(method: str, net: Net, x: Tensor, labels: Tensor, noise: Tensor, logits: Tensor) -> Tensor:
    """The weighted regulariser of §5.5, a mean over the batch."""
    (gradient,) = torch.autograd.grad(chosen(logits, labels).sum(), x, create_graph=True)
    half = (gradient**2).sum((1, 2, 3)) / 2
    if method == "half_gradient_norm":
        return LAMBDA * half.mean()
    noisy = net(x.detach() + SIGMA * noise, training=True)
    trace = 2 / SIGMA**2 * (chosen(noisy, labels) - chosen(logits, labels))
    if method == "score_matching":
        return LAMBDA * (trace + half + MU * trace**2).mean()
    assert (trace > CEILING).any() and (trace < CEILING).any(), "the ceiling must show"
    return -LAMBDA_ANTI * trace.clamp(max=CEILING).mean()


def climbed() -> list[Any]:
    """STEPS steps of the ascent, from the images."""
    net, given = Net(parameters()), inputs()
    x, labels = torch.tensor(given["images"]), torch.tensor(given["labels"])
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(chosen(net(x, training=False), labels).sum(), x)
        x = (x + RATE * (gradient - PULL * (x - 0.5))).clamp(0, 1)
    return x.tolist()


def ratios() -> dict[str, list[float]]:
    """Means over images of exp(f(x + σ v) - f(x)), and of its logarithm, for each of SIGMAS."""
    net, given = Net(parameters()), {name: torch.tensor(value) for name, value in inputs().items()}
    x, labels = given["images"], given["labels"]
    logs = [chosen(net(x + s * given["noise"], False), labels) - chosen(net(x, False), labels) for s in SIGMAS]
    return {"mean": [log.exp().mean().item() for log in logs], "log": [log.mean().item() for log in logs]}


def numbers() -> dict[str, Any]:
    """All of it, as the file has it."""
    methods = ("score_matching", "anti_score_matching", "half_gradient_norm")
    return {
        "parameters": {name: value.tolist() for name, value in parameters().items()},
        "inputs": {name: value.tolist() for name, value in inputs().items()},
        "training": {method: trained(method) for method in methods},
        "sampling": climbed(),
        "density_ratio": ratios(),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(numbers()) + "\n", encoding="utf-8")
