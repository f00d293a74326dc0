"""What the trainer adds to a loop written by hand."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.nn import functional

from bench.steps import images, network
from gradexp.data.loader import TensorLoader, TrainingStream
from gradexp.engine.assemble import accelerate, make_optim
from gradexp.engine.callbacks import Checkpointer, ProgressLine
from gradexp.engine.compose import compose_run
from gradexp.engine.fit import fit
from gradexp.engine.hardware import Hardware
from gradexp.report.writing import table_lines
from gradexp.terms import CrossEntropy, Term
from gradexp.training.classifier import Classifier
from gradexp.training.optim import Optim


@dataclass(frozen=True)
class Row:
    """Cross-entropy steps in a bare loop, and the same steps by the trainer."""

    per_class: int
    precision: str
    bare: float  # images/s
    trained: float  # images/s

    @property
    def overhead(self) -> float:
        """Percent."""
        return 100 * (self.bare / self.trained - 1)


def measure(per_class: int, hardware: Hardware, *, steps: int, rounds: int) -> Row:
    """VGG-4 on images of CIFAR-100's shape: a loop written by hand and the trainer take turns; medians of `rounds`."""
    hardware.apply()
    loader = images(100 * per_class)
    shown = sum(len(batch.labels) for batch in TrainingStream(loader, steps))
    seconds: dict[str, list[float]] = {"bare": [], "trained": []}
    for _ in range(rounds):
        seconds["bare"].append(_bare_loop(loader, hardware, steps))
        seconds["trained"].append(_trainer_loop(loader, hardware, steps))
    bare, trained = (shown / statistics.median(values) for values in seconds.values())
    return Row(per_class, hardware.precision, bare, trained)


def _optim(steps: int) -> Optim:
    return make_optim(compose_run(["experiment=jacobian_distill", "optim.passes=null", f"optim.steps={steps}"]))


def _bare_loop(loader: TensorLoader, hardware: Hardware, steps: int) -> float:
    """Seconds of a loop with nothing in it but the model, its loss and its optimizer."""
    student = accelerate(hardware.place(network("vgg4")), {}, hardware)
    optimizer, schedule = _optim(steps).build(list(student.parameters()), steps)
    begun = time.perf_counter()
    for batch in TrainingStream(loader, steps):
        with hardware.autocast():
            loss = functional.cross_entropy(student(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return time.perf_counter() - begun


def _trainer_loop(loader: TensorLoader, hardware: Hardware, steps: int) -> float:
    """Seconds between the first and the last step of a training as a run does it: terms, curves, progress, trainer."""
    terms: dict[str, Term] = {"ce": CrossEntropy(weight=1)}
    student = accelerate(hardware.place(network("vgg4")), terms, hardware)
    module = Classifier(student, terms, _optim(steps), steps_per_pass=len(loader), seed=0)
    progress = ProgressLine("bench", steps)
    with tempfile.TemporaryDirectory() as folder:  # one a loop: nothing to go on from
        checkpointer = Checkpointer(Path(folder) / "last.ckpt", every=hardware.checkpoint_every)
        fit(module, TrainingStream(loader, steps), hardware, None, checkpointer, progress)
    return progress.seconds


def markdown(rows: Sequence[Row]) -> str:
    lines = ["The trainer beside a loop written by hand (VGG-4, cross-entropy, images/s):", ""]
    cells = [(x.per_class, x.precision, f"{x.bare:.0f}", f"{x.trained:.0f}", f"{x.overhead:.1f} %") for x in rows]
    lines += table_lines(("images per class", "precision", "by hand", "trainer", "overhead"), cells)
    return "\n".join(lines) + "\n"
