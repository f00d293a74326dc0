"""The base of tasks that evaluate trained models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.loader import Batch, Loader, mix
from gradexp.engine.assemble import load_model, make_data, make_hardware
from gradexp.engine.pieces import Pieces
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Task, Upstream, at_most, digests_of, images_of
from gradexp.evaluate.accuracy import EVALUATION_BATCH
from gradexp.evaluate.statistics import reestimate

Statistics = Annotated[int, Ge(2)] | None  # training images for new statistics of batch normalisation
SHORT = 8  # images for each n of Task.shortened


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
        order = torch.randperm(loader.count, generator=torch.Generator().manual_seed(mix(self.run.config["seed"], 1)))
        for rows in torch.split(order[:count], EVALUATION_BATCH):
            yield loader.batch(rows, torch.zeros_like(rows)).images

    @cached_property
    def pieces(self) -> Pieces:
        """For work that takes minutes, which is stored piece by piece."""
        return Pieces(self.run, self.hardware, digests_of(self.upstream))

    def batches(self, count: int | None, size: int) -> Iterator[Batch]:
        """`count` test images (None: all) in an order drawn by the run's seed, in batches of `size`."""
        return (self.batch(rows) for rows in self.rows(count, size))

    def rows(self, count: int | None, size: int) -> Sequence[Tensor]:
        """The row numbers of these images, a tensor for each batch."""
        total = self._images.count
        order = torch.randperm(total, generator=torch.Generator().manual_seed(mix(self.run.config["seed"], 0)))
        return torch.split(order[: count or total], size)

    def batch(self, rows: Tensor) -> Batch:
        return self._images.batch(rows, torch.zeros_like(rows))

    @cached_property
    def _images(self) -> Loader:
        return self.data.test_loader(batch_size=EVALUATION_BATCH, device=self.hardware.device)

    def first_images(self, limit: int | None, batch_size: int) -> tuple[Iterator[Batch], int]:
        """The first `limit` test images (None: all) in the data set's order, which is that of a hash and so is random.

        Returns the batches and their number.
        """
        loader = self.data.test_loader(batch_size=batch_size, device=self.hardware.device)
        wanted = loader.count if limit is None else min(limit, loader.count)
        count = math.ceil(wanted / batch_size)

        def cut(number: int, batch: Batch) -> Batch:
            left = wanted - number * batch_size
            return Batch(batch.images[:left], batch.labels[:left], batch.row[:left], batch.view[:left])

        return itertools.starmap(cut, enumerate(itertools.islice(loader, count))), count

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
        earlier = self.pieces.facts() if "pieces" in vars(self) else {}  # a cached property: only if it was used
        return {"data": self.data.fingerprint(), **self.hardware.facts(mixed=False), **earlier}


class EvaluationTask(Task):
    """A task that evaluates trained models. unit_pixels: whether it needs pixels in [0, 1]."""

    unit_pixels: ClassVar[bool] = False

    def check(self, run: Run) -> None:
        self.check_setup(Evaluation(run, {}))

    def check_setup(self, look: Evaluation) -> None:
        """As `check`, given the run's data and hardware; its models may not be trained yet."""
        if self.unit_pixels and look.data.normalise != "none":
            raise UserError(f"data.normalise={look.data.normalise}: sampling clips pixels to [0, 1]; use data.normalise=none")


class PerImageTask(EvaluationTask):
    """One whose work grows with the test images that `evaluate.images` or `task.images` asks for."""

    def work(self, config: Config, sizes: Sizes) -> float | None:
        return at_most(config[_part(config)]["images"], images_of(config, sizes)[1])

    def shortened(self, config: Config, n: int) -> Config | None:
        return config | {_part(config): config[_part(config)] | {"images": SHORT * n}}


def _part(config: Config) -> str:
    return "evaluate" if "evaluate" in config else "task"


def _nan(value: Any) -> Any:
    return [float("nan")] * len(value) if isinstance(value, list) else float("nan")


def _rounded(value: Any) -> Any:
    return [_rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.6g}")


def as_bytes(images: Tensor) -> Any:
    """Pixels in [0, 1] as uint8 for the arrays of a record; 0 where they are not finite."""
    return (255 * images.nan_to_num(0)).clamp(0, 255).round().to(torch.uint8).cpu().numpy()
