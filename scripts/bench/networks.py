"""What `accelerate` gains in a gradient penalty on torchvision's networks, against stock torch in its better memory layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from joblib import cpu_count
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.steps import LAYOUTS
from bench.timing import medians
from gradexp import accelerate
from gradexp.report.writing import table_lines

NAMES = ("resnet18", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_b_16")
SIZE = 128


@dataclass(frozen=True)
class Row:
    """Milliseconds an image, with network and images in one memory layout; plain: cross-entropy alone, in the better one."""

    model: str
    threads: int
    batch: int
    plain: float
    stock_channels_last: float
    stock_contiguous: float
    ours_channels_last: float
    ours_contiguous: float

    @property
    def best(self) -> float:
        return min(self.ours_channels_last, self.ours_contiguous)

    @property
    def gain(self) -> float:
        return min(self.stock_channels_last, self.stock_contiguous) / self.best


def make_step(model: nn.Module, images: Tensor, *, penalty: bool, fused: bool = True) -> Callable[[], None]:
    """A step without its optimizer. fused: not for stock attention, whose fused kernels are differentiable once."""
    labels = torch.zeros(len(images), dtype=torch.long)

    def step() -> None:
        model.zero_grad()
        context: AbstractContextManager[Any] = nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
        with context:
            inputs = images.detach().requires_grad_(penalty)
            logits = model(inputs)
            loss = functional.cross_entropy(logits, labels)
            if penalty:
                (gradient,) = torch.autograd.grad(logits[:, 0].sum(), inputs, create_graph=True)
                loss = loss + gradient.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]

    return step


def measure(name: str, *, threads: int, batch: int, rounds: int, size: int = SIZE) -> Row:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    options = {"image_size": size} if name.startswith("vit") else {}
    network = torchvision.models.get_model(name, weights=None, **options)
    steps = {}
    for layout, memory in LAYOUTS.items():
        images = torch.randn(batch, 3, size, size).contiguous(memory_format=memory)
        stock = copy.deepcopy(network).to(memory_format=memory)
        steps["plain", layout] = make_step(stock, images, penalty=False)
        steps["stock", layout] = make_step(stock, images, penalty=True, fused=False)
        steps["ours", layout] = make_step(accelerate(copy.deepcopy(stock)), images, penalty=True)
    seconds, _ = medians(steps, rounds=rounds, cuda=False)
    times = {way: 1000 * value / batch for way, value in seconds.items()}
    plain = min(times["plain", layout] for layout in LAYOUTS)
    return Row(name, threads, batch, plain, *(times[way, layout] for way in ("stock", "ours") for layout in LAYOUTS))


def rows(*, rounds: int, names: Sequence[str] = NAMES) -> list[Row]:
    counts = sorted({1, cpu_count()})
    try:
        return [measure(name, threads=n, batch=batch, rounds=rounds) for name in names for n in counts for batch in (1, 16)]
    finally:
        torch.set_num_threads(cpu_count())


def markdown(measured: Sequence[Row]) -> str:
    """One row a network, number of threads and batch size."""
    lines = [
        "# Gradient penalties on other networks",
        "",
        f"Cross-entropy plus the squared norm of an input-gradient, {SIZE} x {SIZE} pixels, fp32, both passes. "
        "Step: to cross-entropy alone with stock torch. Gain: of `accelerate` over stock torch, each in its better layout.",
        "",
    ]
    head = ["model", "threads", "batch", "stock, channels_last (ms an image)", "stock, contiguous"]
    head += ["accelerated, channels_last", "accelerated, contiguous", "gain", "step"]
    rows = []
    for row in measured:
        times = row.stock_channels_last, row.stock_contiguous, row.ours_channels_last, row.ours_contiguous
        shares = f"{row.gain:.2f}", f"{row.best / row.plain:.2f}"
        rows.append([row.model, row.threads, row.batch, *(f"{time:.0f}" for time in times), *shares])
    return "\n".join([*lines, *table_lines(head, rows)]) + "\n"
