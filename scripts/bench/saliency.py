"""What a FullGrad map costs: against one forward and one backward of its model, and against the grad-cam package."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from bench.steps import make_hardware
from bench.timing import medians, peak_memory
from gradexp.engine.assemble import accelerate, make_model
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.hardware import Hardware
from gradexp.report.writing import table_lines
from gradexp.saliency import FullGrad

FORWARD_BACKWARD = "forward + input-gradient"
PACKAGE = "FullGrad of grad-cam"
LARGE = {  # of torchvision, at 224 pixels: the batch sizes
    "resnet18": (1, 16),
    **dict.fromkeys(("vgg16_bn", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_b_16"), (8,)),
}


@dataclass(frozen=True)
class Row:
    model: str
    batch: int
    what: str
    images_per_second: float | None
    ratio: float | None  # of its time to forward + input-gradient
    peak_memory_mib: int | None


def network(name: str) -> nn.Module:
    """Random weights: what a map costs does not depend on them."""
    if name in LARGE:
        return torchvision.models.get_model(name, weights=None)
    return make_model(compose_run(["experiment=teacher", f"model={name}"]))


def frozen(name: str, hardware: Hardware) -> nn.Module:
    """Placed and frozen, as in every run."""
    return hardware.place(network(name)).eval().requires_grad_(False)


def fullgrad() -> FullGrad:
    return build(compose_run(["experiment=saliency_gallery", "saliency=fullgrad"])["saliency"], where="saliency")


def ours(stock: nn.Module, images: Tensor, hardware: Hardware) -> dict[str, Callable[[], Any]]:
    """A forward and an input-gradient, and a map, with our layers, as in every run."""
    model = accelerate(copy.deepcopy(stock), {}, hardware)

    def forward_backward() -> None:
        inputs = images.detach().requires_grad_()
        torch.autograd.grad(model(inputs).max(1).values.sum(), inputs)

    method = fullgrad()
    return {FORWARD_BACKWARD: forward_backward, "FullGrad": lambda: method(model, images)}


def theirs(stock: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """A map of the package, where it is installed, with torch's own layers. Its hooks stay on `stock`."""
    if not importlib.util.find_spec("pytorch_grad_cam"):
        return {}
    from pytorch_grad_cam import FullGrad as Theirs

    package = Theirs(stock, [])
    return {PACKAGE: lambda: package(images, None)}


def measure(name: str, hardware: Hardware, *, batch: int, size: int, rounds: int) -> list[Row]:
    """Medians over `rounds` interleaved rounds after one that warms up; the package has rounds of its own.

    It leaves the caches and the allocator in another state, which what came after it in a round would pay for.
    """
    hardware.apply()
    model = frozen(name, hardware)
    images = torch.randn(batch, 3, size, size, device=hardware.device).contiguous(memory_format=torch.channels_last)
    groups = ours(model, images, hardware), theirs(model, images)
    seconds = dict[str, float]()
    for group in filter(None, groups):
        seconds |= medians(group, rounds=rounds, cuda=hardware.kind == "gpu")[0]
    base = seconds[FORWARD_BACKWARD]
    return [Row(name, batch, what, batch / median, median / base, None) for what, median in seconds.items()]


def one_map(name: str, batch: int, size: int) -> None:
    hardware = make_hardware("32")
    fullgrad()(accelerate(frozen(name, hardware), {}, hardware), torch.randn(batch, 3, size, size, device=hardware.device))


def rows(hardware: Hardware, *, quick: bool) -> list[Row]:
    measured = measure("vgg9", hardware, batch=64, size=32, rounds=2 if quick else 7)
    if quick:
        return measured
    for name, batch in ((name, batch) for name, batches in LARGE.items() for batch in batches):
        base, ours, *package = measure(name, hardware, batch=batch, size=224, rounds=3)
        measured += [base, replace(ours, peak_memory_mib=peak_memory(one_map, name, batch, 224)), *package]
    return measured


def markdown(measured: list[Row]) -> str:
    lines = [
        "# The cost of a map",
        "",
        "fp32, frozen, with our layers, as in every run; grad-cam with torch's own. Ratio: of the time to one forward and one "
        "input-gradient of the same model.",
        *([] if any(row.what == PACKAGE for row in measured) else ["Not installed: grad-cam (`pip install -e '.[bench]'`)."]),
        "",
    ]
    rows = []
    for row in measured:
        speed = "" if row.images_per_second is None else f"{row.images_per_second:.1f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        peak = "" if row.peak_memory_mib is None else str(row.peak_memory_mib)
        rows.append([row.model, row.batch, row.what, speed, ratio, peak])
    head = ("model", "batch", "what", "images/s", "ratio", "peak memory (MiB)")
    return "\n".join([*lines, *table_lines(head, rows)]) + "\n"
