"""Steps on a device other than the CPU, with none at hand: fake tensors refuse to mix devices, and compute nothing."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradexp.base.errors import UserError
from gradexp.data.loader import TensorLoader
from gradexp.data.sources import Split
from gradexp.engine.assemble import accelerate, make_terms
from gradexp.engine.build import build
from gradexp.engine.command_line import refuse_copies
from gradexp.engine.compose import compose_run
from gradexp.sampling import Ascent
from gradexp.terms.targets import Targets
from gradexp.training.classifier import Classifier
from gradexp.training.distillation import Distillation

ELSEWHERE = torch.device("meta")
HARDWARE: Any = SimpleNamespace(kind="gpu")
METHODS = [
    *(("jacobian_distill", method) for method in ("ce", "ce_a_j", "a_j")),
    *(("fullgrad_distill", method) for method in ("fg_att", "ig_att")),
    *(("bias_gradient", method) for method in ("dropout", "bias_decay", "bias_gradient")),
    *(("score_matching", method) for method in ("score_matching", "anti_score_matching", "half_gradient_norm")),
    ("fooling", "fooling"),
]


@pytest.fixture
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Inside, tensors are fake; autocast, which does not know their device, is off."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def loader(size: int = 32) -> TensorLoader:
    split = Split(np.zeros((12, 3, size, size), dtype=np.uint8), np.arange(12) % 10)
    half = torch.full((3,), 0.5)
    options = {"batch_size": 6, "shuffle": True, "flip": True, "crop": 4, "device": ELSEWHERE}
    return TensorLoader(split, np.arange(12), mean=half, std=half, **options)


def network(node: Any) -> nn.Module:
    with torch.device(ELSEWHERE):
        model: nn.Module = build(node, where="model")
    return model


@pytest.mark.usefixtures("_elsewhere")
def test_fake_tensors_refuse_to_mix_devices() -> None:
    """What the tests below rest on."""
    with pytest.raises(RuntimeError):
        torch.zeros(3, device=ELSEWHERE) + torch.zeros(3)


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(("experiment", "method"), METHODS)
def test_a_step_stays_on_its_device(experiment: str, method: str) -> None:
    config = compose_run([f"experiment={experiment}", f"method={method}", "scale=quick", "scale.width=0.05"])
    student, images, terms = network(config["model"]), loader(), make_terms(config)
    common: dict[str, Any] = {"steps_per_pass": 10**9, "seed": 0}
    optim = build(config["optim"], where="optim")
    teacher = network(config["upstream"]["teacher"]["model"]) if "teacher" in config["upstream"] else None
    for term in terms.values():
        term.resolve_layers(student, teacher, images.example)
    accelerate(student, terms, HARDWARE)
    module: Classifier
    if teacher is None:
        module = Classifier(student, terms, optim, **common)
    else:
        layers = list(dict.fromkeys(layer for term in terms.values() for layer in term.teacher_layers))
        targets = Targets(teacher, with_gradient=True, layers=layers)
        module = Distillation(student, terms, optim, targets=targets, angle=config["method"].get("angle"), **common)
    loss = module.training_step(next(iter(images)), 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.device.type == ELSEWHERE.type
    assert all(parameter.grad is None or parameter.grad.device == parameter.device for parameter in student.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.usefixtures("_elsewhere")
def test_sampling_stays_on_its_device() -> None:
    model = network(compose_run(["experiment=score_matching", "scale=quick"])["model"]).eval()
    ascent = Ascent(steps=2, rate=0.1, pull=0.01, langevin=1.0, start=(0.5, 0.2), noise=0.1)
    labels = torch.zeros(3, dtype=torch.long, device=ELSEWHERE)
    assert ascent.sample(model, labels, range(3), (3, 32, 32)).device.type == ELSEWHERE.type


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"},
            "2 times, .* without torchrun: .* seed=1 trainer=ddp trainer.devices=2$",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"},
            "8 times, .* without srun: .* trainer=ddp trainer.devices=4 trainer.num_nodes=2$",
        ),
    ],
)
def test_copies_of_one_command_are_refused_with_the_command_that_works(environment: dict[str, str], command: str) -> None:
    words = ["experiment=teacher", "seed=1", "trainer=ddp", "trainer.devices=2"]
    with pytest.raises(UserError, match=command):
        refuse_copies(words, environment)
    refuse_copies(words, {"WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"})
