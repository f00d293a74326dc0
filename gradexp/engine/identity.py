"""The id of a run: a digest of the part of its config that decides its numbers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from gradexp.engine.registry import FORMER

# Where and how a run is executed, which is not part of its identity.
HARDWARE = ("paths", "trainer", "logger", "launcher", "gradients", "objective")


def run_id(config: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that name a run."""
    text = json.dumps(identity(config), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that decides the numbers of its run.

    Null values and terms of weight 0 are left out, so that a setting can be added later with null for the former behaviour
    without changing ids. Of the scale only the name counts, as its settings are interpolated into the other groups.
    1 and 1.0 are the same number. Classes have the names that they had when the first ids were made.
    """
    kept = {key: value for key, value in config.items() if key not in HARDWARE}
    upstream = {name: identity(run) for name, run in config["upstream"].items()}
    return _canonical(kept | {"scale": config["scale"]["name"], "upstream": upstream})


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _canonical(item) for key, item in value.items() if item is not None}
        if "_target_" in kept:
            kept["_target_"] = FORMER.get(kept["_target_"], kept["_target_"])
        return {key: item for key, item in kept.items() if not (isinstance(item, dict) and item.get("weight") == 0)}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
