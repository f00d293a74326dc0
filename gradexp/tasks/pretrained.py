"""Published weights, as a run that others can stand on."""

from __future__ import annotations

from pathlib import Path

import torch

from gradexp.base.errors import UserError
from gradexp.engine.build import build
from gradexp.engine.hardware import Hardware
from gradexp.engine.runs import Result, Run, sha256
from gradexp.models.pretrained import load_weights, published_file
from gradexp.tasks.train import save_weights


def pretrained(run: Run) -> Result:
    """Loads torchvision's weights into the run's model, from `weights/` below the data root; fetches them where it can."""
    model = build(run.config["model"], where="model")
    file = find(run)
    load_weights(model, file)
    save_weights(run, model)
    hardware: Hardware = build(run.config["trainer"], where="trainer")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"weights_file": {"name": file.name, "sha256": sha256(file)}, **hardware.facts(mixed=False)}
    return Result({"parameters": parameters}, facts=facts)


def find(run: Run) -> Path:
    """The weights file that the task names, or torchvision's own. Raises UserError naming the file to place."""
    name, address = published_file(run.config["model"]["architecture"])
    given = run.config["task"]["file"]
    file = run.paths.data / "weights" / (given or name)
    if file.exists():
        if not given:
            check(file)
        return file
    try:
        if given:
            raise FileNotFoundError("a file of your own is not fetched")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(file), hash_prefix=file.stem.rpartition("-")[2], progress=False)
    except Exception as error:  # URLError, OSError, RuntimeError for another hash, ...
        raise UserError(
            f"{file} is missing and can't be fetched ({error}). Place torchvision's {name} there, from {address}, "
            f"or a file of your own with the same architecture: task.file=NAME (+upstream.teacher.task.file=NAME where a "
            f"student's teacher is meant)"
        ) from None
    return file


def check(file: Path) -> None:
    """torchvision's files bear the start of their SHA-256 in their names."""
    if not sha256(file).startswith(file.stem.rpartition("-")[2]):
        raise UserError(f"{file} is damaged: its contents are not what its name says; fetch it again")
