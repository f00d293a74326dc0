"""Checks of plain dicts (configs, records, specs of tables and claims) against TypedDicts, with one-line messages."""

from __future__ import annotations

import re
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import get_type_hints, is_typeddict

from gradexp.base.errors import UserError, nearest

strict = with_config(ConfigDict(extra="forbid", strict=True))  # a TypedDict without further keys


def _file_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w .,+=@()-]*", text):
        raise ValueError("should be a name, which begins with a letter or digit and contains no / or \\")
    return text


FileName = Annotated[str, AfterValidator(_file_name)]  # of a file or folder inside another one, not a path


def check(kind: Any, value: Any, where: str) -> Any:
    """`value`, if it is of the type `kind`, mostly a TypedDict. Raises UserError about the first fault otherwise."""
    if wrong := faults(kind, value):
        raise UserError(f"{where}: {wrong[0]}")
    return value


def faults(kind: Any, value: Any) -> list[str]:
    """What is wrong with a value, a line each, misspelt keys first; empty if it fits `kind`."""
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        errors = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
        return [_sentence(kind, each) for each in errors]
    return []


def fault_of(adapter: TypeAdapter[Any], value: Any) -> str | None:
    """What is wrong with a value, such as `=abc: it should be a valid integer`, in one line; None if it is of the type."""
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        messages = dict.fromkeys(_message(each) for each in error.errors(include_url=False))
        return f"={value}: it {' or '.join(messages)}"
    return None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _sentence(kind: Any, error: Any) -> str:
    *parents, last = error["loc"] or ("",)
    if error["type"] == "extra_forbidden":
        where = f" in {_dotted(parents)}" if parents else ""
        known = _keys(kind, parents)
        return f"there is no key {last}{where}{nearest(str(last), known)} It may have {', '.join(known)}"
    if error["type"] == "missing":
        return f"{_dotted(error['loc'])} is missing"
    where = f"{_dotted(error['loc'])}=" if error["loc"] else ""
    return f"{where}{error['input']!r} {_message(error)}"


def _message(error: Any) -> str:
    if error["type"] == "missing":
        return "is incomplete"
    if error["type"] == "sequence_str":
        return "should be a list"
    return str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")


def _dotted(loc: Any) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc).lstrip(".")


def _keys(kind: Any, loc: Any) -> list[str]:
    """The keys of the TypedDict at `loc` inside `kind`."""
    candidates = [kind]
    for step in loc:
        candidates = [below for each in candidates for below in _inside(each, step)]
    return list(dict.fromkeys(key for each in candidates if is_typeddict(each) for key in get_type_hints(each)))


def _inside(kind: Any, step: Any) -> list[Any]:
    """The types one step inside `kind`: of a key of a TypedDict, a value of a dict or an item of a list."""
    if is_typeddict(kind):
        return _options(get_type_hints(kind).get(step))
    inside = [option for argument in get_args(kind) for option in _options(argument)]
    return inside if get_origin(kind) in (list, dict, tuple) else [kind]


def _options(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, UnionType):
        return [option for argument in get_args(kind) for option in _options(argument)]
    return [] if kind is None else [kind]
