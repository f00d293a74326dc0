"""What a training step costs: against a cross-entropy step, and against stock torch in its best memory layout.

All steps of a model are interleaved in one process. The number beside each ratio counts the multiply-adds of convolutions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.timing import medians, peak_memory
from gradexp import gradients
from gradexp.data.loader import TensorLoader
from gradexp.data.sources import Split
from gradexp.engine.assemble import accelerate, declare_hardware, make_model, make_optim, make_terms
from gradexp.engine.compose import compose_run
from gradexp.engine.hardware import Hardware
from gradexp.report.writing import table_lines
from gradexp.terms import CrossEntropy, Term
from gradexp.terms.targets import Targets
from gradexp.training.distillation import Distillation
from gradexp.training.targets import StoredTargets, live_targets

BATCH = 128
IMAGES = 256  # two batches: enough to give every step new images
EXAMPLE = torch.zeros(1, 3, 32, 32)


@dataclass(frozen=True)
class Kind:
    """One kind of step: whose terms it has beside cross-entropy, and where its teacher's targets come from."""

    name: str
    method: str | None = None
    teacher: str = "none"  # none | live | stored
    compared: bool = False  # whether stock torch does the step as well, in both layouts
    passes: float = 3  # convolution passes over the student: 3 for forward, weight- and input-gradient
    late_passes: float = 0  # over what lies behind the first convolution of its last block
    teacher_passes: float = 0


def terms_of(method: str | None) -> dict[str, Term]:
    """The terms of a method beside cross-entropy, as its runs have them."""
    if method is None:
        return {}
    config = compose_run(["experiment=teacher", f"method={method}", "+upstream.teacher.experiment=teacher"])
    return {name: term for name, term in make_terms(config).items() if name != "cross_entropy"}


KINDS = (
    Kind("ce", compared=True),
    Kind("a, live teacher", "a", "live", teacher_passes=1),
    Kind("a, stored targets", "a", "stored"),
    Kind("j, live teacher", "ce_j", "live", passes=6, teacher_passes=2),
    Kind("j, stored targets", "ce_j", "stored", compared=True, passes=6),
    Kind("gradient norm", "gradient_norm", compared=True, passes=6),
    Kind("attention, stored targets", "att", "stored"),
    Kind("fg_att, live teacher", "fg_att", "live", passes=6, teacher_passes=2),
    Kind("fg_att, stored targets", "fg_att", "stored", compared=True, passes=6),
    Kind("bias-gradient", "bias_gradient", compared=True, late_passes=3),
    Kind("score-matching", "score_matching", compared=True, passes=9),
    Kind("anti-score-matching", "anti_score_matching", compared=True, passes=6),
)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MODELS = {"vgg4": 1.0, "vgg9": 1.0, "vgg11": 1.0, "resnet18": 0.25}


@dataclass(frozen=True)
class Row:
    model: str
    precision: str
    kind: str
    images_per_second: float
    ratio: float  # to the model's cross-entropy step
    products: float  # the same ratio, in multiply-adds of convolutions
    matrix_share: float  # of the rate of a product of two large matrices that the step's convolutions reach
    stock: float | None  # images per second of stock torch in its better layout
    stock_layout: str | None
    peak_memory_mib: int | None
    samples: int = 0  # that the median is of


def network(name: str, width: float | None = None) -> nn.Module:
    """width: None for that of MODELS."""
    config = compose_run(["experiment=teacher", f"model={name}", f"scale.width={MODELS[name] if width is None else width}"])
    return make_model(config)


def images(count: int = IMAGES) -> TensorLoader:
    """Noise in the shape of CIFAR-100; a step's cost does not depend on what it sees."""
    split = Split(np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), np.arange(count) % 100)
    half = torch.full((3,), 0.5)
    return TensorLoader(split, np.arange(count), batch_size=BATCH, mean=half, std=half, shuffle=True, flip=True, crop=4)


def make_step(
    kind: Kind, model: str, hardware: Hardware, loader: TensorLoader, folder: Path, stock_layout: str | None = None
) -> Callable[[], None]:
    """A function that does one training step, as the trainer would, or with stock torch's layers in `stock_layout`."""
    torch.manual_seed(0)
    student = hardware.place(network(model))
    terms = {"ce": CrossEntropy(weight=1), **terms_of(kind.method)}
    teacher = None if kind.teacher == "none" else hardware.place(network("vgg9")).eval()
    for term in terms.values():
        term.resolve_layers(student, teacher, loader.example)
    if stock_layout:
        student.to(memory_format=LAYOUTS[stock_layout])
    else:
        accelerate(student, terms, hardware)
        if teacher is not None:
            accelerate(teacher, {}, hardware)
    optim = make_optim(compose_run(["experiment=jacobian_distill"]))
    targets = _targets(kind, teacher, terms, hardware, loader, folder / f"{kind.name} {stock_layout}") if teacher else None
    module = Distillation(student, terms, optim, steps_per_pass=10**9, seed=0, targets=targets)
    optimizer, _ = optim.build(list(student.parameters()), 10**9)
    layout = LAYOUTS[stock_layout or "channels_last"]
    batches = [batch._replace(images=batch.images.contiguous(memory_format=layout)) for batch in loader]
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        with hardware.autocast():
            loss = module.training_step(batches[count % len(batches)], count)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _targets(
    kind: Kind, teacher: nn.Module, terms: dict[str, Term], hardware: Hardware, loader: TensorLoader, folder: Path
) -> Targets:
    target = next((term.gradient_target for term in terms.values() if term.needs_input_gradient), None)
    live = live_targets(teacher, terms.values())
    if kind.teacher == "live":
        return live
    maps = list(dict.fromkeys(wanted for term in terms.values() for wanted in term.teacher_maps))
    with hardware.autocast():
        return StoredTargets(live, loader, len(loader), folder, target=target, maps=maps)


def _costs(model: nn.Module) -> dict[str, float]:
    """Multiply-adds of one image's forward pass, {convolution: cost}, in the order of their calls."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad(), gradients.captured(model.eval(), names) as outputs:
        model(EXAMPLE)
    return {name: output[0].numel() * model.get_submodule(name).weight[0].numel() for name, output in outputs.items()}  # type: ignore[index]


def convolutions(model: nn.Module) -> tuple[float, float]:
    """Multiply-adds of one image's forward pass: in all convolutions, and in the first one alone."""
    costs = list(_costs(model).values())
    return sum(costs), costs[0]


def late_convolutions(model: nn.Module) -> float:
    """Multiply-adds behind the first convolution of the last block."""
    costs = _costs(model)
    first = list(costs).index(str(gradients.find_layer(model, "last block", EXAMPLE).before))
    return sum(list(costs.values())[first + 1 :])


def work(kind: Kind, model: str) -> float:
    """Multiply-adds of a step's convolutions, per image.

    The ordinary backward pass needs no input-gradient at the first convolution; that saves one pass over it for each
    forward pass that is not differentiated with respect to the images.
    """
    all_layers, first = convolutions(network(model))
    late = late_convolutions(network(model)) if kind.late_passes else 0
    teacher, _ = convolutions(network("vgg9"))
    saved = 2 if kind.name in ("score-matching", "anti-score-matching") else 1
    return kind.passes * all_layers + kind.late_passes * late - saved * first + kind.teacher_passes * teacher


def products(kind: Kind, model: str) -> float:
    """The ratio to a cross-entropy step, in multiply-adds of convolutions."""
    return work(kind, model) / work(KINDS[0], model)


def matrix_rate(hardware: Hardware, size: int = 2048) -> float:
    """Multiply-adds a second of a product of two large square matrices, in the hardware's precision."""
    dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float32
    left, right = torch.randn(2, size, size, device=hardware.device).to(dtype)
    seconds, _ = medians({"product": lambda: left @ right}, rounds=20, cuda=hardware.kind == "gpu")
    return size**3 / seconds["product"]


def measure(model: str, hardware: Hardware, kinds: Sequence[Kind], *, rounds: int, memory: bool, budget: float) -> list[Row]:
    """Medians over `rounds` rounds, each of which does every kind of step once; fewer when `budget` seconds are over."""
    hardware.apply()
    loader = images()
    rate = matrix_rate(hardware)
    with tempfile.TemporaryDirectory() as folder:
        ways = [(kind, layout) for kind in kinds for layout in (None, *(LAYOUTS if kind.compared else ()))]
        steps = {(kind.name, layout): make_step(kind, model, hardware, loader, Path(folder), layout) for kind, layout in ways}
        seconds, samples = medians(steps, rounds=rounds, cuda=hardware.kind == "gpu", budget=budget)
    rows = []
    for kind in kinds:
        ratio = seconds[kind.name, None] / seconds["ce", None]
        peak = peak_memory(three_steps, kind.name, model, hardware.precision) if memory else None
        speed = BATCH / seconds[kind.name, None]
        layout = min(LAYOUTS, key=lambda name: seconds[kind.name, name]) if kind.compared else None
        stock = BATCH / seconds[kind.name, layout] if layout else None
        share = work(kind, model) * speed / rate
        counted = products(kind, model)
        rows.append(Row(model, hardware.precision, kind.name, speed, ratio, counted, share, stock, layout, peak, samples))
    return rows


def three_steps(kind: str, model: str, precision: str) -> None:
    chosen = next(candidate for candidate in KINDS if candidate.name == kind)
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(chosen, model, make_hardware(precision), images(), Path(folder))
        for _ in range(3):
            step()


def make_hardware(precision: str) -> Hardware:
    return declare_hardware(compose_run(["experiment=teacher", f"trainer.precision={precision}"]))


def markdown(rows: Sequence[Row], facts: dict[str, Any], has_bf16: bool) -> str:
    lines = [
        "# The cost of a step",
        "",
        f"{facts['device']}, {facts['threads']} threads, torch {facts['versions']['torch']}, batch {facts['batch']}; medians "
        f"of {min(row.samples for row in rows)} or more interleaved steps. `make bench` measures it again.",
        "",
        "- Ratio: to the time of the same model's cross-entropy step. Products: the same, of multiply-adds of convolutions.",
        "- Matrix rate: multiply-adds of the step's convolutions per second, as a share of those of a product of two 2048 x "
        "2048 matrices. Winograd's algorithm does with fewer products than are counted here.",
        "- Stock: torch's own layers and double backward pass in the memory layout that is faster for this step "
        "(channels_last, unless marked c for contiguous). Gain: images/s divided by those of stock. MiB: peak memory of "
        "a process that does three steps.",
        *([] if has_bf16 else ["- This processor has no bf16 arithmetic; only fp32 is measured."]),
        "",
    ]
    head = ("model", "precision", "step", "images/s", "ratio", "products", "matrix rate", "stock", "gain", "MiB")
    return "\n".join([*lines, *table_lines(head, map(_cells, rows))]) + "\n"


def _cells(row: Row) -> list[str]:
    mark = " c" if row.stock_layout == "contiguous" else ""
    stock = [f"{row.stock:.0f}{mark}", f"{row.images_per_second / row.stock:.2f}"] if row.stock else ["", ""]
    numbers = [f"{row.images_per_second:.0f}", f"{row.ratio:.2f}", f"{row.products:.2f}", f"{100 * row.matrix_share:.0f} %"]
    memory = "" if row.peak_memory_mib is None else str(row.peak_memory_mib)
    return [row.model, row.precision, row.kind, *numbers, *stock, memory]
