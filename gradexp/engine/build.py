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
from gradexp.engine.registry import locate

SPECIAL = ("_target_", "_partial_")


def build(node: dict[str, Any], *, where: str, **extra: Any) -> Any:
    """Calls the node's `_target_` with its other keys and `extra`; nested nodes are built first.

    where: the node's place in the config: it is named in messages, and says what may be built (gradexp/engine/registry.py).
    Null for a key that has a default leaves the default. Raises UserError for a key that the target does not take, and for a
    value that is not of the type or in the range that the target declares.
    """
    function, given = checked(node, where)
    arguments = {key: _built(value, f"{where}.{key}") for key, value in given.items()} | extra
    if node.get("_partial_"):
        return partial(function, **arguments)
    for name, parameter in _parameters(function).items():
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if named and parameter.default is parameter.empty and name not in arguments:
            raise UserError(f"{where}.{name} is missing: {function.__name__} needs it")
    return function(**arguments)


def checked(node: dict[str, Any], where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a node calls, and with what; nested nodes as they are. Raises UserError for a wrong key or value."""
    if "_target_" not in node:
        raise UserError(f"{where} has no _target_: it does not say what to build")
    function = locate(node["_target_"], where)
    parameters, types = _parameters(function), _types(function)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {}
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
        given[key] = value
    return function, given


def check(node: Any, where: str) -> None:
    """Raises UserError for a wrong key or value of a node, or of one inside it; builds nothing."""
    if _is_node(node):
        checked(node, where)
    if isinstance(node, dict):
        for key, value in node.items():
            check(value, f"{where}.{key}")


def check_settings(config: dict[str, Any]) -> None:
    """The same of a run's whole config, upstream runs aside."""
    for key, node in config.items():
        if key == "evaluate":  # the task's own settings stand among those of the score
            node = score_node(node)
        if key != "upstream":
            check(node, key)


def score_node(evaluate: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate` builds: all but what it tells the task, how many images to look at and how many at a time."""
    return {key: value for key, value in evaluate.items() if key not in ("images", "batch_size")}


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _built(value: Any, where: str) -> Any:
    return build(value, where=where) if _is_node(value) else value


@cache
def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a function takes; of a class that hands `**options` on to its base classes, also what these take."""
    found = dict(inspect.signature(function).parameters)
    for base in inspect.getmro(function)[1:-1] if inspect.isclass(function) else ():
        rest = [name for name, parameter in found.items() if parameter.kind is parameter.VAR_KEYWORD]
        if not rest:
            break
        del found[rest[0]]
        found = dict(inspect.signature(base).parameters) | found
    return found


@cache
def _types(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """The declared types of what a function takes, as far as a value from a config can be checked against them."""
    owners = [function] if not inspect.isclass(function) or is_dataclass(function) else reversed(inspect.getmro(function)[:-1])
    hints: dict[str, Any] = {}
    for owner in owners:
        with suppress(NameError):  # of types that are imported for type checkers alone
            plain = inspect.isclass(owner) and not is_dataclass(owner)
            hints |= get_type_hints(owner.__init__ if plain else owner, include_extras=True)
    settings = ConfigDict(strict=True, arbitrary_types_allowed=True)
    found = {}
    for name in _parameters(function).keys() & hints.keys():
        with suppress(PydanticSchemaGenerationError):
            own = is_typeddict(hints[name]) or is_dataclass(hints[name])  # pydantic refuses settings for these
            found[name] = TypeAdapter(hints[name], config=None if own else settings)
    return found
