from typing import Any

from torch import Tensor, nn

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import NonNegative, Positive
from gradexp.gradients import SCALARS
from gradexp.terms.step import Step
from gradexp.terms.term import Term

FLAT = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh)


class HessianTrace(Term):
    """What terms on the trace h of the Hessian share.

    estimator: `taylor` (Eq. 5.9, noise of standard deviation sigma) or `hutchinson` (exact products), one sample each.
    target: of which output, see gradexp.gradients.scalar. student_bn: `batch` statistics, and the estimate then holds what
    noise does to them (gradients.taylor_trace), or `running`, those of the density that is looked at after training.
    """

    full_precision = True  # 2/sigma^2 times the difference of two logits: bf16 would leave only rounding

    def __init__(self, *, weight: NonNegative, estimator: str, sigma: Positive, target: str, student_bn: str = "batch") -> None:
        super().__init__(weight=weight)
        if sigma <= 0:
            raise UserError(f"sigma={sigma}: the noise of a trace estimate has a positive standard deviation, such as 0.01")
        self.estimator, self.sigma = choose("estimator", estimator, "taylor", "hutchinson"), sigma
        self.target = choose("target", target, *SCALARS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")
        self.gradient_target = target if estimator == "hutchinson" else None

    def check(self, student: nn.Module) -> None:
        if any(isinstance(module, FLAT) for module in student.modules()):
            raise UserError(
                f"{type(self).__name__}: the Hessian of a ReLU network is zero almost everywhere; take a softplus network, "
                "model=resnet18 or model=vgg11_softplus"
            )

    def trace(self, step: Step) -> Tensor:
        """h (B,). Its mean and mean square become curves: what the regulariser does to it, whatever its weight."""
        trace = step.student_hessian_trace(self.estimator, self.sigma, self.target, self.student_bn)
        known = trace.detach()
        self.seen = {"hessian_trace": known.mean(), "hessian_trace/squared": known.square().mean()}
        return trace


class ScoreMatching(HessianTrace):
    """Stabilised score-matching (Eq. 5.4): h + ½‖∇f‖² + stability h². Sum over pixels, mean over the batch.

    The square of a one-sample estimate has expectation h² + its variance, by §5.8 about 4‖∇f‖²/sigma² + 2‖∇²f‖² for
    `taylor`: with the thesis's constants (stability 1e-4, sigma .01) the stability term holds 4‖∇f‖² besides.
    """

    def __init__(self, *, stability: float, target: str, **options: Any) -> None:
        super().__init__(target=target, **options)
        self.stability, self.gradient_target = stability, target

    def forward(self, step: Step) -> Tensor:
        trace = self.trace(step)
        norm = step.student_input_gradient(self.target, self.student_bn).square().flatten(1).sum(1)
        self.seen["gradient_norm/squared"] = norm.detach().mean()
        return (trace + norm / 2 + self.stability * trace.square()).mean()


class AntiScoreMatching(HessianTrace):
    """Maximises the trace of the Hessian up to a ceiling, image by image (§5.5): -min(h, ceiling); mean over the batch.

    The mean of a clamped estimate falls with the estimate's noise, which for `taylor` has a standard deviation of
    2‖∇f‖/sigma (§5.8): with sigma .01 and a gradient norm of 20 it is four times a ceiling of 1000, so that the term
    keeps the gradient norm down. With `hutchinson` it does not.
    """

    def __init__(self, *, ceiling: float, **options: Any) -> None:
        super().__init__(**options)
        self.ceiling = ceiling

    def forward(self, step: Step) -> Tensor:
        trace = self.trace(step)
        self.seen["hessian_trace/at_ceiling"] = (trace.detach() >= self.ceiling).to(trace).mean()
        return -trace.clamp(max=self.ceiling).mean()
