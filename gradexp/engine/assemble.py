"""Builds what tasks work with from a config: data set, networks, loss terms, hardware."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from gradexp import layers
from gradexp.base.errors import UserError
from gradexp.base.files import write_sealed
from gradexp.data.dataset import ImageData
from gradexp.engine.build import build
from gradexp.engine.hardware import Hardware
from gradexp.engine.record import differing_split
from gradexp.engine.run import Config, Paths, Run
from gradexp.engine.task import Finished
from gradexp.saliency import Saliency
from gradexp.terms import Term
from gradexp.training.optim import Optim


def make_hardware(config: Config) -> Hardware:
    """The hardware that `trainer` names, with its settings applied to this process."""
    hardware = declare_hardware(config)
    hardware.apply()
    return hardware


def declare_hardware(config: Config) -> Hardware:
    """The hardware that `trainer` names; this process stays as it is."""
    return build(config["trainer"], where="trainer")


def declare_data(config: Config, paths: Paths) -> ImageData:
    """The config's data set. No file is opened: shapes and, for photographs, normalisation are known without."""
    return build(config["data"], where="data", root=paths.data, cache=paths.cache, seed=config["seed"])


def make_data(run: Run) -> ImageData:
    """The run's data set.

    Raises UserError for missing files, too small classes, and other images than the run's record or its upstream runs have.
    """
    data = declare_data(run.config, run.paths)
    found: Any = data.fingerprint()
    for other in (run, *run.upstream.values()):
        record = other.record()
        if record and (split := differing_split(found, record.get("data", {}))):
            raise UserError(
                f"the {split} images of {found['name']} are not those of {other.name} {other.id} (fingerprint {found[split]}, "
                f"there {record['data'][split]}); use the data root that it was made with (paths.data=FOLDER), or delete its "
                f"record and its folder of outputs to make it again from these images"
            )
    return data


def make_terms(config: Config) -> dict[str, Term]:
    """The method's loss terms by name, without those of weight 0."""
    nodes = {name: node for name, node in config["method"]["terms"].items() if node.get("weight") != 0}
    return {name: build(node, where=f"method.terms.{name}") for name, node in nodes.items()}


def make_saliency(config: Config, data: ImageData, hardware: Hardware) -> Saliency:
    """The config's saliency method, for images in the normalisation of `data`."""
    black, std = data.black.to(hardware.device), data.statistics[1].view(-1, 1, 1).to(hardware.device)
    return build(config["saliency"], where="saliency", black=black, std=std)


def make_model(config: Config, where: str = "model") -> nn.Module:
    """The config's network with random parameters. where: its place in the config, for messages."""
    return build(config["model"], where=where)


def make_optim(config: Config) -> Optim:
    """The length of the training, its optimizer and its schedule."""
    return build(config["optim"], where="optim")


def load_model(finished: Finished, hardware: Hardware) -> nn.Module:
    """The trained model of a finished run, in eval mode and with frozen parameters."""
    model = make_model(finished.run.config)
    model.load_state_dict(load_weights(finished))
    model = hardware.place(model).eval().requires_grad_(False)
    return accelerate(model, {}, hardware) if finished.run.config["gradients"]["backend"] == "fast" else model


def load_weights(finished: Finished) -> dict[str, Tensor]:
    """The parameters that a finished run left, on the CPU. Raises UserError where the file can't be read."""
    try:
        return torch.load(finished.product, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises whatever its readers of archives do
        why = str(error).splitlines()[:1]
        raise UserError(f"{finished.product} can't be read {why}; delete its folder, and the run is done again") from None


def save_weights(run: Run, model: nn.Module) -> None:
    """Writes the model's parameters to `run.weights`, with a checksum beside it."""
    content = io.BytesIO()  # torch would write the file's name into the file, and so into its digest
    torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, content)
    write_sealed(run.weights, content.getvalue())


def accelerate(model: nn.Module, terms: dict[str, Term], hardware: Hardware) -> nn.Module:
    """The model with fast layers where these are faster: on a CPU, or with gradients in its loss terms."""
    faster = hardware.kind == "cpu" or any(term.gradient_target for term in terms.values())
    return layers.accelerate(model) if faster else model


def start_from(student: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads the weights of the upstream run `start`. Raises UserError if they do not fit the network."""
    try:
        getattr(student, "start_from", student.load_state_dict)(weights)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise UserError(f"the weights of upstream.start do not fit the model ({why}); give both the same model") from None
