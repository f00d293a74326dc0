"""From a config node to the object that its `_target_` names, with settings of the types that the object declares.

A config may come from somebody else, in an experiment or in a record that is verified, and must not be able to run code that
was not meant to be named there. So every place in a config has a kind, and a kind lists what may be built: single names, or
the subclasses of one class that are defined in one package.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, is_dataclass
from functools import cache, partial
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter
from typing_extensions import is_typeddict

from gradexp.base.errors import UserError, nearest
from gradexp.base.typed import fault_of
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

    def admits(self, target: str) -> bool:
        """Whether what `target` names may be built here. A module is imported only where its name is allowed."""
        if target in self.names:
            return True
        packages = tuple(f"{package}." for package in (self.package, *plugins.packages()))
        if not self.package or not target.startswith(packages):
            return False
        located = _imported(target)
        if not (inspect.isclass(located) or inspect.isfunction(located)):
            return False
        if not f"{located.__module__}.".startswith(packages):
            return False
        if inspect.isclass(located):
            return self.base is not None and issubclass(located, _imported(self.base))
        returned = located.__annotations__.get("return")  # text, in a module with `from __future__ import annotations`
        return self.returns is not None and getattr(returned, "__name__", returned) == self.returns

    def __str__(self) -> str:
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
    "schedule": Kind("a schedule", package="gradexp.training.optim", returns="float"),
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
    """The object that `target` names. Raises UserError for one that may not be built at the place `where`."""
    target, name = MOVED.get(target, target), kind_of(where)
    if name is None:
        raise UserError(f"{where}._target_={target} is refused: nothing is built there")
    with _named_in(where, ("_target_",)):
        if not KINDS[name].admits(target):
            raise UserError(f"_target_={target} is refused: {KINDS[name]}")
        return _imported(target)


@contextmanager
def _named_in(where: str, keys: Collection[str]) -> Iterator[None]:
    """Inside, a UserError that begins with one of `keys`, such as `target=x: ...`, gets the prefix `where.`"""
    try:
        yield
    except UserError as error:
        if str(error).partition("=")[0] in keys:
            raise UserError(f"{where}.{error}") from error
        raise


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
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise UserError(f"_target_={target}: {module_name} can't be imported ({error})") from error
        raise UserError(f"_target_={target}: there is no such class or function ({error})") from error
    except ImportError as error:
        raise UserError(f"_target_={target}: {module_name} can't be imported ({error})") from error
    except ValueError as error:  # no module is named
        raise UserError(f"_target_={target}: there is no such class or function ({error})") from error
    if not hasattr(module, name):
        raise UserError(f"_target_={target}: {module_name} has no {name}{nearest(name, vars(module))}")
    return getattr(module, name)


def build(node: dict[str, Any], *, where: str, **extra: Any) -> Any:
    """Calls the node's `_target_` with its other keys and `extra`; nested nodes are built first.

    where: the node's place in the config, which decides what may be built (KINDS).
    Null for a key that has a default leaves the default. Raises UserError for a key that the target does not take, and for a
    value that is not of the type or in the range that the target declares.
    """
    function, settings = _checked(node, where)
    for key in settings.keys() & extra.keys():
        raise UserError(f"{where}.{key}: it follows from other settings and can't be set")
    nested = {key: build(value, where=f"{where}.{key}") for key, value in settings.items() if _is_node(value)}
    arguments = settings | nested | extra
    if node.get("_partial_"):
        return partial(function, **arguments)
    for name, parameter in _parameters(function).items():
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if named and parameter.default is parameter.empty and name not in arguments:
            raise UserError(f"{where}.{name} is missing: {function.__name__} needs it")
    if inspect.isabstract(function):
        lacks = ", ".join(sorted(vars(function)["__abstractmethods__"]))
        raise UserError(f"{where}._target_={node['_target_']} can't be built: it does not define {lacks}")
    with _named_in(where, settings):
        return function(**arguments)


def check_settings(config: dict[str, Any]) -> None:
    """Raises UserError for a wrong name, key or value in a run's config, upstream runs included; builds nothing."""
    nodes = list(targets(config))
    for where, node in nodes:
        locate(node["_target_"], where)
    for where, node in nodes:
        _checked(score_node(node) if kind_of(where) == "evaluate" else node, where)


def score_node(evaluate: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate` builds: all keys but those of the task, which are how many images to evaluate, and how many at a time."""
    return {key: value for key, value in evaluate.items() if key not in ("images", "batch_size")}


def _checked(node: dict[str, Any], where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a node calls, and its arguments, nested nodes not yet built. Raises UserError for a wrong key or value."""
    if "_target_" not in node:
        raise UserError(f"{where} has no _target_, the class or function to build")
    function = locate(node["_target_"], where)
    parameters, types = _parameters(function), _types(function)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    settings = {}
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if value is None and node.get("_partial_") and key not in parameters:
            continue  # such as weight_decay of Adam, where another optimizer is chosen
        if key not in parameters and not open_ended:
            raise UserError(f"{where}.{key}: {function.__name__} takes no such key{nearest(key, parameters)}")
        if value is None and key in parameters and parameters[key].default is not inspect.Parameter.empty:
            continue
        if key in types and not _is_node(value) and (fault := fault_of(types[key], value)):
            is_tuple = isinstance(value, list) and not fault_of(types[key], tuple(value))  # YAML has no tuples
            if not is_tuple:
                raise UserError(f"{where}.{key}{fault}")
        settings[key] = value
    return function, settings


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


@cache
def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class; where a class passes `**options` on to its base classes, also those of these."""
    parameters = dict(inspect.signature(function).parameters)
    for base in inspect.getmro(function)[1:-1] if inspect.isclass(function) else ():
        options = [name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
        if not options:
            break
        del parameters[options[0]]
        parameters = dict(inspect.signature(base).parameters) | parameters
    return parameters


@cache
def _types(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """The declared types of the parameters, as far as a value from a config can be checked against them."""
    owners = [function] if not inspect.isclass(function) or is_dataclass(function) else reversed(inspect.getmro(function)[:-1])
    hints: dict[str, Any] = {}
    for owner in owners:
        with suppress(NameError):  # types that are imported for type checkers only
            plain = inspect.isclass(owner) and not is_dataclass(owner)
            hints |= get_type_hints(owner.__init__ if plain else owner, include_extras=True)
    settings = ConfigDict(strict=True, arbitrary_types_allowed=True)
    types = {}
    for name in _parameters(function).keys() & hints.keys():
        with suppress(PydanticSchemaGenerationError):
            own = is_typeddict(hints[name]) or is_dataclass(hints[name])  # pydantic refuses settings for these
            types[name] = TypeAdapter(hints[name], config=None if own else settings)
    return types
