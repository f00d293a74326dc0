"""The base of tasks that evaluate trained models, and their long work in pieces: a killed run resumes after its last piece.

A signal ends the process at once, as it ends any; the piece in work is lost.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from gradexp.base.files import intact, write_sealed
from gradexp.data.loader import Batch, Loader, mix
from gradexp.engine import clocks
from gradexp.engine.assemble import load_model, make_data, make_hardware
from gradexp.engine.clocks import Progress
from gradexp.engine.hardware import Hardware
from gradexp.engine.origin import attempt
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Task, Upstream, digests_of, images_of
from gradexp.evaluate.accuracy import EVALUATION_BATCH
from gradexp.evaluate.statistics import reestimate

Statistics = Annotated[int, Ge(2)] | None  # training images for new statistics of batch normalisation
Item = TypeVar("Item")
Piece = TypeVar("Piece")  # tensors on the CPU, numbers, and containers of these


class Evaluation:
    """A run's data set and hardware, and the trained models of its upstream runs. Everything is computed in float32."""

    def __init__(self, run: Run, upstream: Upstream) -> None:
        self.run, self.upstream = run, upstream
        self.hardware, self.data = make_hardware(run.config), make_data(run)
        self.diverged = False  # whether the training of one of the models did

    def model(self, name: str, *, clean: int | None = None) -> nn.Module:
        """The model of an upstream run, frozen and in eval mode; notes whether its training diverged.

        clean: the number of training images, without augmentation and drawn by the run's seed, from which the statistics of
        batch normalisation are estimated anew; None keeps those of the training.
        """
        trained = self.upstream[name]
        diverged = trained.record["status"] == "diverged"
        self.diverged |= diverged
        model = load_model(trained, self.hardware)
        if clean is not None and not diverged:
            reestimate(model, partial(self._clean_images, clean))
        return model

    def _clean_images(self, count: int) -> Iterator[Tensor]:
        loader = self.data.train_loader(batch_size=EVALUATION_BATCH, device=self.hardware.device, augment=False)
        for rows in self._drawn(loader, count, EVALUATION_BATCH, stream=1):
            yield loader.batch(rows, torch.zeros_like(rows)).images

    def _drawn(self, loader: Loader, count: int | None, size: int, *, stream: int) -> Sequence[Tensor]:
        order = torch.randperm(loader.count, generator=torch.Generator().manual_seed(mix(self.run.config["seed"], stream)))
        return torch.split(order[: count or loader.count], size)

    @cached_property
    def pieces(self) -> Pieces:
        """For work that takes minutes, which is stored piece by piece."""
        return Pieces(self.run, self.hardware, digests_of(self.upstream))

    def batches(self, count: int | None, size: int) -> Iterator[Batch]:
        """`count` test images (None: all) in an order drawn by the run's seed, in batches of `size`."""
        return (self.batch(rows) for rows in self.rows(count, size))

    def rows(self, count: int | None, size: int) -> Sequence[Tensor]:
        """The row numbers of these images, a tensor for each batch."""
        return self._drawn(self._images, count, size, stream=0)

    def batch(self, rows: Tensor) -> Batch:
        return self._images.batch(rows, torch.zeros_like(rows))

    @cached_property
    def _images(self) -> Loader:
        return self.data.test_loader(batch_size=EVALUATION_BATCH, device=self.hardware.device)

    def first_rows(self, limit: int | None, size: int) -> Sequence[Tensor]:
        """The row numbers of the first `limit` test images (None: all), in the data set's order, which is that of a hash."""
        return torch.split(torch.arange(min(limit or self._images.count, self._images.count)), size)

    def result(self, metrics: dict[str, Any], arrays: Mapping[str, Any] | None = None, *, keep: Collection[str] = ()) -> Result:
        """Metrics rounded to six significant digits; NaN where the training of a model diverged.

        keep: metrics that do not depend on the model, such as the points at which a curve was measured.
        """
        if self.diverged:
            metrics = {name: value if name in keep else _nan(value) for name, value in metrics.items()}
        status = "diverged" if self.diverged else "finished"
        return Result({name: _rounded(value) for name, value in metrics.items()}, status, self.facts(), dict(arrays or {}))

    def facts(self) -> dict[str, Any]:
        """The fields of a record about data, machine and earlier attempts."""
        return {"data": self.data.fingerprint(), **self.hardware.facts(mixed=False), **self.pieces.facts()}


class Pieces:
    """Finished pieces, which are stored in `run.pieces` until the run has its record.

    Random numbers of a piece must depend on its number only, so that a resumed run gives the same numbers as an undisturbed
    one. Damaged pieces, those of other runs, and those made from other files of upstream runs, are made again.

    used: SHA-256 of the files of upstream runs, by name.
    """

    def __init__(self, run: Run, hardware: Hardware, used: Mapping[str, str]) -> None:
        self.run, self.title = run, f"{run.name} {run.id}"
        self.folder = run.pieces / hashlib.sha256(json.dumps(dict(used), sort_keys=True).encode()).hexdigest()[:12]
        self.origin = attempt(hardware.facts(mixed=False), used)
        self.earlier = dict.fromkeys(clocks.CLOCKS, 0.0)
        self.attempts: list[dict[str, Any]] = []  # earlier ones whose origin was another

    def facts(self) -> dict[str, Any]:
        """The fields of a record about pieces of earlier attempts: their seconds and their origins."""
        return {"earlier_seconds": self.earlier, **({"attempts": self.attempts} if self.attempts else {})}

    def each(self, name: str, items: Sequence[Item], make: Callable[[int, Item], Piece]) -> list[Piece]:
        """make(number, item) for each item; stored results of earlier attempts are loaded instead."""
        files = [self.folder / f"{name}_{number}.pt" for number in range(len(items))]
        stored = [self._load(file, f"{name} {number}") for number, file in enumerate(files)]
        done = sum(content is not None for content in stored)
        progress = Progress(f"{self.title}: {name}", len(items), "pieces", done=done)
        pieces = []
        for number, (file, item, content) in enumerate(zip(files, items, stored, strict=True)):
            if content is not None:
                pieces.append(self._count(content))
                continue
            begun = clocks.read()
            pieces.append(make(number, item))
            facts = {"run": self.run.id, "name": f"{name} {number}", "seconds": clocks.since(begun), "origin": self.origin}
            archive = io.BytesIO()
            torch.save({"piece": pieces[-1], **facts}, archive)
            write_sealed(file, archive.getvalue())
            done += 1
            progress.update(done)
        return pieces

    def _load(self, file: Path, name: str) -> dict[str, Any] | None:
        """A stored piece with its facts; None where it does not exist, is damaged, or is another piece or another run's."""
        if not intact(file):
            return None
        with suppress(Exception):  # torch raises whatever its readers of archives do
            content: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
            if (content["run"], content["name"]) == (self.run.id, name):
                return content
        print(f"{self.title}: {file} is damaged or of another run, so it is made again", flush=True)
        return None

    def _count(self, content: dict[str, Any]) -> Any:
        """A stored piece, whose seconds and origin are added to those of earlier attempts."""
        for clock in clocks.CLOCKS:
            self.earlier[clock] += content["seconds"][clock]
        if content["origin"] not in (self.origin, *self.attempts):
            self.attempts.append(content["origin"])
        return content["piece"]


class EvaluationTask(Task):
    """A task that evaluates trained models."""

    def check(self, run: Run) -> None:
        self.check_setup(Evaluation(run, {}))

    def check_setup(self, evaluation: Evaluation) -> None:
        """As `check`, given the run's data and hardware; its models may not be trained yet."""


class PerImageTask(EvaluationTask):
    """One whose work grows with the test images that `evaluate.images` or `task.images` asks for."""

    def work(self, config: Config, sizes: Sizes) -> float | None:
        wanted, available = config["evaluate" if "evaluate" in config else "task"]["images"], images_of(config, sizes)[1]
        count = wanted or available
        return None if count is None else float(min(count, available or count))


def _nan(value: Any) -> Any:
    return [float("nan")] * len(value) if isinstance(value, list) else float("nan")


def _rounded(value: Any) -> Any:
    return [_rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.6g}")


def as_bytes(images: Tensor) -> Any:
    """Pixels in [0, 1] as uint8 for the arrays of a record; 0 where they are not finite."""
    return (255 * images.nan_to_num(0)).clamp(0, 255).round().to(torch.uint8).cpu().numpy()
