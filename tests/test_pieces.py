"""Long work that is no training, killed and gone on with."""

import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradexp.engine import evaluation, origin
from gradexp.engine.clocks import Progress
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.evaluation import Pieces
from gradexp.engine.run import Paths, Run

TINY = ["scale=quick", "trainer.threads=1", "logger=none", "+upstream.model.optim.passes=1", "+upstream.model.scale.width=0.03"]


def begun(folder: Path, weights: str = "aa") -> Pieces:
    hardware = SimpleNamespace(facts=lambda **_: {"device": "here", "precision": "32", "threads": 1})
    run = SimpleNamespace(name="look", id="0", pieces=folder)
    return Pieces(run, hardware, {"model": weights})  # type: ignore[arg-type]


def squared(work: Pieces, numbers: list[int], until: int = 99) -> tuple[list[Tensor], list[int]]:
    """The squares, and of which numbers they were computed here; interrupted at the number `until`."""
    seen = []

    def make(_: int, number: int) -> Tensor:
        if number == until:
            raise KeyboardInterrupt
        seen.append(number)
        return torch.tensor(number**2)

    try:
        return work.each("squares", numbers, make), seen
    except KeyboardInterrupt:
        return [], seen


def test_only_what_is_missing_is_done(tmp_path: Path) -> None:
    assert squared(begun(tmp_path), [3, 4, 5], until=5) == ([], [3, 4])
    assert squared(begun(tmp_path), [3, 4, 5]) == ([9, 16, 25], [5])
    assert squared(begun(tmp_path, weights="bb"), [3, 4, 5])[1] == [3, 4, 5]


def test_a_damaged_piece_is_made_again(tmp_path: Path) -> None:
    squared(begun(tmp_path), [3, 4])
    (file,) = tmp_path.glob("*/squares_1.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert squared(begun(tmp_path), [3, 4]) == ([9, 16], [4])


def test_progress_counts_pieces_behind_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradexp.engine.clocks.INTERVAL", 0.0)
    shown: list[int] = []
    monkeypatch.setattr(Progress, "update", lambda self, done, update=Progress.update: (shown.append(done), update(self, done)))
    squared(begun(tmp_path), [3, 4, 5])
    next(tmp_path.glob("*/squares_0.pt")).write_bytes(b"spoilt")
    shown.clear()
    assert squared(begun(tmp_path), [3, 4, 5])[1] == [3]
    assert shown == [3]


def test_a_record_has_the_seconds_and_the_code_of_earlier_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        evaluation, "clocks", SimpleNamespace(CLOCKS=("wall", "cpu"), read=dict, since=lambda _: {"wall": 2, "cpu": 1})
    )
    monkeypatch.setattr(origin, "git_state", lambda: {"commit": "old", "dirty": False})
    squared(begun(tmp_path), [3, 4, 5], until=5)
    for commit in ("old", "new"):
        monkeypatch.setattr(origin, "git_state", lambda commit=commit: {"commit": commit, "dirty": False})
        work = begun(tmp_path)
        squared(work, [3, 4, 5], until=5)
        assert work.facts()["earlier_seconds"] == {"wall": 4, "cpu": 2}
        commits = [earlier["git"]["commit"] for earlier in work.facts().get("attempts", [])]
        assert commits == ([] if commit == "old" else ["old"])


@pytest.mark.parametrize(
    ("words", "work", "parts"),
    [
        (["experiment=noise_robustness", "task.draws=2"], "gradexp.tasks.noise.noise_accuracies", 5),
        (
            ["experiment=pixel_perturbation", "evaluate.images=20", "evaluate.batch_size=5", "saliency=smoothgrad"],
            "gradexp.evaluate.pixel_perturbation.PixelPerturbation.__call__",
            4,
        ),
    ],
)
def test_a_score_that_was_interrupted_is_that_of_an_undisturbed_run(
    words: list[str], work: str, parts: int, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third of its pieces."""

    def run(place: int) -> Run:
        config = compose_run([*words, *TINY, *(f"{folder}/{place}" for folder in places)])
        return Run(config, Paths.of(config))

    whole = ensure(run(0))
    module, _, name = work.rpartition(".")
    owner = pkgutil.resolve_name(module)
    original, seen = getattr(owner, name), []

    def interrupt(*args: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure(run(1))
    resumed = ensure(run(1))
    assert len(seen) == parts + 1
    assert resumed["metrics"] == whole["metrics"]
    assert not run(1).pieces.exists()
