"""Model randomisation (Adebayo et al., 2018; §3.4.1): how far a map changes when layers of the model are randomised."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.loader import mix
from gradexp.gradients import NORMS, differentiable_anyway, precise
from gradexp.saliency.method import Saliency, predicted

UNTOUCHED = "untouched"


def randomisation_correlations(
    model: nn.Module, images: Tensor, method: Saliency, *, batch_size: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """Rank correlation of maps with those of a copy of `model` whose layers are randomised one after another from the output.

    images (N, C, H, W) -> {names of the layer randomised last: (N,)}, the first entry `untouched`. The output is where the
    last registered layer is. All maps are of the classes that `model` predicts; methods draw the same noise for every copy.
    Works under `no_grad` and `inference_mode`. Raises UserError for a module without `reset_parameters`, and for one whose
    weight is computed from other parameters.
    """
    groups, batches = layers_from_output(model), torch.split(images, batch_size)
    with differentiable_anyway(), torch.random.fork_rng():
        copied = copy.deepcopy(model).eval()
        classes = [predicted(copied, batch, None) for batch in batches]
        original = maps_of(copied, method, batches, classes, seed)
        correlations = {UNTOUCHED: torch.ones(len(images))}
        for count, names in enumerate(groups, 1):
            randomise(copied, groups[:count], seed)
            correlations[" and ".join(names)] = rank_correlation(original, maps_of(copied, method, batches, classes, seed))
    return correlations


def maps_of(model: nn.Module, method: Saliency, batches: Sequence[Tensor], classes: Sequence[Tensor], seed: int) -> Tensor:
    """Maps of batches of images for given classes, (N, 1, H, W) on the CPU. seed: of the noise that methods add."""
    maps = []
    for number, (images, labels) in enumerate(zip(batches, classes, strict=True)):
        torch.manual_seed(mix(seed, number))
        maps.append(method(model, images, labels).cpu())
    return torch.cat(maps)


def layers_from_output(model: nn.Module) -> list[list[str]]:
    """Names of the modules with parameters, the last registered first, a normalisation in one group with the layer before it.

    Raises UserError for a module without `reset_parameters`, and for one whose weight is computed from other parameters.
    """
    groups: list[list[str]] = []
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        if not hasattr(module, "reset_parameters"):
            raise UserError(f"{type(module).__name__} ({name}) can't be randomised: it has no reset_parameters")
        if "weight" in vars(module):  # not where parameters are
            raise UserError(
                f"{type(module).__name__} ({name}) can't be randomised: its weight is computed from other parameters; make it "
                f"one with prune.remove, remove_weight_norm or remove_spectral_norm of torch.nn.utils"
            )
        if isinstance(module, NORMS) and groups:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups[::-1]


def randomise(model: nn.Module, groups: list[list[str]], seed: int) -> None:
    """Resets the parameters of the modules of `groups`, in place; a normalisation is reset to the identity.

    The parameters drawn for a group depend only on the seed and its position in `groups`, not on their memory layout.
    """
    for position, names in enumerate(groups):
        torch.manual_seed(mix(seed, position))
        for name in names:
            module: Any = model.get_submodule(name)
            stored = [(parameter, parameter.data) for parameter in module.parameters()]
            for parameter, values in stored:
                parameter.data = values.contiguous()  # torch draws in the order of memory
            module.reset_parameters()
            for parameter, values in stored:
                parameter.data = values.copy_(parameter.data)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of absolute values, image by image; 0 where a map is constant: (B, ...) twice -> (B,)."""
    from scipy.stats import rankdata  # which takes a second to import

    ranks = [torch.from_numpy(rankdata(precise(maps).abs().flatten(1).cpu().numpy(), axis=1)) for maps in (first, second)]
    centred = [values - values.mean(1, keepdim=True) for values in ranks]
    norms = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return torch.where(norms > 0, (centred[0] * centred[1]).sum(1) / norms.clamp(min=1e-12), 0)
