"""The benchmark's own arithmetic."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradexp.runs import peak_memory_mib
from gradexp.tasks import bench, bench_photographs, bench_runs, bench_saliency, train
from gradexp.tasks.timing import peak_memory

VGG4 = (27 * 64 * 32**2, 9 * 64 * 128 * 16**2, 9 * 128 * 512 * 8**2)


def kind(name: str) -> bench.Kind:
    return next(candidate for candidate in bench.KINDS if candidate.name == name)


def test_convolutions_are_counted() -> None:
    assert bench.convolutions(bench.network("vgg4")) == (sum(VGG4), VGG4[0])


def test_limits_by_hand() -> None:
    """Forward 1, input-gradient 1, its two transposed passes 2, ordinary backward 2, against 3 (§2.4: "a factor of 2")."""
    plain = 3 * sum(VGG4) - VGG4[0]
    assert bench.limit(kind("ce"), "vgg4") == 1
    assert bench.limit(kind("j, stored targets"), "vgg4") == pytest.approx((6 * sum(VGG4) - VGG4[0]) / plain)
    assert bench.limit(kind("anti-score-matching"), "vgg4") == pytest.approx(2)
    assert bench.limit(kind("fg_att, stored targets"), "vgg4") == bench.limit(kind("j, stored targets"), "vgg4")
    assert bench.limit(kind("bias-gradient"), "vgg4") == 1  # nothing lies behind its layer
    vgg11, first = bench.convolutions(bench.network("vgg11"))
    last = 9 * 512 * 512 * 2**2
    assert bench.limit(kind("bias-gradient"), "vgg11") == pytest.approx(1 + 3 * last / (3 * vgg11 - first))
    teacher, _ = bench.convolutions(bench.network("vgg9"))
    assert bench.limit(kind("a, live teacher"), "vgg4") == pytest.approx((plain + teacher) / plain)


def test_the_page_shows_every_row() -> None:
    rows = [
        bench.Row("vgg4", "32", "ce", 100.0, 1.0, 1.0, 1.0, None, 7),
        bench.Row("vgg4", "32", "j naive, live teacher", 10.0, 10.0, 2.7, 0.3, None, 3),
        bench.Row("vgg4", "32", "j, stored targets", 40.0, 2.5, 2.0, 0.8, 512, 7),
    ]
    facts = {"device": "d", "threads": 2, "batch": 128, "versions": {"torch": "2"}, "commit": "0123456789"}
    page = bench.markdown(rows, [], facts, has_bf16=False)
    assert "commit 0123456;" in page
    assert "| vgg4 | 32 | j, stored targets | 40 | 2.50 | 2.00 | 80 % | 512 |" in page
    assert "medians of 3 or more" in page
    assert "is 4.0 times as fast as a naive one" in page
    assert "no bf16" in page


def test_maps_are_measured_against_one_forward_and_one_backward() -> None:
    rows = bench_saliency.measure("vgg4", bench.make_hardware("32"), batch=2, size=16, rounds=1)
    assert [row.what for row in rows][:2] == [bench_saliency.FORWARD_BACKWARD, "FullGrad"]
    assert rows[0].ratio == 1
    page = bench_saliency.markdown([*rows[:2], bench_saliency.Row("vgg16_bn", 16, "FullGrad", None, None, 4321)])
    assert "| vgg16_bn | 16 | FullGrad |  |  | 4321 |" in page
    assert "pip install -e '.[bench]'" in page


def test_photographs_are_as_large_as_real_ones_and_are_counted(tmp_path: Path) -> None:
    bench_photographs.photograph(tmp_path / "a.jpg", 0)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.size == (500, 375)
    assert 80_000 < (tmp_path / "a.jpg").stat().st_size < 200_000
    row = bench_photographs.measure(bench.make_hardware("32"), images=9, rounds=1)
    assert (row.images, row.batch) == (9, 8)
    assert row.images_per_second > 0
    assert f"{row.images_per_second:.0f} images/s" in bench_photographs.markdown(row)


def test_every_loop_does_all_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop must not go on from the checkpoint of the one before it."""
    hardware, shown = bench.make_hardware("32"), []
    hardware.checkpoint_every = 0.0

    def fit(*given: Any) -> None:
        train.fit(*given)
        shown.append(given[-1].images)

    monkeypatch.setattr(bench, "fit", fit)
    loop = bench.measure_loop(1, hardware, steps=2, rounds=2)
    assert shown == [200, 200]
    assert loop.overhead == pytest.approx(100 * (loop.bare / loop.trained - 1))


def test_whole_runs_are_timed() -> None:
    row = bench_runs.measure(passes=1, rounds=1)
    assert row.ratio == row.beside / row.alone > 0
    assert f"{row.ratio:.2f} times as long" in bench_runs.markdown(row)
    assert f"one step takes {row.one_step:.1f} s" in bench_runs.markdown(row)
    assert row.one_step > row.alone  # both do one step; a table's runs are spared the imports


@pytest.mark.parametrize("started", [bench_runs._one_step, lambda: bench_runs._train(1, seeds=1)], ids=["command", "table"])
def test_a_run_that_fails_is_not_a_fast_one(monkeypatch: pytest.MonkeyPatch, started: Callable[[], None]) -> None:
    monkeypatch.setattr(bench_runs, "RUN", (*bench_runs.RUN, "optim.optimizer.lr=-1"))
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
    row = bench.Row("vgg4", "32", "ce", 100.0, 1.0, 1.0, 1.0, None)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: [row])
    monkeypatch.setattr(bench, "measure_loop", lambda *_, **__: bench.Loop(1, "32", 110.0, 100.0))
    monkeypatch.setattr(bench_saliency, "rows", lambda *_, **__: [])
    monkeypatch.setattr(bench_photographs, "measure", lambda *_, **__: bench_photographs.Row(1, 1.0, 8, 2, 1.0))
    monkeypatch.setattr(bench_runs, "measure", lambda **_: bench_runs.Row(7, 3.0, 10.0, 12.0))
    quick = bench.run(tmp_path, quick=True)
    assert not list(tmp_path.iterdir())
    page = bench.run(tmp_path, quick=False)
    assert (tmp_path / "bench.md").read_text() == page
    assert "10.0 %" in page and "1.20 times" in page and "1.20 times" not in quick
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["rows"][0]["images_per_second"] == 100
    assert found["runs"] == [{"passes": 7, "one_step": 3.0, "alone": 10.0, "beside": 12.0}]
