"""Our saliency methods inside Quantus (Hedström et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from gradexp.gradients import precise
from gradexp.saliency import Saliency


def explain_func(method: Saliency) -> Callable[..., np.ndarray]:
    """`method` as the `explain_func` of a metric of Quantus.

    It is called with model, inputs (B, C, H, W) and targets (B,), arrays or tensors, and returns maps (B, 1, H, W) as an array.
    Further keywords, such as `device`, are ignored: the method works where the model is.
    """

    def explain(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        parameter = next(model.parameters(), torch.empty(0))
        images = torch.as_tensor(inputs).to(parameter)
        labels = torch.as_tensor(targets).to(parameter.device, torch.long)
        maps: np.ndarray = precise(method(model, images, labels)).cpu().numpy()
        return maps

    return explain
