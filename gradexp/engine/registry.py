"""The one place where a name in a config becomes a class or function, and which names each place may hold.

A config may come from somebody else: an experiment, a record that is verified. So that none of them can run code that was
not written to be named there, every place has a kind, and a kind lists what may be built: names one by one, or the
subclasses of one class that are defined below one package.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gradexp.base.errors import UserError, nearest


@dataclass(frozen=True)
class Kind:
    """What may be built in one kind of place.

    what: in messages. names: classes and functions, in full. package and base: also the subclasses of `base` that are
    defined below `package`. returns: also the functions defined there whose return type is annotated with this word.
    """

    what: str
    names: tuple[str, ...] = ()
    package: str | None = None
    base: str | None = None
    returns: str | None = None

    def allowed(self) -> str:
        """In words, for a message."""
        listed = [*self.names]
        if self.base:
            listed.append(f"a subclass of {self.base} in {self.package}")
        if self.returns:
            listed.append(f"a function in {self.package} that returns a {self.returns}")
        return " or ".join(listed)

    def named(self, target: str) -> bool:
        """Whether `target`, from its name alone, may be built here."""
        return target in self.names or (self.package is not None and target.startswith(f"{self.package}."))

    def holds(self, target: str, found: Any) -> bool:
        """Whether `found`, the object that `target` names, may be built here."""
        if target in self.names:
            return True
        if not inspect.isclass(found) and not inspect.isfunction(found):
            return False
        if self.package is None or not f"{found.__module__}.".startswith(f"{self.package}."):
            return False
        if inspect.isclass(found):
            return self.base is not None and issubclass(found, _imported(self.base))
        return self.returns is not None and found.__annotations__.get("return") == self.returns


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
ALSO = {"denoising": "sampling"}  # places with another name than their kind
# What records of earlier versions name, and what that is called now.
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
FORMER = {now: was for was, now in MOVED.items()}  # ids keep the name that a class had when they were first made


def kind_of(where: str) -> str | None:
    """The kind of a place in a config, such as `optim.schedule`; None where nothing is built."""
    *before, last = where.split(".")
    if before[-1:] == ["terms"]:
        return "term"
    return ALSO.get(last, last if last in KINDS else None)


def locate(target: str, where: str) -> Callable[..., Any]:
    """What `target` names. Raises UserError for anything that may not be built at the place `where`."""
    target = MOVED.get(target, target)
    kind = _check(target, where)
    found: Callable[..., Any] = _imported(target)
    if not kind.holds(target, found):
        raise _refusal(target, where, kind)
    return found


def check_targets(config: Mapping[str, Any]) -> None:
    """Raises UserError for a `_target_` anywhere in a run's config, upstream runs included, that can't be meant there.

    It goes by names and imports nothing; `locate` looks at the object as well.
    """
    for where, target in targets(config):
        _check(target, where)


def targets(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(place, name) of all that a run's config names, upstream runs included."""
    for where, target in _targets(config, ""):
        yield where.removeprefix("."), MOVED.get(str(target), str(target))


def _check(target: str, where: str) -> Kind:
    name = kind_of(where)
    if name is None:
        raise UserError(f"{where}._target_={target} is refused: nothing is built there")
    if not KINDS[name].named(target):
        raise _refusal(target, where, KINDS[name])
    return KINDS[name]


def _refusal(target: str, where: str, kind: Kind) -> UserError:
    return UserError(f"{where}._target_={target} is refused: {kind.what} is {kind.allowed()}")


def _targets(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, list | tuple):
        for item in node:
            yield from _targets(item, f"{where}[]")
    elif isinstance(node, Mapping):
        if "_target_" in node:
            yield where, node["_target_"]
        if where.endswith("method") and "module" in node:
            yield f"{where}.module", node["module"]
        for key, value in node.items():
            yield from _targets(value, f"{where}.{key}")


def _imported(target: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        place = importlib.import_module(module)
    except (ImportError, ValueError) as error:  # or it is there, and can't be imported
        raise UserError(f"_target_={target}: there is no such class or function ({error})") from error
    if not hasattr(place, name):
        raise UserError(f"_target_={target}: {module} has no {name}{nearest(name, vars(place))}")
    return getattr(place, name)
