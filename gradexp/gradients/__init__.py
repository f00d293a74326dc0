"""Gradients of a classifier: at its input, at its layers, and full-gradients; fast or differentiable, as they are asked for."""

from gradexp.gradients.capture import attention_map, captured, channel_sum, evaluating, precise
from gradexp.gradients.full import FullGradient, full_gradient
from gradexp.gradients.inputs import (
    INPUT,
    SCALARS,
    TARGETS,
    angle,
    check_third_derivatives,
    exact_trace,
    gradient_of,
    gradient_of_values,
    gradients_of,
    hutchinson_trace,
    input_gradient,
    loss_gradient,
    scalar,
    taylor_trace,
)
from gradexp.gradients.layers import NORMS, Layer, biases_of, effective_bias, find_layer, last_features, layer_bias

__all__ = [
    "INPUT",
    "NORMS",
    "SCALARS",
    "TARGETS",
    "FullGradient",
    "Layer",
    "angle",
    "attention_map",
    "biases_of",
    "captured",
    "channel_sum",
    "check_third_derivatives",
    "effective_bias",
    "evaluating",
    "exact_trace",
    "find_layer",
    "full_gradient",
    "gradient_of",
    "gradient_of_values",
    "gradients_of",
    "hutchinson_trace",
    "input_gradient",
    "last_features",
    "layer_bias",
    "loss_gradient",
    "precise",
    "scalar",
    "taylor_trace",
]
