"""Model randomisation (Adebayo et al., 2018; §3.4.1): how far a map changes when layers of the model are randomised."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.loader import mix
from gradexp.gradients import NORMS


def layers_from_output(model: nn.Module) -> list[list[str]]:
    """Names of the modules with parameters, from output to input, a normalisation in one group with the layer before it.

    Raises UserError for a module without `reset_parameters`.
    """
    groups: list[list[str]] = []
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        if not hasattr(module, "reset_parameters"):
            raise UserError(f"{type(module).__name__} ({name}) can't be randomised: it has no reset_parameters")
        if isinstance(module, NORMS) and groups:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups[::-1]


def randomise(model: nn.Module, groups: list[list[str]], seed: int) -> None:
    """Resets the parameters of the modules of `groups`, in place; a normalisation is reset to the identity.

    The parameters drawn for a group depend only on the seed and its position in `groups`.
    """
    for position, names in enumerate(groups):
        torch.manual_seed(mix(seed, position))
        for name in names:
            model.get_submodule(name).reset_parameters()  # type: ignore[operator]


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of absolute values, image by image; 0 where a map is constant: (B, ...) twice -> (B,)."""
    ranks = [torch.from_numpy(stats.rankdata(maps.abs().flatten(1).cpu().numpy(), axis=1)) for maps in (first, second)]
    centred = [values - values.mean(1, keepdim=True) for values in ranks]
    norms = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return torch.where(norms > 0, (centred[0] * centred[1]).sum(1) / norms.clamp(min=1e-12), 0)
