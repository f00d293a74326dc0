"""The objective of score-matching (Eq. 5.2) of a trained network in eval mode."""

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.data.loader import Batch
from gradexp.evaluate.spectrum import high_frequency


def objective_parts(model: nn.Module, batch: Batch, *, draws: int, sigma: float, seed: int) -> Tensor:
    """The parts of Eq. 5.2, image by image, for the label's logit f: (B, 4) in float64 on the CPU.

    Columns: the trace of the Hessian by exact products (Hutchinson, 1990), unbiased; the same by Eq. 5.9 with noise of standard
    deviation `sigma` along the same directions; ½‖∇f‖², summed over pixels; spectrum.high_frequency of ∇f, in percent. Traces
    are means over `draws` directions, drawn on the CPU from `seed`. `model` must be in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    images = batch.images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(images)
        gradient = gradients.gradient_of(logits, images, batch.labels, target="label", differentiable=True)
    logit = gradients.scalar(logits, batch.labels, "label").detach()
    traces = []
    for _ in range(draws):
        direction = torch.randn(images.shape, generator=generator).to(images)
        exact = gradients.hutchinson_trace(gradient, images, differentiable=False, direction=direction)
        with torch.no_grad():
            noisy = gradients.scalar(model(images + sigma * direction), batch.labels, "label")
        traces.append(torch.stack([exact.detach(), 2 / sigma**2 * (noisy - logit)]))
    gradient = gradient.detach()
    half = gradient.square().flatten(1).sum(1) / 2
    return torch.stack([*torch.stack(traces).mean(0), half, high_frequency(gradient)], dim=1).double().cpu()


def objective(parts: Tensor) -> dict[str, float]:
    """Means over images of the objective and its parts, from `objective_parts` (N, 4).

    `objective` = `trace` + `half_gradient_norm`; `taylor/objective` and `taylor/trace` are by Eq. 5.9. `NAME/std`: standard
    deviation over images; `NAME/error`: standard error of the mean, over the choice of images and directions.
    `gradient/high_frequency`: percent, over the images where it is not NaN.
    """
    exact, taylor, half, noisy = parts.unbind(1)
    each = {"objective": exact + half, "trace": exact, "half_gradient_norm": half}
    each |= {"taylor/objective": taylor + half, "taylor/trace": taylor}
    metrics = {"gradient/high_frequency": float(noisy.nanmean())}
    for name, values in each.items():
        std = float(values.std())
        metrics |= {name: float(values.mean()), f"{name}/std": std, f"{name}/error": std / len(values) ** 0.5}
    return metrics
