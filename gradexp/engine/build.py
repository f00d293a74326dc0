"""From a config node to the object it names, its settings checked against the types that the object declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache, partial
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter
from typing_extensions import is_typeddict

from gradexp.base.errors import UserError, nearest
from gradexp.base.typed import faults_of
from gradexp.engine.registry import kind_of, locate, targets

SPECIAL = ("_target_", "_partial_")


def build(node: dict[str, Any], *, where: str, **extra: Any) -> Any:
    """Calls the node's `_target_` with its other keys and `extra`; nested nodes are built first.

    where: the node's place in the config, which decides what may be built (gradexp/engine/registry.py).
    Null for a key that has a default leaves the default. Raises UserError for a key that the target does not take, and for a
    value that is not of the type or in the range that the target declares.
    """
    function, settings = _checked(node, where)
    nested = {key: build(value, where=f"{where}.{key}") for key, value in settings.items() if _is_node(value)}
    arguments = settings | nested | extra
    if node.get("_partial_"):
        return partial(function, **arguments)
    for name, parameter in _parameters(function).items():
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if named and parameter.default is parameter.empty and name not in arguments:
            raise UserError(f"{where}.{name} is missing: {function.__name__} needs it")
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
        if key in SPECIAL:
            continue
        if key not in parameters and not open_ended:
            raise UserError(f"{where}.{key}: {function.__name__} takes no such key{nearest(key, parameters)}")
        if value is None and key in parameters and parameters[key].default is not inspect.Parameter.empty:
            continue
        if key in types and not _is_node(value):
            for fault in faults_of(types[key], value):
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
