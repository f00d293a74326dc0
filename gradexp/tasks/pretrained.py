"""Published weights as a run, so that they can be upstream of other runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from gradexp.base.errors import UserError
from gradexp.base.files import sha256
from gradexp.base.typed import FileName
from gradexp.engine.assemble import make_hardware, make_model, save_weights
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Task, Upstream
from gradexp.models.pretrained import load_weights, published_file


@dataclass(kw_only=True)
class Pretrained(Task):
    """Loads torchvision's weights into the run's model, from `weights/` in the data folder, and downloads them if missing.

    file: another file in `weights/`, which is never downloaded.
    """

    file: FileName | None = None

    product: ClassVar[str] = "weights.pt"

    def check(self, run: Run) -> None:
        self.find(run)

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        model, file = make_model(run.config), self.find(run)
        load_weights(model, file)
        save_weights(run, model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        facts = {"weights_file": {"name": file.name, "sha256": sha256(file)}}
        return Result({"parameters": parameters}, facts=facts | make_hardware(run.config).facts(mixed=False))

    def find(self, run: Run) -> Path:
        """The file to load. Raises UserError where it is damaged, or missing and cannot be downloaded."""
        architecture = run.config["model"].get("architecture")
        if architecture is None:
            raise UserError("task=pretrained reads weights of a network of torchvision, such as model=resnet34_imagenet")
        name, address = published_file(architecture)
        file = run.paths.data / "weights" / (self.file or name)
        if file.exists():
            if not self.file:
                check_digest(file)
            return file
        try:
            if self.file:
                raise FileNotFoundError("task.file is never downloaded")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(file), hash_prefix=file.stem.rpartition("-")[2], progress=False)
        except Exception as error:  # URLError, OSError, RuntimeError for another hash, ...
            raise UserError(
                f"{file} is missing and can't be downloaded ({error}). Place torchvision's {name} there, from {address}, "
                "or your own weights of this architecture: task.file=NAME (for a teacher, +upstream.teacher.task.file=NAME)"
            ) from None
        return file


def check_digest(file: Path) -> None:
    """Raises UserError for a damaged file: the names of torchvision's files end with the start of their SHA-256."""
    if not sha256(file).startswith(file.stem.rpartition("-")[2]):
        raise UserError(f"{file} is damaged: its contents do not match its name; download it again")
