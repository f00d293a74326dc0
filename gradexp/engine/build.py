"""From a config node to the object it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from gradexp.base.errors import UserError, nearest
from gradexp.engine.registry import locate

SPECIAL = ("_target_", "_partial_")


def build(node: dict[str, Any], *, where: str, **extra: Any) -> Any:
    """Calls the node's `_target_` with its other keys and `extra`; nested nodes are built first.

    where: the node's place in the config: it is named in messages, and says what may be built (gradexp/engine/registry.py).
    A key that the target does not take is an error; null for one that has a default leaves the default.
    """
    if "_target_" not in node:
        raise UserError(f"{where} has no _target_: it does not say what to build")
    function = locate(node["_target_"], where)
    given = {key: value for key, value in node.items() if key not in SPECIAL}
    _check_keys(function, given, where)
    given = {key: value for key, value in given.items() if value is not None or not _has_default(function, key)}
    arguments = {key: _built(value, f"{where}.{key}") for key, value in given.items()} | extra
    if node.get("_partial_"):
        return partial(function, **arguments)
    _check_complete(function, arguments, where)
    return function(**arguments)


def _built(value: Any, where: str) -> Any:
    return build(value, where=where) if isinstance(value, dict) and "_target_" in value else value


def _has_default(function: Callable[..., Any], key: str) -> bool:
    parameter = _parameters(function).get(key)
    return parameter is not None and parameter.default is not parameter.empty


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


def _check_keys(function: Callable[..., Any], given: dict[str, Any], where: str) -> None:
    parameters = _parameters(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key in given:
        if key not in parameters:
            raise UserError(f"{where}.{key}: {function.__name__} takes no such key{nearest(key, parameters)}")


def _check_complete(function: Callable[..., Any], arguments: dict[str, Any], where: str) -> None:
    for name, parameter in _parameters(function).items():
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if named and parameter.default is parameter.empty and name not in arguments:
            raise UserError(f"{where}.{name} is missing: {function.__name__} needs it")
