"""The benchmark's own arithmetic."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import loops, page, photographs, runs, saliency, steps
from bench.timing import peak_memory
from PIL import Image
from torch import nn

from gradexp import layers
from gradexp.base.errors import UserError
from gradexp.engine import fit as steps_of_training
from gradexp.engine.clocks import peak_memory_mib

VGG4 = (27 * 64 * 32**2, 9 * 64 * 128 * 16**2, 9 * 128 * 512 * 8**2)


def kind(name: str) -> steps.Kind:
    return next(candidate for candidate in steps.KINDS if candidate.name == name)


def test_convolutions_are_counted() -> None:
    assert steps.convolutions(steps.network("vgg4")) == (sum(VGG4), VGG4[0])


def test_limits_by_hand() -> None:
    """Forward 1, input-gradient 1, its two transposed passes 2, ordinary backward 2, against 3 (§2.4: "a factor of 2")."""
    plain = 3 * sum(VGG4) - VGG4[0]
    assert steps.limit(kind("ce"), "vgg4") == 1
    assert steps.limit(kind("j, stored targets"), "vgg4") == pytest.approx((6 * sum(VGG4) - VGG4[0]) / plain)
    assert steps.limit(kind("anti-score-matching"), "vgg4") == pytest.approx(2)
    assert steps.limit(kind("fg_att, stored targets"), "vgg4") == steps.limit(kind("j, stored targets"), "vgg4")
    assert steps.limit(kind("bias-gradient"), "vgg4") == 1  # nothing lies behind its layer
    vgg11, first = steps.convolutions(steps.network("vgg11"))
    last = 9 * 512 * 512 * 2**2
    assert steps.limit(kind("bias-gradient"), "vgg11") == pytest.approx(1 + 3 * last / (3 * vgg11 - first))
    teacher, _ = steps.convolutions(steps.network("vgg9"))
    assert steps.limit(kind("a, live teacher"), "vgg4") == pytest.approx((plain + teacher) / plain)


def test_the_page_shows_every_row() -> None:
    rows = [
        steps.Row("vgg4", "32", "ce", 100.0, 1.0, 1.0, 1.0, None, 7),
        steps.Row("vgg4", "32", "j naive, live teacher", 10.0, 10.0, 2.7, 0.3, None, 3),
        steps.Row("vgg4", "32", "j, stored targets", 40.0, 2.5, 2.0, 0.8, 512, 7),
    ]
    facts = {"device": "d", "threads": 2, "batch": 128, "versions": {"torch": "2"}}
    part = {"commit": "0123456789", "dirty": True, "rows": rows}
    text = page.markdown(facts, {"steps": part}, has_bf16=False)
    assert "commit 0123456, with changes." in text
    assert "| vgg4 | 32 | j, stored targets | 40 | 2.50 | 2.00 | 80 % | 512 |" in text
    assert "medians of 3 or more" in text
    assert "is 4.0 times as fast as a naive one" in text
    assert "no bf16" in text


def test_maps_are_measured_against_one_forward_and_one_backward() -> None:
    rows = saliency.measure("vgg4", steps.make_hardware("32"), batch=2, size=16, rounds=1)
    assert [row.what for row in rows][:2] == [saliency.FORWARD_BACKWARD, "FullGrad"]
    assert rows[0].ratio == 1
    text = saliency.markdown([*rows[:2], saliency.Row("vgg16_bn", 16, "FullGrad", None, None, 4321)])
    assert "| vgg16_bn | 16 | FullGrad |  |  | 4321 |" in text
    assert "pip install -e '.[bench]'" in text


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
    row = steps.Row("vgg4", "32", "ce", 100.0, 1.0, 1.0, 1.0, None)
    monkeypatch.setattr(steps, "measure", lambda *_, **__: [row])
    monkeypatch.setattr(loops, "measure", lambda *_, **__: loops.Row(1, "32", 110.0, 100.0))
    monkeypatch.setattr(saliency, "rows", lambda *_, **__: [])
    monkeypatch.setattr(photographs, "measure", lambda *_, **__: photographs.Row(1, 1.0, 8, 2, 1.0))
    monkeypatch.setattr(runs, "measure", lambda **_: runs.Row(7, 3.0, 10.0, 12.0))
    quick = page.run(tmp_path, quick=True)
    assert not list(tmp_path.iterdir())
    text = page.run(tmp_path, quick=False)
    assert (tmp_path / "bench.md").read_text() == text
    assert "10.0 %" in text and "1.20 times" in text and "1.20 times" not in quick
    found = json.loads((tmp_path / "bench.json").read_text())
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
    before = json.loads((tmp_path / "bench.json").read_text())
    commit["commit"] = "b" * 40
    monkeypatch.setattr(runs, "measure", lambda **_: runs.Row(7, 4.0, 10.0, 12.0))
    text = page.run(tmp_path, quick=False, parts=["runs"])
    after = json.loads((tmp_path / "bench.json").read_text())
    assert after["loops"] == before["loops"] and after["loops"]["commit"] == "a" * 40
    assert after["runs"]["rows"][0]["one_step"] == 4 and after["runs"]["commit"] == "b" * 40
    assert "10.0 %" in text and text.count("commit aaaaaaa") == text.count("commit bbbbbbb") == 1
    (tmp_path / "bench.json").write_text(json.dumps(after | {"machine": after["machine"] | {"device": "another"}}))
    with pytest.raises(UserError, match="measured with another device; measure everything again"):
        page.run(tmp_path, quick=False, parts=["runs"])
