"""Measurements of trained models and of saliency maps, one per file.

Those of saliency methods are functions of (model, images, method), without runs and configs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradexp.evaluate.completeness import completeness_error as completeness_error
    from gradexp.evaluate.masking import remove as remove
    from gradexp.evaluate.masking import salient_mask as salient_mask
    from gradexp.evaluate.model_randomisation import randomisation_correlations as randomisation_correlations
    from gradexp.evaluate.pixel_perturbation import perturb_pixels as perturb_pixels
    from gradexp.evaluate.quantus import explain_func as explain_func

# Imported when they are first used: SciPy and Captum take seconds.
WHERE = {
    "completeness_error": "completeness",
    "explain_func": "quantus",
    "perturb_pixels": "pixel_perturbation",
    "randomisation_correlations": "model_randomisation",
    "remove": "masking",
    "salient_mask": "masking",
}
__all__ = list(WHERE)


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *WHERE]
