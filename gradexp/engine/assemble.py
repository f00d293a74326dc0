"""From a config to what a task works with: data set, networks, loss terms."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from gradexp import layers
from gradexp.base.errors import UserError
from gradexp.base.files import write_sealed
from gradexp.data.dataset import ImageData
from gradexp.engine.build import build
from gradexp.engine.ensure import check_images
from gradexp.engine.hardware import Hardware
from gradexp.engine.run import Config, Paths, Run
from gradexp.engine.task import Finished
from gradexp.saliency import Saliency
from gradexp.terms import Term


def make_hardware(config: Config) -> Hardware:
    """The hardware that `trainer` names, its settings applied to this process."""
    hardware: Hardware = build(config["trainer"], where="trainer")
    hardware.apply()
    return hardware


def declare_data(config: Config, paths: Paths) -> ImageData:
    """The config's data set before any file is opened: shapes and, for photographs, normalisation are known already."""
    data: ImageData = build(config["data"], where="data", root=paths.data, cache=paths.cache, seed=config["seed"])
    return data


def make_data(run: Run) -> ImageData:
    """The run's data set. Raises UserError where files are missing, classes too small, or upstream runs saw other images."""
    data = declare_data(run.config, run.paths)
    check_images(run, data.fingerprint())
    return data


def make_terms(config: Config) -> dict[str, Term]:
    """The method's loss terms by name, those of weight 0 left out."""
    nodes = {name: node for name, node in config["method"]["terms"].items() if node["weight"] != 0}
    return {name: build(node, where=f"method.terms.{name}") for name, node in nodes.items()}


def make_saliency(config: Config, data: ImageData, hardware: Hardware) -> Saliency:
    """The config's saliency method, told how the data is normalised."""
    units = {"black": data.black, "std": data.statistics[1].view(-1, 1, 1)}
    placed = {name: value.to(hardware.device) for name, value in units.items()}
    method: Saliency = build(config["saliency"], where="saliency", **placed)
    return method


def make_model(run: Run, where: str = "model") -> nn.Module:
    """The network of a run, with random parameters. where: its place in the config, for messages."""
    model: nn.Module = build(run.config["model"], where=where)
    return model


def load_model(finished: Finished, hardware: Hardware) -> nn.Module:
    """The trained model of a finished run, in eval mode and frozen, so that differentiating it skips its parameters."""
    model = make_model(finished.run)
    model.load_state_dict(load_weights(finished))
    model = hardware.place(model).eval().requires_grad_(False)
    return accelerate(model, {}, hardware) if fast_backend(finished.run.config) else model


def load_weights(finished: Finished) -> dict[str, Tensor]:
    """The parameters that a finished run left, on the CPU."""
    weights: dict[str, Tensor] = torch.load(finished.product, weights_only=True, map_location="cpu")
    return weights


def save_weights(run: Run, model: nn.Module) -> None:
    """Writes the model's parameters to `run.weights`, with a checksum beside it."""
    content = io.BytesIO()  # a file's name would be part of what torch writes, and of its digest
    torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, content)
    write_sealed(run.weights, lambda draft: draft.write_bytes(content.getvalue()))


def fast_backend(config: Config) -> bool:
    """Whether `gradients.backend` is `fast`; `autograd`, PyTorch's own layers, is the reference to compare with."""
    return bool(config["gradients"]["backend"] == "fast")


def accelerate(model: nn.Module, terms: dict[str, Term], hardware: Hardware) -> nn.Module:
    """The model with fast layers where these gain something: gradients in its terms, or any work on a CPU."""
    gains = hardware.kind == "cpu" or any(term.gradient_target for term in terms.values())
    return layers.accelerate(model) if gains else model


def start_from(student: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads the weights of the upstream run `start`. Raises UserError where they are those of another network."""
    try:
        getattr(student, "start_from", student.load_state_dict)(weights)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise UserError(f"the model does not take the weights of upstream.start ({why}); give both the same model") from None
