"""gradexp: the experiments of *Gradient-based Methods for Deep Model Interpretability* (S. Srinivas, EPFL 2021)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradexp.gradients import full_gradient as full_gradient
    from gradexp.gradients import input_gradient as input_gradient
    from gradexp.layers import accelerate as accelerate
    from gradexp.report.records import records as records
    from gradexp.saliency import FullGrad as FullGrad
    from gradexp.saliency import GradCAM as GradCAM
    from gradexp.saliency import SmoothGrad as SmoothGrad

__version__ = "0.1.0"

# Imported when they are first used: torch, pandas and Hydra take seconds.
WHERE = {
    "FullGrad": "gradexp.saliency",
    "GradCAM": "gradexp.saliency",
    "SmoothGrad": "gradexp.saliency",
    "accelerate": "gradexp.layers",
    "full_gradient": "gradexp.gradients",
    "input_gradient": "gradexp.gradients",
    "records": "gradexp.report.records",
}

__all__ = list(WHERE)


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *WHERE]
