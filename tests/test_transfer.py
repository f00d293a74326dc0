"""Chapter 2's transfer terms (§2.5): attention Jacobians against loops written by hand, and a run at scale=quick."""

import copy
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradexp.data.loader import Batch
from gradexp.errors import UserError
from gradexp.models.vgg import VGG
from gradexp.terms import AttentionJacobian, Step
from gradexp.terms.attention_jacobian import pooled, window_size
from gradexp.training.targets import LiveTargets

LAYERS = ["features.relu1", "features.relu3"]


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = VGG(name="tiny", layers=[4, "M", 5, 6], width=1, channels=2, classes=3, dropout=None).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval()


def batch(count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(count, 2, 8, 8, dtype=torch.float64, generator=generator)
    return Batch(images, torch.zeros(count, dtype=torch.long), torch.arange(count), torch.zeros(count, dtype=torch.long))


def value(student: nn.Module, teacher: nn.Module, level: int, window: str) -> Tensor:
    term = AttentionJacobian(weight=1, student_layers=LAYERS, teacher_layers=LAYERS, level=level, window=window)
    live = LiveTargets(copy.deepcopy(teacher), with_gradient=True, layers=term.teacher_layers)
    return term(Step(batch(), student, live, differentiable_input=True, student_layers=term.student_layers))


def attention(model: nn.Module, image: Tensor, depth: int, window: int) -> Tensor:
    """The pooled attention map of one image (Eq. 2.7), pixel by pixel: (positions,)."""
    features = model.features[:depth](image[None])[0]  # type: ignore[index]
    squares = features.square().sum(0)
    side = squares.shape[0] - window + 1
    return torch.stack([squares[i : i + window, j : j + window].mean() for i in range(side) for j in range(side)])


@pytest.mark.parametrize(("level", "depth", "window", "pixels"), [(1, 3, "s/3", 2), (1, 3, "none", 1), (2, 10, "full", 4)])
def test_the_attention_jacobian_is_equation_2_9(level: int, depth: int, window: str, pixels: int) -> None:
    """Twice one minus the cosine of the input-gradients of the teacher's largest pooled pixel."""
    student, teacher = net(0), net(1)
    distances = []
    for image in batch().images:
        largest = int(attention(teacher, image, depth, pixels).argmax())
        gradients = []
        for model in (student, teacher):
            x = image.clone().requires_grad_()
            gradients.append(torch.autograd.grad(attention(model, x, depth, pixels)[largest], x)[0].flatten())
        distances.append(2 * (1 - functional.cosine_similarity(*gradients, dim=0)))
    torch.testing.assert_close(value(student, teacher, level, window), torch.stack(distances).mean(), rtol=1e-9, atol=0)


def test_it_vanishes_for_a_student_that_is_its_teacher() -> None:
    assert value(net(0), net(0), 1, "s/3") < 1e-20
    assert value(net(0), net(1), 1, "s/3") > 1e-3


def test_pooling_against_a_loop() -> None:
    maps = torch.randn(2, 5, 5, dtype=torch.float64)
    by_hand = [[maps[b, i : i + 2, j : j + 2].mean() for i in range(4) for j in range(4)] for b in range(2)]
    torch.testing.assert_close(pooled(maps, "2"), torch.tensor(by_hand, dtype=torch.float64))


def test_windows_are_parts_of_the_map() -> None:
    assert [window_size(w, 16) for w in ("full", "s/3", "s/5", "s/7", "none", 4)] == [16, 5, 3, 2, 1, 4]
    with pytest.raises(UserError, match="only 8x8 pixels"):
        window_size(9, 8)
    with pytest.raises(UserError, match="full, none, s/N"):
        window_size("half", 8)


def test_a_transfer_run(run_py: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    short = ["optim.passes=2", "+upstream.teacher.optim.passes=1", "logger=none"]
    done = run_py("experiment=jacobian_transfer", "scale=quick", "method=lwf_att_j", *short)
    assert done.returncode == 0, done.stderr
    assert "finished: test/accuracy=" in done.stdout
