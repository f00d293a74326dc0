"""Which class or function a `_target_` in a config may name, and how the name becomes the object.

A config may come from somebody else, in an experiment or in a record that is verified, and must not be able to run code that
was not meant to be named there. So every place in a config has a kind, and a kind lists what may be built: single names, or
the subclasses of one class that are defined in one package.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gradexp.base.errors import UserError, nearest
from gradexp.engine import plugins


@dataclass(frozen=True)
class Kind:
    """What may be built in one kind of place.

    what: in messages. names: classes and functions, in full. package and base: also the subclasses of `base` that are
    defined in `package` or in a package that GRADEXP_PLUGINS names. returns: also the functions defined there whose return
    annotation is this text.
    """

    what: str
    names: tuple[str, ...] = ()
    package: str | None = None
    base: str | None = None
    returns: str | None = None

    def covers(self, name: str) -> bool:
        """Whether `name` lies in one of the packages."""
        return self.package is not None and name.startswith(tuple(f"{each}." for each in (self.package, *plugins.packages())))

    def admits(self, located: Any) -> bool:
        """Whether an object of these packages may be built here."""
        if not self.covers(f"{located.__module__}."):
            return False
        if inspect.isclass(located):
            return self.base is not None and issubclass(located, _imported(self.base))
        return self.returns is not None and located.__annotations__.get("return") == self.returns

    @property
    def allowed(self) -> str:
        options = [*self.names]
        options += [f"a subclass of {self.base} in {self.package}"] if self.base else []
        options += [f"a function in {self.package} that returns a {self.returns}"] if self.returns else []
        own = f"; a package of your own is named in {plugins.VARIABLE}" if self.package else ""
        return f"{self.what} is {' or '.join(options)}{own}"


_ACTIVATIONS = ("ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Softplus", "Sigmoid", "Tanh", "Identity")

KINDS: dict[str, Kind] = {
    "activation": Kind("an activation", tuple(f"torch.nn.{name}" for name in _ACTIVATIONS)),
    "data": Kind("a data set", package="gradexp.data", base="gradexp.data.dataset.ImageData"),
    "draw": Kind("a drawing", package="gradexp.report.draw", returns="tuple[Figure, list[Row]]"),
    "evaluate": Kind("a score", package="gradexp.evaluate", base="builtins.object"),
    "launcher": Kind("a launcher", ("gradexp.engine.launchers.Local", "gradexp.engine.launchers.Slurm")),
    "logger": Kind("a logger", tuple(f"gradexp.engine.loggers.{name}" for name in ("none", "csv", "wandb"))),
    "model": Kind("a network", ("gradexp.models.pretrained.torchvision_model",), "gradexp.models", "torch.nn.Module"),
    "module": Kind("a LightningModule", package="gradexp.training", base="gradexp.training.classifier.Classifier"),
    "optim": Kind("the length and rate of a training", ("gradexp.training.optim.Optim",)),
    "optimizer": Kind("an optimizer", package="torch.optim", base="torch.optim.Optimizer"),
    "removal": Kind("a removal of pixels", ("gradexp.data.removal.Removal",)),
    "saliency": Kind("a saliency method", package="gradexp.saliency", base="gradexp.saliency.method.Saliency"),
    "sampling": Kind("a sampler", ("gradexp.sampling.Ascent",)),
    "schedule": Kind("a schedule", ("gradexp.training.optim.steps_down", "gradexp.training.optim.one_cycle")),
    "task": Kind("a task", package="gradexp.tasks", base="gradexp.engine.task.Task"),
    "term": Kind("a loss term", package="gradexp.terms", base="gradexp.terms.term.Term"),
    "trainer": Kind("the hardware", ("gradexp.engine.hardware.Hardware",)),
}
ALSO = {"denoising": "sampling"}  # places whose name is not that of their kind
# Names in records of earlier versions, and those of today.
MOVED = {
    "gradexp.tasks.hardware.Hardware": "gradexp.engine.hardware.Hardware",
    "gradexp.tasks.loggers.csv": "gradexp.engine.loggers.csv",
    "gradexp.tasks.loggers.none": "gradexp.engine.loggers.none",
    "gradexp.tasks.loggers.wandb": "gradexp.engine.loggers.wandb",
    "gradexp.tasks.density.density_ratio": "gradexp.tasks.density_ratio.DensityRatio",
    "gradexp.tasks.density.discriminative_perturbation": "gradexp.tasks.discriminative_perturbation.DiscriminativePerturbation",
    "gradexp.tasks.density.gan_test": "gradexp.tasks.gan_test.GANTest",
    "gradexp.tasks.density.implicit_samples": "gradexp.tasks.implicit_samples.ImplicitSamples",
    "gradexp.tasks.density.score_objective": "gradexp.tasks.score_objective.ScoreObjective",
    "gradexp.tasks.fool.fool": "gradexp.tasks.fool.Fool",
    "gradexp.tasks.illustration.illustration": "gradexp.tasks.illustration.Illustration",
    "gradexp.tasks.model_randomisation.model_randomisation": "gradexp.tasks.model_randomisation.ModelRandomisation",
    "gradexp.tasks.noise.noise": "gradexp.tasks.noise.Noise",
    "gradexp.tasks.pretrained.pretrained": "gradexp.tasks.pretrained.Pretrained",
    "gradexp.tasks.saliency_gallery.saliency_gallery": "gradexp.tasks.saliency_gallery.SaliencyGallery",
    "gradexp.tasks.saliency_gallery.saliency_layers": "gradexp.tasks.saliency_layers.SaliencyLayers",
    "gradexp.tasks.saliency_maps.saliency_maps": "gradexp.tasks.saliency_maps.SaliencyMaps",
    "gradexp.tasks.saliency_score.saliency_score": "gradexp.tasks.saliency_score.SaliencyScore",
    "gradexp.tasks.shift.shift": "gradexp.tasks.shift.Shift",
    "gradexp.tasks.train.train": "gradexp.tasks.train.Train",
}
FORMER = {now: was for was, now in MOVED.items()}  # ids are made with the former names


def kind_of(where: str) -> str | None:
    """The kind of a place in a config, such as `optim.schedule`; None where nothing is built."""
    *before, last = where.split(".")
    if before[-1:] == ["terms"]:
        return "term"
    return ALSO.get(last, last if last in KINDS else None)


def locate(target: str, where: str) -> Callable[..., Any]:
    """The object that `target` names. Raises UserError for one that may not be built at the place `where`.

    A module is imported only where its name is allowed.
    """
    target = MOVED.get(target, target)
    name = kind_of(where)
    if name is None:
        raise UserError(f"{where}._target_={target} is refused: nothing is built there")
    kind = KINDS[name]
    if target in kind.names:
        return _imported(target)
    if kind.covers(target):
        located = _imported(target)
        if (inspect.isclass(located) or inspect.isfunction(located)) and kind.admits(located):
            return located
    raise UserError(f"{where}._target_={target} is refused: {kind.allowed}")


def targets(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, node) of all nodes with a `_target_` in a config, upstream runs included."""
    if isinstance(node, list | tuple):
        for item in node:
            yield from targets(item, f"{where}[]")
    elif isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        if where.endswith("method") and "module" in node:
            yield f"{where}.module", {"_target_": node["module"]}
        for key, value in node.items():
            yield from targets(value, f"{where}.{key}".removeprefix("."))


def _imported(target: str) -> Any:
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: no module is named
        raise UserError(f"_target_={target}: there is no such class or function ({error})") from error
    if not hasattr(module, name):
        raise UserError(f"_target_={target}: {module_name} has no {name}{nearest(name, vars(module))}")
    return getattr(module, name)
