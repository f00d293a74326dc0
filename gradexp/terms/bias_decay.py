from torch import Tensor

from gradexp.terms.layer_bias import LayerBias
from gradexp.terms.step import Step


class BiasDecay(LayerBias):
    """Squared norm of one layer's bias (§4.4.2); without a factor ½, so it pulls twice as hard as torch's `weight_decay`."""

    def forward(self, step: Step) -> Tensor:
        return self.bias(step).square().sum()
