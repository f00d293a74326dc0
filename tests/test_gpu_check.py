"""make gpu-check, on a machine without a GPU: it passes, and it fails where a step is wrong."""

from typing import Any

import gpu_check
import pytest
import torch
from gpu_check import Setting

CPU = [Setting(torch.device("cpu"))]


@pytest.mark.parametrize("kind", ["bias-gradient", "score-matching"])
def test_a_step_of_the_cpu_is_that_in_float64(kind: str) -> None:
    (check,) = gpu_check.check_step(kind, "vgg4", 0.1, CPU, timed=False)
    assert check.passed and max(check.errors) < 1e-3


def test_every_term_counts() -> None:
    """A term that is 0, as of biases that are 0, would check nothing."""
    losses = {kind: float(gpu_check.make_step(kind, "vgg4", 0.1, 4, None)()[0]) for kind in gpu_check.KINDS}
    assert len({round(loss, 6) for loss in losses.values()}) == len(losses)


def test_a_wrong_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = gpu_check.make_step

    def wrong(kind: str, model: str, width: float, images: int, setting: Setting | None) -> Any:
        loss, gradients = original(kind, model, width, images, setting)()
        return lambda: (loss, [1.05 * each for each in gradients] if setting else gradients)

    monkeypatch.setattr(gpu_check, "make_step", wrong)
    (check,) = gpu_check.check_step("ce", "vgg4", 0.1, CPU, timed=False)
    assert check.passed is False


def test_checks_that_are_not_reached_are_counted() -> None:
    made, late = gpu_check.run(torch.device("cpu"), -1.0, lambda check: None)
    assert not made and late == len(gpu_check.checks(torch.device("cpu")))
