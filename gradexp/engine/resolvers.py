"""OmegaConf resolvers, with which conf/ computes settings from others. A change here changes configs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gradexp.base.errors import UserError
from gradexp.engine.run import ROOT


def by_scale(values: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """The entry of `values`, {scale: value}, for the run's scale, such as `${by_scale:{paper: 500, cpu: 12, quick: 8}}`.

    In a defaults list it chooses the file of a group. Raises UserError where `values` has no entry for the scale.
    """
    scale = _root_["scale"]
    name = scale if isinstance(scale, str) else scale["name"]  # a defaults list knows choices of groups only
    if name not in values:
        known = ", ".join(f"{key}: {value}" for key, value in values.items())
        raise UserError(f"scale={name}: by_scale:{{{known}}} in conf/ has no value for it; add '{name}: VALUE' there")
    return values[name]


def longer(unit: str, passes: int, steps: int, per_class: int | None, classes: int, batch_size: int) -> int | None:
    """The longer of `passes` over the training subset and `steps`: its length if that is in `unit`, otherwise None.

    unit: `passes` or `steps`. per_class: images of each class; None for the whole data set, where `passes` are longer.
    """
    numbers = (classes, batch_size) if per_class is None else (per_class, classes, batch_size)
    if any(type(number) is not int or number < 1 for number in numbers):
        return passes if unit == "passes" else None  # build refuses the wrong setting
    longest = per_class is None or passes * math.ceil(per_class * classes / batch_size) > steps
    return {"passes": passes if longest else None, "steps": None if longest else steps}[unit]


def absolute(folder: str) -> str:
    """A folder of `paths`, relative ones from the repository, as in engine.run.Paths."""
    return str(ROOT / Path(folder).expanduser())


OmegaConf.register_new_resolver("absolute", absolute, replace=True)
OmegaConf.register_new_resolver("by_scale", by_scale, replace=True)
OmegaConf.register_new_resolver("longer", longer, replace=True)
