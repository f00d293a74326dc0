"""Saliency maps: method(model, images, target=None) -> (B, 1, H, W). FullGrad, and what it is compared with."""

from gradexp.saliency.baselines import (
    GradCAM,
    GradientTimesInput,
    InputGradient,
    IntegratedGradients,
    SmoothGrad,
    SmoothGradSquared,
)
from gradexp.saliency.fullgrad import FullGrad, SimpleFullGrad, SmoothFullGrad
from gradexp.saliency.method import Saliency
from gradexp.saliency.random import Random
from gradexp.saliency.reference import (
    ReferenceFullGrad,
    ReferenceGradCAM,
    ReferenceSimpleFullGrad,
    ReferenceSmoothFullGrad,
)

__all__ = [
    "FullGrad",
    "GradCAM",
    "GradientTimesInput",
    "InputGradient",
    "IntegratedGradients",
    "Random",
    "ReferenceFullGrad",
    "ReferenceGradCAM",
    "ReferenceSimpleFullGrad",
    "ReferenceSmoothFullGrad",
    "Saliency",
    "SimpleFullGrad",
    "SmoothFullGrad",
    "SmoothGrad",
    "SmoothGradSquared",
]
