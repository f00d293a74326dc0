from torch import Tensor

from gradexp.terms.layer_bias import LayerBias
from gradexp.terms.step import Step


class BiasDecay(LayerBias):
    """Weight decay on the bias of one layer (§4.4.2): its squared norm, so that a weight pulls twice as hard as torch's."""

    def forward(self, step: Step) -> Tensor:
        return self.bias(step).square().sum()
