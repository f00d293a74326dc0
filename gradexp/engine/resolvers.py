"""What conf/ computes from other settings: OmegaConf resolvers. A change here is a change of configs."""

import math

from omegaconf import OmegaConf


def longer(unit: str, passes: int, steps: int, per_class: int | None, classes: int, batch_size: int) -> int | None:
    """The longer of `passes` over the training subset and `steps`: its length where `unit` is its unit, otherwise None.

    unit: `passes` or `steps`. per_class: images of each class; None is the whole data set, which passes are longer on.
    """
    longest = per_class is None or passes * math.ceil(per_class * classes / batch_size) > steps
    return {"passes": passes if longest else None, "steps": None if longest else steps}[unit]


OmegaConf.register_new_resolver("longer", longer, replace=True)
