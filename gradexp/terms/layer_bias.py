from torch import Tensor, nn

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import NonNegative
from gradexp.terms.step import Step
from gradexp.terms.term import Term


class LayerBias(Term):
    """A term that reads the bias of one layer of the student.

    layer: by its name or its place (gradients.find_layer). bias: `explicit`, the layer's own parameter (beta, where it
    is a normalisation), or `effective`, with all that is implicit (gradients.effective_bias). student_bn: `batch` or
    `running` statistics.
    """

    def __init__(self, *, weight: NonNegative, layer: str, bias: str, student_bn: str) -> None:
        super().__init__(weight=weight)
        self.student_layers = (layer,)
        self.reads_bias = choose("bias", bias, "explicit", "effective") == "effective"
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    def place(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        super().place(student, teacher, images)
        if not self.reads_bias and getattr(student.get_submodule(self.layer), "bias", None) is None:
            raise UserError(f"layer {self.layer} has no bias; choose a layer that has one")

    @property
    def layer(self) -> str:
        return self.student_layers[0]

    def bias(self, step: Step) -> Tensor:
        """(c,), differentiable."""
        if self.reads_bias:
            return step.student_bias(self.layer, self.student_bn)
        return step.student.get_parameter(f"{self.layer}.bias")
