"""The one place where a name in a config becomes a class or function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from gradexp.errors import UserError

ALLOWED = ("gradexp", "torch", "torchvision", "lightning", "captum")


def locate(target: str) -> Callable[..., Any]:
    """What `_target_` names. Raises UserError for any other package than ALLOWED."""
    if target.split(".")[0] not in ALLOWED:
        raise UserError(f"_target_={target} is refused: only {', '.join(ALLOWED)} may be named in a config")
    module, _, name = target.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found
    except (ImportError, AttributeError, ValueError) as error:  # or the module is there, and can't be imported
        raise UserError(f"_target_={target}: there is no such class or function ({error})") from error
