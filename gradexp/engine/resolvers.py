"""OmegaConf resolvers, with which conf/ computes settings from others. A change here changes configs."""

import math

from omegaconf import OmegaConf


def longer(unit: str, passes: int, steps: int, per_class: int | None, classes: int, batch_size: int) -> int | None:
    """The longer of `passes` over the training subset and `steps`: its length if that is in `unit`, otherwise None.

    unit: `passes` or `steps`. per_class: images of each class; None for the whole data set, where `passes` are longer.
    """
    longest = per_class is None or passes * math.ceil(per_class * classes / batch_size) > steps
    return {"passes": passes if longest else None, "steps": None if longest else steps}[unit]


OmegaConf.register_new_resolver("longer", longer, replace=True)
