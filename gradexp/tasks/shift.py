"""§5.2 and §5.7.1: gradients that say nothing of the discriminative model."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradexp import gradients
from gradexp.engine.evaluation import Evaluation, EvaluationTask, as_bytes
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate.shift import Shifted, shift_effects, sine_effects


class Shift(EvaluationTask):
    """Adds a function to all logits of a trained model, and a sine to its loss; in float64, so that equal means equal.

    The added function's gradient is a picture: another image of the test set, around its mean.
    """

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look, task = Evaluation(run, upstream), run.config["task"]
        model = look.model("model").double()
        batch = next(look.batches(task["images"] + 1, task["images"] + 1))
        images, labels = batch.images[1:].double(), batch.labels[1:]
        picture = batch.images[0].double() - batch.images[0].double().mean()
        shifted = Shifted(model, picture, amplitude=task["amplitude"])
        metrics: dict[str, Any] = shift_effects(model, shifted, images, labels)
        sines = [sine_effects(model, images, labels, epsilon=task["epsilon"], frequency=m) for m in task["frequencies"]]
        size = images[0].numel()
        metrics |= {"sine/frequency": list(task["frequencies"]), "sine/loss_change": [loss for loss, _ in sines]}
        metrics |= {"sine/gradient_change": [gradient for _, gradient in sines]}
        metrics |= {"sine/gradient_bound": [task["epsilon"] * m * size for m in task["frequencies"]]}
        some, their = images[: task["shown"]], labels[: task["shown"]]
        maps = {"picture": picture[None]}
        for name, network in (("before", model), ("after", shifted)):
            maps[f"logit_{name}"] = gradients.input_gradient(network, some, their)
            maps[f"loss_{name}"] = gradients.loss_gradient(network, some, their, temperature=1.0)
        shown = {name: values.cpu().numpy().astype(np.float32) for name, values in maps.items()}
        return look.result(metrics, {"images": as_bytes(some), **shown})
