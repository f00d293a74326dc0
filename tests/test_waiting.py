"""Nothing in a training step waits for the device, or copies from one device to the other.

The meta device stands for a GPU: a tensor on it can't be read, and a copy from the CPU to it is seen as such.
"""

import math
from collections.abc import Callable
from typing import Any

import gpu_check
import numpy as np
import pytest
import torch
from bench import steps
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradexp import layers
from gradexp.data.loader import Batch, TensorLoader
from gradexp.data.sources import Split
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.terms import CrossEntropy, Term
from gradexp.terms.targets import Targets
from gradexp.training import classifier
from gradexp.training.distillation import Distillation

META = torch.device("meta")
WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "equal", "item")


class Watch(TorchDispatchMode):
    """Notes operations that wait for the device, and copies between devices: {name: how often}."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given, made = (
            {leaf.device.type for leaf in tree_leaves(part) if isinstance(leaf, Tensor)} for part in ((args, kwargs), out)
        )
        if name in WAITING and "meta" in given:
            self.seen.append(name)
        if name in ("_to_copy", "copy_") and len(given | made) > 1:
            self.seen.append(f"{name} {'non_blocking' if (kwargs or {}).get('non_blocking') else 'blocking'}")
        return out


def make_step(kind: str, model: str) -> Callable[[], None]:
    terms: dict[str, Term] = {"ce": CrossEntropy(weight=1), **gpu_check.KINDS[kind]()}
    with META:
        student, teacher = (steps.network(name, 0.1) for name in (model, "vgg9"))
        images, labels = torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
        for term in terms.values():
            term.resolve_layers(student, teacher, images[:1])
    names = list(dict.fromkeys(layer for term in terms.values() for layer in term.teacher_layers))
    targets = Targets(layers.accelerate(teacher), with_gradient=True, layers=names)
    optim = build(compose_run(["experiment=jacobian_distill"])["optim"], where="optim")
    student = layers.accelerate(student)
    module = Distillation(student, terms, optim, steps_per_pass=1, seed=0, targets=targets).train()
    teacher.eval()
    rows = torch.arange(4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)

    def step() -> None:
        loss = module._loss(Batch(images, labels, rows, rows))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


@pytest.mark.parametrize("model", ["vgg4", "resnet18"])
@pytest.mark.parametrize("kind", gpu_check.KINDS)
def test_a_step_does_not_wait(kind: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the loss of a pass, which is one step here; losses are read about once a second."""
    monkeypatch.setattr(classifier, "READ_EVERY", math.inf)
    step = make_step(kind, model)
    with Watch() as watch:
        step()
    assert not watch.seen


def test_losses_are_read_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a tensor of the meta device can't be."""
    monkeypatch.setattr(classifier, "READ_EVERY", 0)
    with pytest.raises(NotImplementedError, match="meta"):
        make_step("ce", "vgg4")()


def test_a_wait_and_a_copy_are_seen() -> None:
    with Watch() as watch:
        torch.zeros(3).to(META)
        with pytest.raises(RuntimeError):
            bool(torch.zeros((), device=META) > 0)
        torch.ones(3).to(META, non_blocking=True)
    assert watch.seen[0] == "_to_copy blocking" and watch.seen[-1] == "_to_copy non_blocking"


def test_order_and_views_are_sent_ahead() -> None:
    """Once each for a batch, and without waiting."""
    split = Split(np.zeros((8, 3, 32, 32), dtype=np.uint8), np.zeros(8, dtype=np.int64))
    half = torch.full((3,), 0.5)
    loader = TensorLoader(split, np.arange(8), batch_size=4, mean=half, std=half, shuffle=True, flip=True, crop=4, device=META)
    with Watch() as watch:
        batch = next(loader.batches(0))
    assert watch.seen == ["_to_copy non_blocking"] * 2
    assert batch.row.device.type == batch.view.device.type == "cpu" and batch.images.device == META


def test_a_batch_keeps_its_order_on_the_cpu() -> None:
    """Lightning would move it to the device, from which reading a stored target's place would have to wait for it."""
    module = Distillation(
        nn.Linear(2, 2), {}, build(compose_run(["experiment=teacher"])["optim"], where="optim"), steps_per_pass=1, seed=0
    )
    moved = module.transfer_batch_to_device(Batch(torch.zeros(2, 2), *torch.zeros(3, 2, dtype=torch.long)), META, 0)
    assert [values.device.type for values in moved[:4]] == ["meta", "meta", "cpu", "cpu"]
