"""Score a saliency method on a trained model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.loader import Batch, mix
from gradexp.engine.assemble import make_saliency
from gradexp.engine.build import build, score_node
from gradexp.engine.evaluation import Evaluation, PerImageTask
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Upstream
from gradexp.saliency import Saliency


class SaliencyTask(PerImageTask):
    """A task about the maps of one saliency method on one trained model."""

    def check_setup(self, look: Evaluation) -> None:
        super().check_setup(look)
        self.check_method(make_saliency(look.run.config, look.data, look.hardware))

    def check_method(self, method: Saliency) -> None:
        """Raises UserError for a saliency method that the task has no use for."""

    def parts(self, run: Run, upstream: Upstream) -> tuple[Evaluation, nn.Module, Saliency]:
        """Data and hardware, the upstream model, the saliency method."""
        look = Evaluation(run, upstream)
        return look, look.model("model"), make_saliency(run.config, look.data, look.hardware)


class SaliencyScore(SaliencyTask):
    """Mean and standard deviation over test images of what `evaluate` measures: `test/NAME` and `test/NAME/std`.

    A model that diverged gives a run that diverged.
    """

    def check_setup(self, look: Evaluation) -> None:
        super().check_setup(look)
        make_score(look.run.config)

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look, model, method = self.parts(run, upstream)
        if look.diverged:
            return look.result({})
        score, black = make_score(run.config), look.data.black.to(look.hardware.device)

        def scored(number: int, batch: Batch) -> tuple[int, dict[str, Tensor]]:
            seed = mix(run.config["seed"], number)
            torch.manual_seed(seed)  # of random maps and noise
            measured = score(model, method, batch, black=black, seed=seed)
            count = len(next(iter(measured.values()), ()))  # the digit flip leaves out all but one digit
            measured |= completeness(method, model, batch.images)
            return count, {name: values.cpu() for name, values in measured.items()}

        wanted = run.config["evaluate"]
        batches, count = look.first_images(wanted["images"], wanted["batch_size"])
        pieces = look.pieces.each("scores", batches, scored, count=count)
        images = sum(count for count, _ in pieces)
        metrics: dict[str, Any] = {}
        for name in dict.fromkeys(name for _, measured in pieces for name in measured):
            values = torch.cat([measured[name] for _, measured in pieces if name in measured]).double()
            metrics[f"test/{name}"], metrics[f"test/{name}/std"] = float(values.mean()), float(values.std())
        if not images:
            raise UserError("evaluate.images: none of the test images was of use; raise it")
        return Result(metrics, facts={"images": images, **look.facts()})


def make_score(config: Config) -> Any:
    """What `evaluate` names, called with a model, a saliency method and a batch."""
    return build(score_node(config["evaluate"]), where="evaluate")


def completeness(method: Saliency, model: nn.Module, images: Tensor, target: int | None = None) -> dict[str, Tensor]:
    """The relative error of completeness (Eq. 3.1), for methods that promise it; (B,). target: see Saliency."""
    error = getattr(method, "completeness_error", None)
    return {} if error is None else {"completeness_error": error(model, images, target)}
