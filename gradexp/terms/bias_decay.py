from torch import Tensor

from gradexp.terms.layer_bias import LayerBias
from gradexp.terms.step import Step


class BiasDecay(LayerBias):
    """Weight decay on the bias of one layer (§4.4.2): its squared norm, summed over channels.

    Without the factor ½: the gradient is twice that of a torch optimizer's `weight_decay` of the same value.
    """

    def forward(self, step: Step) -> Tensor:
        return self.bias(step).square().sum()
