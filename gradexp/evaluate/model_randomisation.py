"""Model randomisation (Adebayo et al., 2018): does a map change when the layers behind it are made random? (§3.4.1)"""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.loader import mix
from gradexp.gradients import NORMS


def layers_from_output(model: nn.Module) -> list[list[str]]:
    """The modules with parameters, from the output to the input, a normalisation together with the layer before it.

    Raises UserError for a module whose parameters can't be drawn again.
    """
    groups: list[list[str]] = []
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        if not hasattr(module, "reset_parameters"):
            raise UserError(f"{type(module).__name__} ({name}) can't be initialised anew: it has no reset_parameters")
        if isinstance(module, NORMS) and groups:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups[::-1]


def randomise(model: nn.Module, groups: list[list[str]], seed: int) -> None:
    """Gives the modules of `groups` parameters as before training, in place; a normalisation becomes the identity.

    What is drawn for a group depends on the seed and its place alone.
    """
    for place, names in enumerate(groups):
        torch.manual_seed(mix(seed, place))
        for name in names:
            model.get_submodule(name).reset_parameters()  # type: ignore[operator]


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's, of the absolute values of two maps, image by image; 0 where one of them is constant. (B, ...) -> (B,)."""
    ranks = [torch.from_numpy(stats.rankdata(maps.abs().flatten(1).cpu().numpy(), axis=1)) for maps in (first, second)]
    centred = [values - values.mean(1, keepdim=True) for values in ranks]
    sizes = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return torch.where(sizes > 0, (centred[0] * centred[1]).sum(1) / sizes.clamp(min=1e-12), 0)
