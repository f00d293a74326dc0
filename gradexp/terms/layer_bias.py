from torch import Tensor, nn

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import NonNegative
from gradexp.gradients.capture import module_of
from gradexp.terms.step import Step
from gradexp.terms.term import Term


class LayerBias(Term):
    """A term that reads the bias of one layer of the student.

    layer: a module's name or a rule such as `last block` (gradients.find_layer). bias: `explicit`, the layer's own parameter
    (beta of a normalisation), or `effective`, explicit and implicit biases together (gradients.effective_bias, §3.4).
    student_bn: `batch` or `running` statistics, for gradients and for effective biases.
    Raises UserError, before training, for a layer without such a bias.
    """

    def __init__(self, *, weight: NonNegative, layer: str, bias: str, student_bn: str) -> None:
        super().__init__(weight=weight)
        self.student_layers = (layer,)
        self.reads_bias = choose("bias", bias, "explicit", "effective") == "effective"
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        super().resolve_layers(student, teacher, images)
        if not self.reads_bias and getattr(student.get_submodule(module_of(self.layer)), "bias", None) is None:
            raise UserError(f"layer {self.layer} has no bias; choose a layer that has one")

    @property
    def layer(self) -> str:
        return self.student_layers[0]

    def bias(self, step: Step) -> Tensor:
        """The layer's bias, one value per channel, differentiable: (c,)."""
        if self.reads_bias:
            return step.student_bias(self.layer, self.student_bn)
        return step.student.get_parameter(f"{module_of(self.layer)}.bias")
