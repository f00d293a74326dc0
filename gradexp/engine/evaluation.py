"""What the tasks that evaluate trained models share."""

from __future__ import annotations

import itertools
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

Statistics = Annotated[int, Ge(2)] | None  # training images that statistics of batch normalisation are estimated from again
SHORT = 8  # images of a run that is cut short, for each of its n


class Evaluation:
    """A run's data set and hardware, and the trained models of its upstream runs; everything is computed in float32."""

    def __init__(self, run: Run, upstream: Upstream) -> None:
        self.run, self.upstream = run, upstream
        self.hardware, self.data = make_hardware(run.config), make_data(run)
        self.diverged = False  # one of the models asked for
        self._pieces: Pieces | None = None

    def model(self, name: str, *, clean: int | None = None) -> nn.Module:
        """The model of an upstream run, frozen and in eval mode; notes whether its training diverged.

        clean: how many training images its statistics of batch normalisation are estimated from again, without augmentation
        and in an order that the run's seed draws; None leaves the statistics as training left them.
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

    @property
    def pieces(self) -> Pieces:
        """For work that takes minutes."""
        if self._pieces is None:
            self._pieces = Pieces(self.run, self.hardware, digests_of(self.upstream))
        return self._pieces

    # Test images, drawn by the run's seed.

    def batches(self, count: int | None, size: int) -> Iterator[Batch]:
        """`count` test images in an order that the run's seed draws, None for all, `size` at a time."""
        return (self.batch(rows) for rows in self.rows(count, size))

    def rows(self, count: int | None, size: int) -> Sequence[Tensor]:
        """Which images these are, a batch at a time."""
        everything = self._images.count
        order = torch.randperm(everything, generator=torch.Generator().manual_seed(mix(self.run.config["seed"], 0)))
        return torch.split(order[: count or everything], size)

    def batch(self, rows: Tensor) -> Batch:
        return self._images.batch(rows, torch.zeros_like(rows))

    @cached_property
    def _images(self) -> Loader:
        return self.data.test_loader(batch_size=EVALUATION_BATCH, device=self.hardware.device)

    def first_images(self, limit: int | None, batch_size: int) -> tuple[Iterator[Batch], int]:
        """The first `limit` test images (None: all), in the data set's order, which is that of a hash: as good as random.

        Returns the batches and their number.
        """
        loader = self.data.test_loader(batch_size=batch_size, device=self.hardware.device)
        wanted = loader.count if limit is None else min(limit, loader.count)

        def cut(number: int, batch: Batch) -> Batch:
            left = wanted - number * batch_size
            return Batch(batch.images[:left], batch.labels[:left], batch.row[:left], batch.view[:left])

        count = -(-wanted // batch_size)
        return itertools.starmap(cut, enumerate(itertools.islice(loader, count))), count

    # Results.

    def result(self, metrics: dict[str, Any], arrays: Mapping[str, Any] | None = None, *, keep: Collection[str] = ()) -> Result:
        """Metrics rounded to six digits; NaN where a model had diverged, which is a result.

        keep: metrics that do not depend on the model, such as where a curve was measured.
        """
        if self.diverged:
            metrics = {name: x if name in keep else _nan(x) for name, x in metrics.items()}
        status = "diverged" if self.diverged else "finished"
        return Result({name: _rounded(value) for name, value in metrics.items()}, status, self.facts(), dict(arrays or {}))

    def facts(self) -> dict[str, Any]:
        """What a record says of data and machine."""
        earlier = self._pieces.facts() if self._pieces else {}
        return {"data": self.data.fingerprint(), **self.hardware.facts(mixed=False), **earlier}


class EvaluationTask(Task):
    """A task that evaluates trained models. unit_pixels: whether pixels must be in [0, 1]."""

    unit_pixels: ClassVar[bool] = False

    def check(self, run: Run) -> None:
        self.check_setup(Evaluation(run, {}))

    def check_setup(self, look: Evaluation) -> None:
        """The same, given the run's data and hardware; its models may not be trained yet."""
        if self.unit_pixels and look.data.normalise != "none":
            raise UserError(f"data.normalise={look.data.normalise}: sampling clips pixels to [0, 1]; take data.normalise=none")


class PerImageTask(EvaluationTask):
    """One whose work grows with `images`, the test images that its config's `task` or `evaluate` asks for."""

    def work(self, config: Config, sizes: Sizes) -> float | None:
        return at_most(config[_part(config)]["images"], images_of(config, sizes)[1])

    def shortened(self, config: Config, n: int) -> Config | None:
        return config | {_part(config): config[_part(config)] | {"images": SHORT * n}}


def _part(config: Config) -> str:
    """Which part of a config says how many images are looked at."""
    return "evaluate" if "evaluate" in config else "task"


def _nan(value: Any) -> Any:
    return [float("nan")] * len(value) if isinstance(value, list) else float("nan")


def _rounded(value: Any) -> Any:
    return [_rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.6g}")


def as_bytes(images: Tensor) -> Any:
    """Pixels in [0, 1] as uint8 for the arrays of a record; black where they are not finite."""
    return (255 * images.nan_to_num(0)).clamp(0, 255).round().to(torch.uint8).cpu().numpy()
