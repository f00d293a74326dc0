"""make gpu-check, on a machine without a GPU: it passes, and it fails where a step is wrong."""

import json
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from gpu_check import Check, Setting
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from gradexp import layers

DEVICE = torch.device("cpu")
CPU = [Setting(DEVICE)]
PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
OTHERS = ("native_batch_norm", "native_batch_norm_backward", "var_mean", "add", "mul", "sub", "div")


class Rounding(TorchDispatchMode):
    """A CPU that rounds as a GPU in TF32 (factors of products, 10 bits) or bf16 (also results and maps, 7 bits)."""

    def __init__(self, precision: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_bf16, self.dropped = precision == "bf16", 23 - (7 if precision == "bf16" else 10)

    def round(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dtype == torch.float32):
            return value
        bits = value.clone().view(torch.int32)
        bits = bits + (1 << (self.dropped - 1)) - 1 + ((bits >> self.dropped) & 1)
        return ((bits >> self.dropped) << self.dropped).view(torch.float32)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*(tree_map(self.round, args) if name in PRODUCTS else args), **(kwargs or {}))
        if self.is_bf16 and (name in PRODUCTS or (isinstance(out, Tensor) and out.ndim == 4 and name in OTHERS)):
            return tree_map(self.round, out)
        return (self.round(out[0]), *out[1:]) if self.is_bf16 and name in OTHERS and isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", ["bias-gradient", "score-matching"])
def test_a_step_of_the_cpu_is_that_in_float64(kind: str) -> None:
    (check,) = gpu_check.check_step(kind, "vgg4", 0.1, CPU, timed=False)
    assert check.passed and max(check.errors) < 1e-3


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("kind", gpu_check.KINDS)
def test_rounding_is_tolerated_and_no_more(kind: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of which a part is missing, or that are a fifth too long, are not taken for rounded ones."""
    loss, expected = gpu_check.make_step(kind, "vgg4", 0.25, gpu_check.IMAGES, None)()
    monkeypatch.setattr(layers, "accelerate", lambda model: model)  # fast convolutions round nothing
    step = gpu_check.make_step(kind, "vgg4", 0.25, gpu_check.IMAGES, CPU[0])
    if precision == "tf32" or "score" not in kind:  # which is in fp32 under bf16
        with Rounding(precision):
            ours, gradients = step()
    else:
        ours, gradients = step()

    def errors(given: Any) -> tuple[float, ...]:
        return gpu_check.errors_of(ours, loss, given, expected)

    assert gpu_check.within(errors(gradients), kind, precision)
    assert not gpu_check.within(errors([None if g is None else 1.2 * g for g in gradients]), kind, precision)
    largest = max((g for g in gradients if g is not None), key=lambda g: float(g.norm()))
    assert not gpu_check.within(errors([None if g is largest else g for g in gradients]), kind, precision)


def test_a_missing_gradient_is_an_error() -> None:
    one, two = torch.ones(3).double(), torch.ones(2).double()
    same = gpu_check.errors_of(one.sum(), one.sum(), [one, two, None], [one, two, None])
    assert same == pytest.approx((0, 0, 0))
    for wrong in ([one, None, None], [one, two, one]):
        assert min(gpu_check.errors_of(one.sum(), one.sum(), wrong, [one, two, None])[1:]) > 0.1


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


def test_tf32_is_off_both_ways_unless_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while saliency maps and gradients are computed; a GPU's convolutions use it by default."""
    seen, flag = [], torch.backends.cudnn

    def noting(original: Any) -> Any:
        return lambda *given, **options: seen.append(flag.allow_tf32) or original(*given, **options)

    monkeypatch.setattr(flag, "allow_tf32", True)
    monkeypatch.setattr(torch.autograd, "grad", noting(torch.autograd.grad))
    assert gpu_check.check_saliency("input_gradient", "vgg4", 0.1, DEVICE).passed
    gpu_check.make_step("ce", "vgg4", 0.1, 2, CPU[0])()
    assert seen and not any(seen)
    seen.clear()
    gpu_check.make_step("ce", "vgg4", 0.1, 2, Setting(DEVICE, "tf32"))()
    assert seen == [True] and flag.allow_tf32


@pytest.mark.parametrize("name", ["random", "smoothgrad", "smooth_fullgrad_reference"])
def test_maps_with_noise_are_compared(name: str) -> None:
    assert len(gpu_check.SALIENCY) == 18
    assert gpu_check.check_saliency(name, "vgg4", 0.1, DEVICE).passed


def test_a_killed_run_must_go_on_from_its_checkpoint() -> None:
    check = gpu_check.check_resume()
    assert check.passed and "went on from step" in check.note


def test_ddp_is_checked_by_the_losses_of_its_steps() -> None:
    check = gpu_check.check_ddp("cpu")
    assert check.passed and 0 <= check.errors[0] < 1e-4


def test_checks_that_are_not_reached_are_counted() -> None:
    made, late = gpu_check.run(DEVICE, -1.0, lambda check: None)
    assert not made and late == len(gpu_check.checks(DEVICE))


@pytest.mark.parametrize(("passed", "limit", "code"), [(True, 60, 0), (None, 60, 0), (False, 60, 1), (True, -1, 1)])
def test_the_exit_code(
    passed: bool | None,
    limit: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """1 where a check failed or was not reached."""
    groups = [lambda: iter([Check("one", True)]), lambda: iter([Check("two", passed, (1e-3,))])]
    monkeypatch.setattr(gpu_check, "checks", lambda device: groups)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--limit", str(limit)])
    assert gpu_check.main() == code
    made = json.loads((tmp_path / "results" / "gpu_check.json").read_text())
    assert (len(made["checks"]), made["not_reached"]) == ((0, 2) if limit < 0 else (2, 0))
    assert ("FAILED" in capsys.readouterr().out) == (passed is False)
