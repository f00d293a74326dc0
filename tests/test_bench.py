"""The benchmark's own arithmetic."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from bench import loops, networks, page, photographs, runs, saliency, steps
from bench.timing import peak_memory
from PIL import Image
from torch import nn

from gradexp import layers
from gradexp.base.errors import UserError
from gradexp.engine import fit as steps_of_training
from gradexp.engine.clocks import peak_memory_mib
from gradexp.layers import ranks

MACHINE = {"device": "AMD EPYC 9.5 (AVX512, bf16)", "threads": 2}
VGG4 = (27 * 64 * 32**2, 9 * 64 * 128 * 16**2, 9 * 128 * 512 * 8**2)


def kind(name: str) -> steps.Kind:
    return next(candidate for candidate in steps.KINDS if candidate.name == name)


def test_convolutions_are_counted() -> None:
    assert steps.convolutions(steps.network("vgg4")) == (sum(VGG4), VGG4[0])


def test_products_by_hand() -> None:
    """Forward 1, input-gradient 1, its two transposed passes 2, ordinary backward 2, against 3 (§2.4: "a factor of 2")."""
    plain = 3 * sum(VGG4) - VGG4[0]
    assert steps.products(kind("ce"), "vgg4") == 1
    assert steps.products(kind("j, stored targets"), "vgg4") == pytest.approx((6 * sum(VGG4) - VGG4[0]) / plain)
    assert steps.products(kind("anti-score-matching"), "vgg4") == pytest.approx(2)
    assert steps.products(kind("fg_att, stored targets"), "vgg4") == steps.products(kind("j, stored targets"), "vgg4")
    assert steps.products(kind("bias-gradient"), "vgg4") == 1  # nothing lies behind its layer
    vgg11, first = steps.convolutions(steps.network("vgg11"))
    last = 9 * 512 * 512 * 2**2
    assert steps.products(kind("bias-gradient"), "vgg11") == pytest.approx(1 + 3 * last / (3 * vgg11 - first))
    teacher, _ = steps.convolutions(steps.network("vgg9"))
    assert steps.products(kind("a, live teacher"), "vgg4") == pytest.approx((plain + teacher) / plain)


def test_the_page_shows_every_row() -> None:
    rows = [
        steps.Row("vgg4", "32", "ce", 100.0, 1.0, 1.0, 0.5, 80.0, "channels_last", None, 7),
        steps.Row("vgg4", "32", "a, stored targets", 90.0, 1.1, 1.0, 0.45, None, None, None, 7),
        steps.Row("vgg4", "32", "j, stored targets", 40.0, 2.5, 2.0, 0.6, 16.0, "contiguous", 512, 3),
    ]
    facts = {"device": "d", "threads": 2, "batch": 128, "versions": {"torch": "2"}}
    part = {"commit": "0123456789", "dirty": True, "rows": rows}
    text = page.markdown(facts, {"steps": part}, has_bf16=False)
    assert "commit 0123456, with changes." in text
    assert "| vgg4 | 32 | ce | 100 | 1.00 | 1.00 | 50 % | 80 | 1.25 |  |" in text
    assert "| vgg4 | 32 | a, stored targets | 90 | 1.10 | 1.00 | 45 % |  |  |  |" in text
    assert "| vgg4 | 32 | j, stored targets | 40 | 2.50 | 2.00 | 60 % | 16 c | 2.50 | 512 |" in text
    assert "medians of 3 or more" in text
    assert "no bf16" in text


def test_stock_is_measured_in_both_layouts_and_the_faster_one_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock steps have torch's layers and compute the same loss as ours."""
    seconds = {None: 1.0, "channels_last": 4.0, "contiguous": 2.0}
    monkeypatch.setattr(
        steps, "medians", lambda ways, **_: ({key: seconds[key[1]] if key != "product" else 1.0 for key in ways}, 3)
    )
    monkeypatch.setattr(steps, "make_step", lambda *_: None)
    chosen = [kind("ce"), kind("a, stored targets"), kind("j, stored targets")]
    ce, a, j = steps.measure("vgg4", steps.make_hardware("32"), chosen, rounds=1, memory=False, budget=9)
    assert (ce.stock, ce.stock_layout) == (j.stock, j.stock_layout) == (steps.BATCH / 2, "contiguous")
    assert a.stock is None
    assert ce.matrix_share == pytest.approx((3 * sum(VGG4) - VGG4[0]) * steps.BATCH / 2**33)


@pytest.mark.parametrize("name", [kind.name for kind in steps.KINDS if kind.compared])
def test_stock_steps_compute_the_same_loss(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BATCH", 4)
    monkeypatch.setattr(steps, "MODELS", {"vgg4": 0.1, "vgg9": 0.1})
    loader, hardware, losses = steps.images(8), steps.make_hardware("32"), list[float]()
    original = steps.Distillation.training_step
    noise = torch.randn(4, 3, 32, 32)

    def noted(self: steps.Distillation, *given: Any) -> Any:
        loss = original(self, *given)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(ranks, "normal_like", lambda images: noise.to(images))
    monkeypatch.setattr(steps.Distillation, "training_step", noted)
    for layout in (None, *steps.LAYOUTS):
        steps.make_step(kind(name), "vgg4", hardware, loader, tmp_path, layout)()
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-3)


def test_penalties_are_compared_in_the_better_layouts() -> None:
    row = networks.Row("a", 2, 16, 10.0, 60.0, 50.0, 20.0, 25.0)
    assert row.gain == 2.5
    assert "| a | 2 | 16 | 60 | 50 | 20 | 25 | 2.50 | 2.00 |" in networks.markdown([row])


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_penalties_of_stock_and_accelerated_networks_have_equal_gradients(name: str) -> None:
    options = {"image_size": 32} if name == "vit_b_16" else {}
    torch.manual_seed(0)
    stock = torchvision.models.get_model(name, weights=None, **options).eval()
    fast, images = layers.accelerate(copy.deepcopy(stock)), torch.randn(2, 3, 32, 32)
    networks.make_step(stock, images, penalty=True, fused=False)()
    networks.make_step(fast, images, penalty=True)()
    for ours, theirs in zip(fast.parameters(), stock.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-4 * float(theirs.grad.abs().max()))


def test_maps_are_measured_against_one_forward_and_one_backward() -> None:
    rows = saliency.measure("vgg4", steps.make_hardware("32"), batch=2, size=16, rounds=1)
    assert [row.what for row in rows][:2] == [saliency.FORWARD_BACKWARD, "FullGrad"]
    assert rows[0].ratio == 1
    text = saliency.markdown([*rows[:2], saliency.Row("vgg16_bn", 16, "FullGrad", None, None, 4321)])
    assert "| vgg16_bn | 16 | FullGrad |  |  | 4321 |" in text
    assert "pip install -e '.[bench]'" in text


def test_every_large_network_is_measured_at_its_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str, _: object, *, batch: int, **__: int) -> list[saliency.Row]:
        return [saliency.Row(name, batch, what, 1.0, 1.0, None) for what in (saliency.FORWARD_BACKWARD, "FullGrad")]

    monkeypatch.setattr(saliency, "measure", measured)
    monkeypatch.setattr(saliency, "peak_memory", lambda _, name, batch, size: batch)
    rows = saliency.rows(steps.make_hardware("32"), quick=False)[2:]
    assert {(row.model, row.batch) for row in rows} >= {("resnet18", 1), ("resnet18", 16), ("vgg16_bn", 8), ("vit_b_16", 8)}
    assert all(row.peak_memory_mib == row.batch for row in rows if row.what == "FullGrad")


def test_the_package_is_measured_after_ours_not_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the allocator in a state that the next in a round would pay for."""
    called: list[str] = []
    names = saliency.FORWARD_BACKWARD, "FullGrad"
    monkeypatch.setattr(saliency, "ours", lambda *_: {name: partial(called.append, name) for name in names})
    monkeypatch.setattr(saliency, "theirs", lambda *_: {saliency.PACKAGE: partial(called.append, saliency.PACKAGE)})
    rows = saliency.measure("vgg4", steps.make_hardware("32"), batch=2, size=16, rounds=1)
    assert [row.what for row in rows] == [*names, saliency.PACKAGE]
    assert called == [*names, *names, saliency.PACKAGE, saliency.PACKAGE]


def test_our_maps_are_measured_with_our_layers_and_the_packages_with_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware, explained = steps.make_hardware("32"), list[nn.Module]()
    monkeypatch.setattr(saliency, "fullgrad", lambda: lambda model, _: explained.append(model))
    stock = saliency.frozen("vgg4", hardware)
    saliency.ours(stock, torch.zeros(1, 3, 32, 32), hardware)["FullGrad"]()
    saliency.one_map("vgg4", 1, 32)
    assert len(explained) == 2
    for model in explained:
        assert any(isinstance(module, layers.Convolution) for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, layers.Convolution) for module in stock.modules())


def test_photographs_are_as_large_as_real_ones_and_are_counted(tmp_path: Path) -> None:
    photographs.photograph(tmp_path / "a.jpg", 0)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.size == (500, 375)
    assert 80_000 < (tmp_path / "a.jpg").stat().st_size < 200_000
    row = photographs.measure(steps.make_hardware("32"), images=9, rounds=1)
    assert (row.images, row.batch) == (9, 8)
    assert row.images_per_second > 0
    assert f"{row.images_per_second:.0f} images/s" in photographs.markdown(row)


def test_every_loop_does_all_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop must not go on from the checkpoint of the one before it."""
    hardware, shown = steps.make_hardware("32"), []
    hardware.checkpoint_every = 0.0

    def fit(*given: Any) -> None:
        steps_of_training.fit(*given)
        shown.append(given[-1].images)

    monkeypatch.setattr(loops, "fit", fit)
    loop = loops.measure(1, hardware, steps=2, rounds=2)
    assert shown == [200, 200]
    assert loop.overhead == pytest.approx(100 * (loop.bare / loop.trained - 1))


def test_whole_runs_are_timed() -> None:
    row = runs.measure(passes=1, rounds=1)
    assert row.ratio == row.beside / row.alone > 0
    assert f"{row.ratio:.2f} times as long" in runs.markdown(row)
    assert f"one step takes {row.one_step:.1f} s" in runs.markdown(row)
    assert row.one_step > row.alone  # both do one step; a table's runs are spared the imports


@pytest.mark.parametrize("started", [runs._one_step, lambda: runs._train(1, seeds=1)], ids=["command", "table"])
def test_a_run_that_fails_is_not_a_fast_one(monkeypatch: pytest.MonkeyPatch, started: Callable[[], None]) -> None:
    monkeypatch.setattr(runs, "RUN", (*runs.RUN, "optim.optimizer.lr=-1"))
    with pytest.raises(RuntimeError, match=r"failed:\n(.*\n)*.*Invalid learning rate"):
        started()


def fill(mebibytes: int) -> None:
    np.ones(mebibytes * 2**20, dtype=np.uint8)


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    mine = np.ones(2**30, dtype=np.uint8)
    small = peak_memory(fill, 0)
    assert small < peak_memory_mib() - mine.nbytes / 2**21
    assert 400 < peak_memory(fill, 500) - small < 600


def test_a_process_that_fails_says_so() -> None:
    with pytest.raises(ValueError, match="negative"):
        peak_memory(fill, -1)


def test_what_is_measured_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = steps.Row("vgg4", "32", "ce", 100.0, 1.0, 1.0, 1.0, None, None, None)
    monkeypatch.setattr(steps, "measure", lambda *_, **__: [row])
    monkeypatch.setattr(loops, "measure", lambda *_, **__: loops.Row(1, "32", 110.0, 100.0))
    monkeypatch.setattr(saliency, "rows", lambda *_, **__: [])
    monkeypatch.setattr(networks, "rows", lambda **_: [])
    monkeypatch.setattr(photographs, "measure", lambda *_, **__: photographs.Row(1, 1.0, 8, 2, 1.0))
    monkeypatch.setattr(runs, "measure", lambda **_: runs.Row(7, 3.0, 10.0, 12.0))
    quick = page.run(tmp_path, quick=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(steps, "make_hardware", lambda _: SimpleNamespace(kind="cpu", facts=lambda: MACHINE))
    text = page.run(tmp_path, quick=False)
    assert (tmp_path / "bench" / "amd-epyc-9.5-avx512-bf16-2-threads.md").read_text() == text
    assert "10.0 %" in text and "1.20 times" in text and "1.20 times" not in quick
    found = json.loads((tmp_path / "bench" / "amd-epyc-9.5-avx512-bf16-2-threads.json").read_text())
    assert found["steps"]["rows"][0]["images_per_second"] == 100
    assert found["runs"]["rows"] == [{"passes": 7, "one_step": 3.0, "alone": 10.0, "beside": 12.0}]


def test_one_part_is_measured_again_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = {"commit": "a" * 40, "dirty": False}
    monkeypatch.setattr(page, "git_state", lambda: commit)
    monkeypatch.setattr(runs, "measure", lambda **_: runs.Row(7, 3.0, 10.0, 12.0))
    monkeypatch.setattr(loops, "measure", lambda *_, **__: loops.Row(1, "32", 110.0, 100.0))
    with pytest.raises(UserError, match="measure everything first: make bench"):
        page.run(tmp_path, quick=False, parts=["runs"])
    monkeypatch.setattr(page, "ROWS", {"loops": loops.Row, "runs": runs.Row})
    page.run(tmp_path, quick=False, parts=["loops", "runs"])
    (file,) = (tmp_path / "bench").glob("*.json")
    before = json.loads(file.read_text())
    commit["commit"] = "b" * 40
    monkeypatch.setattr(runs, "measure", lambda **_: runs.Row(7, 4.0, 10.0, 12.0))
    text = page.run(tmp_path, quick=False, parts=["runs"])
    after = json.loads(file.read_text())
    assert after["loops"] == before["loops"] and after["loops"]["commit"] == "a" * 40
    assert after["runs"]["rows"][0]["one_step"] == 4 and after["runs"]["commit"] == "b" * 40
    assert "10.0 %" in text and text.count("commit aaaaaaa") == text.count("commit bbbbbbb") == 1
    file.write_text(json.dumps(after | {"machine": after["machine"] | {"batch": 7}}))
    with pytest.raises(UserError, match="measured with another batch; measure everything again"):
        page.run(tmp_path, quick=False, parts=["runs"])
    del after["loops"]["rows"][0]["bare"]
    file.write_text(json.dumps(after))
    with pytest.raises(UserError, match=r"threads.json was measured by older code; measure everything again: make bench"):
        page.run(tmp_path, quick=False, parts=["runs"])
