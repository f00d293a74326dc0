"""make gpu-check: whether training steps and saliency maps on this GPU are those of the CPU in float64, and what they cost.

Takes five minutes at most. Without a GPU, the CPU in float32 is checked against itself in float64, on small networks. Prints a
table and writes results/gpu_check.json. Exit code 1 if a check failed, or was not reached in time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import reliability
import torch
from bench import steps
from pandas import read_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gradexp import layers, saliency
from gradexp.base.files import write_atomically
from gradexp.data.loader import Batch, TensorLoader
from gradexp.data.sources import Split
from gradexp.engine.assemble import make_optim
from gradexp.engine.build import build
from gradexp.engine.clocks import peak_memory_mib
from gradexp.engine.compose import compose_run
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.origin import git_state, versions
from gradexp.engine.run import ROOT
from gradexp.layers import ranks
from gradexp.terms import AttentionJacobian, CrossEntropy, Fooling, Term
from gradexp.training.distillation import Distillation
from gradexp.training.targets import live_targets

DDP_TOLERANCES = 1e-4, 1e-2  # of the first loss, recorded with five digits; of all: Adam divides small gradients by their size
EQUAL = 1e-5  # relative error of numbers that are the same but for the order of a GPU's sums
LIMIT = 270.0  # seconds after which no further check begins
IMAGES = 8  # of a comparison; the speed is that of steps.BATCH
MODELS = ("vgg4", "vgg9", "vgg11", "resnet18", "resnet34")
SALIENCY = sorted(file.stem for file in (ROOT / "conf" / "saliency").glob("*.yaml"))
ATTENTION: dict[str, Any] = {
    "student_layers": ["block 2"],
    "teacher_layers": ["block 2"],
    "level": 1,
    "window": "s/5",
    "student_bn": "batch",
}
KINDS: dict[str, Callable[[], dict[str, Term]]] = {
    "ce": dict,
    "jacobian": partial(steps.terms_of, "ce_j"),
    "fg_att": partial(steps.terms_of, "fg_att"),
    "attention-Jacobian": lambda: {"jacobian": AttentionJacobian(weight=1, **ATTENTION)},
    "gradient-norm": partial(steps.terms_of, "gradient_norm"),
    "bias-gradient": partial(steps.terms_of, "bias_gradient"),
    "score-matching": partial(steps.terms_of, "score_matching"),
    "anti-score-matching": partial(steps.terms_of, "anti_score_matching"),
    "fooling": lambda: {"fooling": Fooling(weight=1000, mask=8, target="label", student_bn="batch")},
}
# Largest errors of: the loss, relative; the direction of all parameter gradients together, 1 - cosine; their norm, relative.
# Rounding errors grow with depth and where ReLUs and max-pools switch between values that almost agree. Each is about twice the
# largest error of these networks and steps on a CPU that rounds what a GPU rounds (tests/test_gpu_check.py): in TF32 factors to
# 10 bits; in bf16 almost everything to 7 bits. In fp32 it is ten times that: a GPU may use Winograd's algorithm.
# Gradients of a normalised saliency map are the least exact. Eq. 5.9 multiplies a difference of two logits by 2/0.01² = 2e4,
# and their rounding errors with it: these steps are in fp32 also under bf16, and no run uses TF32.
TOLERANCES = {"fp32": (3e-4, 3e-4, 1e-3), "tf32": (0.03, 0.04, 0.04), "bf16": (0.05, 0.3, 0.1)}
OTHER_TOLERANCES = {
    "fooling": {"fp32": (3e-4, 3e-4, 4e-3), "tf32": (0.03, 0.12, 0.08), "bf16": (0.05, 0.6, 0.16)},
    "score": {"fp32": (5e-3, 3e-4, 1e-3), "tf32": (0.6, 0.12, 0.08), "bf16": (5e-3, 3e-4, 1e-3)},
}
MAP_TOLERANCE = 1e-2  # of saliency maps in fp32, Euclidean norm over the batch


@dataclass(frozen=True)
class Check:
    """errors: of loss, direction and norm of the gradients, or of a map; empty for checks of behaviour.

    ratio: to a cross-entropy step.
    """

    what: str
    passed: bool | None  # None: not checked here
    errors: tuple[float, ...] = ()
    images_per_second: float | None = None
    ratio: float | None = None
    peak_memory_mib: int | None = None
    note: str = ""


# --- steps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How a step is computed. precision: `fp32`, `tf32` or `bf16`."""

    device: torch.device
    precision: str = "fp32"
    channels_last: bool = True

    def __str__(self) -> str:
        return f"{self.precision}, {'channels_last' if self.channels_last else 'contiguous'}"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """TF32 is allowed or not, forwards and backwards; without it a GPU's convolutions use it."""
        flags: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
        before = [flag.allow_tf32 for flag in flags]
        for flag in flags:
            flag.allow_tf32 = self.precision == "tf32"
        try:
            yield
        finally:
            for number, value in enumerate(before):
                flags[number].allow_tf32 = value

    def autocast(self) -> torch.autocast:
        """Of the training step; the backward pass after it is outside, as in Lightning."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def rounded(values: Tensor) -> Tensor:
    """To bf16's 7 bits: numbers that every precision has."""
    return values.bfloat16().float()


def network(name: str, width: float) -> nn.Module:
    """With random biases: those of a fresh network are 0, and so would be all that is multiplied by them."""
    model = steps.network(name, width)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn(parameter.shape) if parameter.ndim == 1 else 0.0
            parameter.copy_(rounded(parameter + noise))
    return model


def make_step(
    kind: str, model: str, width: float, images: int, setting: Setting | None, *, alone: bool = True
) -> Callable[[], tuple[Tensor, Any]]:
    """A function that computes (loss, parameter gradients) of one step. setting: None for stock layers in float64 on the CPU.

    Networks, images and noise are the same for every setting. alone: without cross-entropy, whose gradients would hide errors
    in smaller ones of the other terms.
    """
    torch.manual_seed(0)
    device = setting.device if setting else torch.device("cpu")
    dtype = torch.float32 if setting else torch.float64
    student, teacher = (network(name, width).to(dtype) for name in (model, "vgg9"))
    batch = Batch(rounded(torch.randn(images, 3, 32, 32)).to(dtype), *torch.arange(3 * images).view(3, -1).remainder(100))
    noise = rounded(torch.randn(images, 3, 32, 32))
    terms: dict[str, Term] = KINDS[kind]()
    if not (terms and alone):
        terms = {"ce": CrossEntropy(weight=1), **terms}
    for term in terms.values():
        term.resolve_layers(student, teacher, batch.images[:1])
    if setting:
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        student, teacher = (layers.accelerate(net.to(device)).to(memory_format=layout) for net in (student, teacher))
        batch = Batch(batch.images.to(device).contiguous(memory_format=layout), batch.labels.to(device), batch.row, batch.view)
    options: dict[str, Any] = {"steps_per_pass": 10**9, "seed": 0}
    if any(term.needs_teacher for term in terms.values()):
        options["targets"] = live_targets(teacher, terms.values())
    optim = make_optim(compose_run(["experiment=jacobian_distill"]))
    module = Distillation(student, terms, optim, **options).train()
    teacher.eval()
    parameters = list(student.parameters())

    def step() -> tuple[Tensor, Any]:
        chosen = setting or Setting(device)
        with chosen.applied():
            with chosen.autocast(), patch.object(ranks, "normal_like", lambda x: noise.to(x)):
                loss = module.training_step(batch, 0)
            return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    return step


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference, divided by that of the reference."""
    return float((value.double().cpu() - reference).norm() / reference.norm().clamp_min(1e-30))


def errors_of(
    loss: Tensor, expected: Tensor, gradients: Sequence[Tensor | None], references: Sequence[Tensor | None]
) -> tuple[float, float, float]:
    """Relative error of the loss; of all gradients together 1 - cosine, and the relative error of the norm. None is zero."""
    ours, theirs = _joined(gradients, references), _joined(references, gradients)
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    return relative(loss, expected), 1 - cosine, relative(ours.norm(), theirs.norm())


def _joined(values: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> Tensor:
    """All values as one vector, with zeros where only the others have a tensor."""
    filled = (torch.zeros_like(b) if a is None and b is not None else a for a, b in zip(values, others, strict=True))
    return torch.cat([each.double().cpu().flatten() for each in filled if each is not None])


def check_step(kind: str, model: str, width: float, settings: Sequence[Setting], timed: bool) -> Iterator[Check]:
    loss, gradients = make_step(kind, model, width, IMAGES, None)()
    for setting in settings:
        ours, theirs = make_step(kind, model, width, IMAGES, setting)()
        errors = errors_of(ours, loss, theirs, gradients)
        check = Check(f"{model}, {kind}, {setting}", within(errors, kind, setting.precision), errors)
        if timed:
            speed, memory = measure(make_step(kind, model, 1.0, steps.BATCH, setting, alone=False), setting.device)
            check = replace(check, images_per_second=speed, peak_memory_mib=memory)
        yield check


def within(errors: Sequence[float], kind: str, precision: str) -> bool:
    """Whether the errors of a step are those of rounding. False for NaN."""
    limits = next((limits for name, limits in OTHER_TOLERANCES.items() if name in kind), TOLERANCES)[precision]
    return all(error <= limit for error, limit in zip(errors, limits, strict=True))


def measure(step: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Images per second, a median of ten steps after three, and the peak memory."""
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(13):
        begun = time.perf_counter()
        step()
        if is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() // 2**20 if is_gpu else peak_memory_mib()
    return steps.BATCH / statistics.median(seconds[3:]), peak


# --- saliency, loaders, runs ------------------------------------------------------------------------------


def check_saliency(name: str, model: str, width: float, device: torch.device) -> Check:
    torch.manual_seed(0)
    explained, images = network(model, width).eval(), torch.randn(2, 3, 32, 32)
    labels = torch.tensor([3, 7])
    node = compose_run(["experiment=pixel_perturbation", "scale=quick", f"saliency={name}"])["saliency"]
    maps = []
    for dtype, place in ((torch.float64, torch.device("cpu")), (torch.float32, device)):
        net: nn.Module = explained.to(place, dtype)
        colours = {key: torch.ones(3, 1, 1, dtype=dtype, device=place) for key in ("black", "std")}
        method: saliency.Saliency = build(node, where="saliency", **colours)
        noise = torch.Generator().manual_seed(0)  # of the CPU: a GPU draws other numbers

        def normal(like: Tensor, noise: torch.Generator = noise) -> Tensor:
            return torch.randn(like.shape, generator=noise).to(like)

        def uniform(like: Tensor, noise: torch.Generator = noise) -> Tensor:
            return torch.rand(like.shape, generator=noise).to(like)

        drawn: dict[str, Any] = {"randn_like": normal, "rand_like": uniform}
        drawn["normal"] = lambda mean, std, draw=normal: mean + std * draw(std)
        with Setting(device).applied(), patch.multiple(torch, **drawn):
            maps.append(method(net, images.to(place, dtype), labels.to(place)))
    error = relative(maps[1], maps[0])
    return Check(f"saliency {name}, {model}", error <= MAP_TOLERANCE, (error,))


def check_loader(size: int, device: torch.device) -> Check:
    """Batches of the whole augmentation a second, with nothing else to do."""
    count = 1024 if size > 32 else 8192
    split = Split(np.zeros((count, 3, size, size), dtype=np.uint8), np.zeros(count, dtype=np.int64))
    options: dict[str, Any] = {
        "mean": torch.full((3,), 0.5),
        "std": torch.full((3,), 0.5),
        "device": device,
        "shuffle": True,
        "flip": True,
    }
    loader = TensorLoader(split, np.arange(count), batch_size=128, crop=4, **options)
    for _ in loader.batches(0):
        pass
    begun = time.perf_counter()
    *_, last = loader.batches(1)
    finite = bool(last.images.isfinite().all())  # waits for the device
    return Check(f"loader, {size} pixels", finite, images_per_second=count / (time.perf_counter() - begun))


def check_resume() -> Check:
    """A quick run that is killed after a checkpoint goes on from it, and leaves the same bytes under trainer.strict=true."""
    what = "killed and resumed, strict"
    words = ["experiment=teacher", *reliability.TINY[:-1], "logger=csv", "optim.passes=100", "trainer.checkpoint_every=0"]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = (reliability.work(Path(folder) / name, words) for name in ("whole", "killed"))
        if reliability.finish(whole):
            return Check(what, False, note=reliability.last(whole))
        process = reliability.started(killed)
        while process.is_alive() and not list(Path(folder).glob("killed/outputs/runs/*/*/last.ckpt")):
            time.sleep(0.001)
        process.kill()
        process.join()
        if reliability.finish(killed):
            return Check(what, False, note=reliability.last(killed))
        # The second attempt has a file of curves of its own, from the first step that it did.
        files = Path(folder).glob("killed/outputs/runs/*/*/csv/version_1/metrics.csv")
        first = [read_csv(file)["step"].iloc[0] for file in files]
        if not first or first[0] < 1:
            return Check(what, False, note="it did not go on from its checkpoint")
        same = reliability.left(Path(folder) / "whole") == reliability.left(Path(folder) / "killed")
    return Check(what, same, note=f"went on from step {first[0]}" if same else "other bytes than without interruption")


def check_two_processes(width: float, kind: str = "cuda") -> Check:
    """Two processes that use one device at the same time compute the same loss and gradients."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        first, second = pool.map(_digest, [(width, kind)] * 2, chunksize=1)
    error = relative(torch.tensor(first), torch.tensor(second).double())
    return Check("two processes on one device", error <= (EQUAL if kind == "cuda" else 0.0), (error,))


def _digest(given: tuple[float, str]) -> list[float]:
    """The loss of a step and the norm of its gradients."""
    torch.set_num_threads(1)
    loss, gradients = make_step("jacobian", "vgg4", given[0], IMAGES, Setting(torch.device(given[1])))()
    return [float(loss), float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm())]


def check_ddp(accelerator: str = "gpu") -> Check:
    """The loss of each step of a quick training that two devices share, against that of one."""
    what = "DDP on two devices"
    if accelerator == "gpu" and torch.cuda.device_count() < 2:
        return Check(what, None, note="there is one GPU" if torch.cuda.is_available() else "there is no GPU")
    words = ["experiment=teacher", *reliability.TINY, "optim.passes=5"]  # a pass is a step
    words += [f"trainer.accelerator={accelerator}", "trainer.precision=32"]
    with tempfile.TemporaryDirectory() as folder:
        losses = []
        for devices in (1, 2):
            place = Path(folder) / str(devices)
            task = reliability.work(place, words, f"trainer.devices={devices}")
            if reliability.finish(task):
                return Check(what, False, note=reliability.last(task))
            record = json.loads(next(place.glob("results/runs/*/*.json")).read_text())
            losses.append(torch.tensor(record["metrics"]["train/loss"]).double())
    errors = ((losses[1] - losses[0]) / losses[0]).abs().tolist()
    passed = errors[0] <= DDP_TOLERANCES[0] and max(errors) <= DDP_TOLERANCES[1]
    return Check(what, passed, (errors[0], max(errors)), note="losses of the first and of five steps")


# --- all of it --------------------------------------------------------------------------------------------


def checks(device: torch.device) -> list[Callable[[], Iterator[Check]]]:
    """All checks in order, each a function of its own, so that the last ones can be left out when time is over."""
    if device.type == "cuda":
        settings = [Setting(device, precision, layout) for precision in TOLERANCES for layout in (True, False)]
        pictures: tuple[int, ...] = (32, 224)
        pairs, width, timed = [(model, kind) for kind in KINDS for model in MODELS], 0.25, True
    else:
        settings = [Setting(device, "fp32", layout) for layout in (True, False)]
        pictures = (32,)
        pairs, width, timed = [("vgg4", kind) for kind in KINDS] + [("resnet18", "jacobian")], 0.1, False
    several: list[Callable[[], Iterator[Check]]] = []
    several += [partial(map, partial(check_saliency, model="vgg9", width=width, device=device), [name]) for name in SALIENCY]
    several += [partial(map, partial(check_loader, device=device), [size]) for size in pictures]
    behaviour = [check_resume, partial(check_two_processes, width, device.type), check_ddp]
    several += [partial(lambda check: iter([check()]), check) for check in behaviour]
    return several + [partial(check_step, kind, model, width, settings, timed) for model, kind in pairs]


def run(device: torch.device, limit: float, show: Callable[[Check], None]) -> tuple[list[Check], int]:
    """The checks, and how many groups of checks were not begun within `limit` seconds."""
    begun, made, late = time.monotonic(), list[Check](), 0
    for group in checks(device):
        if time.monotonic() - begun > limit:
            late += 1
            continue
        for check in group():
            made.append(check)
            show(check)
    speeds = {check.what: check.images_per_second for check in made if check.images_per_second}

    def with_ratio(check: Check) -> Check:
        words = check.what.split(", ")
        base = speeds.get(", ".join([words[0], "ce", *words[2:]]))
        return replace(check, ratio=base / check.images_per_second) if base and check.images_per_second else check

    return [with_ratio(check) for check in made], late


def to_table(made: Sequence[Check]) -> Table:
    table = Table("check", "", "errors", "images/s", "x ce", "MiB", "")
    for check in made:
        verdict = {True: "ok", False: "[red]FAILED[/red]", None: "-"}[check.passed]
        numbers = [check.images_per_second and f"{check.images_per_second:.0f}", check.ratio and f"{check.ratio:.2f}"]
        cells = [number or "" for number in [*numbers, check.peak_memory_mib and str(check.peak_memory_mib)]]
        table.add_row(check.what, verdict, " ".join(f"{error:.1e}" for error in check.errors), *cells, check.note)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="after which no further check begins")
    given = parser.parse_args()
    console, has_gpu = Console(width=None if os.isatty(1) else 140), torch.cuda.is_available()
    if not has_gpu:
        console.print("torch sees no GPU here: the CPU is checked against itself, on small networks")
    begun = time.monotonic()
    with exit_on_errors():
        made, late = run(
            torch.device("cuda" if has_gpu else "cpu"), given.limit, lambda check: console.print(f"  {check.what}", style="dim")
        )
        console.print(to_table(made))
        failed = sum(check.passed is False for check in made)
        console.print(f"{len(made)} checks, {failed} failed, {late} groups not reached; {time.monotonic() - begun:.0f} s")
        name = torch.cuda.get_device_name() if has_gpu else "cpu"
        facts = {"device": name, "versions": versions(), "git": git_state(), "not_reached": late}
        content = json.dumps({**facts, "checks": [asdict(check) for check in made]}, indent=1)
        write_atomically(ROOT / "results" / "gpu_check.json", content.encode() + b"\n")
    return int(failed > 0 or late > 0)


if __name__ == "__main__":
    raise SystemExit(main())
