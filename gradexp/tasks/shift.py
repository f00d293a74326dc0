"""§5.2 and §5.7.1: changes of a network's input-gradients that its classification does not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradexp import gradients
from gradexp.base.ranges import Count, Positive
from gradexp.engine.evaluation import Evaluation, EvaluationTask, as_bytes
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate.shift import Shifted, shift_effects, sine_effects


@dataclass(kw_only=True)
class Shift(EvaluationTask):
    """Adds a function to all logits of a trained model (§5.2), and a sine to its loss (§5.7.1); in float64, eval mode.

    The gradient of the added function is a picture: a test image minus its mean, times `amplitude`.
    Metrics: `shift/...` (evaluate.shift.shift_effects); `sine/...`, curves over `sine/frequency`, with the bound of §5.7.1.
    Arrays: `shown` images, the picture and gradients before and after. epsilon, frequencies: of the sine.
    """

    images: Count
    amplitude: float
    epsilon: Positive
    frequencies: Sequence[Positive]
    shown: Count

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation = Evaluation(run, upstream)
        model = evaluation.model("model").double()
        batch = next(evaluation.batches(self.images + 1, self.images + 1))
        images, labels = batch.images[1:].double(), batch.labels[1:]
        picture = batch.images[0].double() - batch.images[0].double().mean()
        shifted = Shifted(model, picture, amplitude=self.amplitude)
        metrics: dict[str, Any] = shift_effects(model, shifted, images, labels)
        sines = [sine_effects(model, images, labels, epsilon=self.epsilon, frequency=m) for m in self.frequencies]
        size = images[0].numel()
        metrics |= {"sine/frequency": list(self.frequencies), "sine/loss_change": [loss for loss, _ in sines]}
        metrics |= {"sine/gradient_change": [gradient for _, gradient in sines]}
        metrics |= {"sine/gradient_bound": [self.epsilon * m * size for m in self.frequencies]}
        images, labels = images[: self.shown], labels[: self.shown]
        maps = {"picture": picture[None]}
        for name, network in (("before", model), ("after", shifted)):
            maps[f"logit_{name}"] = gradients.input_gradient(network, images, labels)
            maps[f"loss_{name}"] = gradients.loss_gradient(network, images, labels, temperature=1.0)
        arrays = {name: values.cpu().numpy().astype(np.float32) for name, values in maps.items()}
        return evaluation.result(metrics, {"images": as_bytes(images), **arrays})
