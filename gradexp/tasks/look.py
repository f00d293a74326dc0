"""What the tasks that look at trained models share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.dataset import ImageData
from gradexp.data.loader import Batch, Loader, mix
from gradexp.engine.build import build
from gradexp.engine.hardware import Hardware
from gradexp.engine.pieces import Pieces
from gradexp.engine.runs import Config, Result, Run, read_record
from gradexp.evaluate.statistics import reestimate
from gradexp.tasks.train import EVALUATION_BATCH, load_model, make_data


class Look:
    """A run's data set and hardware, and the trained models that it stands on; everything is computed in float32."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.hardware: Hardware = build(run.config["trainer"], where="trainer")
        self.hardware.apply()
        self.data: ImageData = make_data(run.config, run.paths)
        run.uses(self.data.fingerprint())
        self.records: dict[str, Config] = {}  # of the models asked for
        self._pieces: Pieces | None = None
        self.diverged = False

    def model(self, name: str, *, clean: int | None = None) -> nn.Module:
        """The model of an upstream run, frozen and in eval mode, trained first where missing; notes whether it diverged.

        clean: how many training images its statistics of batch normalisation are estimated from again, without augmentation
        and in an order that the run's seed draws; None leaves the statistics as training left them.
        """
        if clean is not None and clean < 2:
            raise UserError(
                f"task.statistics={clean}: statistics need images; give their number, or null for those of training"
            )
        upstream = self.run.upstream(name)
        self.records[name] = read_record(upstream.record_path)
        self.diverged |= self.records[name]["status"] == "diverged"
        model = load_model(upstream, self.hardware)
        if clean is not None and self.records[name]["status"] != "diverged":
            reestimate(model, partial(self._clean_images, clean))
        return model

    def _clean_images(self, count: int) -> Iterator[Tensor]:
        loader = self.data.train_loader(batch_size=EVALUATION_BATCH, device=self.hardware.device, augment=False)
        order = torch.randperm(loader.count, generator=torch.Generator().manual_seed(mix(self.run.config["seed"], 1)))
        for rows in torch.split(order[:count], EVALUATION_BATCH):
            yield loader.batch(rows, torch.zeros_like(rows)).images

    @property
    def pieces(self) -> Pieces:
        """For work that takes minutes; asked for once all models are at hand."""
        if self._pieces is None:
            self._pieces = Pieces(self.run, self.hardware)
        return self._pieces

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

    def require_unit_pixels(self) -> None:
        """Raises UserError where pixels are not in [0, 1]."""
        if self.data.normalise != "none":
            raise UserError(f"data.normalise={self.data.normalise}: sampling clips pixels to [0, 1]; take data.normalise=none")

    def result(self, metrics: dict[str, Any], arrays: Mapping[str, Any] | None = None, *, keep: Collection[str] = ()) -> Result:
        """Metrics rounded to what they mean; NaN where a model had diverged, which is a result.

        keep: metrics that do not depend on it, such as where a curve was measured.
        """
        if self.diverged:
            metrics = {name: x if name in keep else _nan(x) for name, x in metrics.items()}
        status = "diverged" if self.diverged else "finished"
        return Result({name: _rounded(value) for name, value in metrics.items()}, status, self.facts(), dict(arrays or {}))

    def facts(self) -> dict[str, Any]:
        """What a record says of data and machine."""
        earlier = self._pieces.facts() if self._pieces else {}
        return {"data": self.data.fingerprint(), **self.hardware.facts(mixed=False), **earlier}


def _nan(value: Any) -> Any:
    return [float("nan")] * len(value) if isinstance(value, list) else float("nan")


def _rounded(value: Any) -> Any:
    return [_rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.6g}")


def as_bytes(images: Tensor) -> Any:
    """Pixels in [0, 1] as uint8 for the arrays of a record; black where they are not finite."""
    return (255 * images.nan_to_num(0)).clamp(0, 255).round().to(torch.uint8).cpu().numpy()
