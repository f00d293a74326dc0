from typing import Any

from torch import Tensor, nn

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import NonNegative, Positive, require
from gradexp.gradients import SCALARS
from gradexp.terms.step import Step
from gradexp.terms.term import Term

FLAT = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh)
SMOOTH = "take a softplus network, model=resnet18 or model=vgg11_softplus"
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class HessianTrace(Term):
    """Base of the terms on h, the trace of the Hessian of a logit (§5.3.2), estimated from one sample.

    estimator: `taylor` (Eq. 5.9, noise of standard deviation sigma) or `hutchinson` (exact products with the Hessian).
    target: the output f, see gradients.scalar. student_bn: `batch` statistics, where the noisy images have their own
    (gradients.taylor_trace), or `running` statistics, those of the density that is evaluated after training.
    Raises UserError for a sigma that is not positive; before training, for a network with modules such as nn.ReLU and, with
    `taylor` and batch statistics, for one with dropout; with `hutchinson`, for a first batch whose Hessian is exactly 0.
    """

    full_precision = True  # Eq. 5.9 multiplies the difference of two logits by 2/sigma²: in bf16 only rounding would be left

    def __init__(self, *, weight: NonNegative, estimator: str, sigma: Positive, target: str, student_bn: str = "batch") -> None:
        super().__init__(weight=weight)
        require(Positive, sigma=sigma)
        self.estimator, self.sigma = choose("estimator", estimator, "taylor", "hutchinson"), sigma
        self.target = choose("target", target, *SCALARS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")
        self.gradient_target = target if estimator == "hutchinson" else None

    def check(self, student: nn.Module) -> None:
        if any(isinstance(module, FLAT) for module in student.modules()):
            raise UserError(f"{type(self).__name__}: the Hessian of a ReLU network is zero almost everywhere; {SMOOTH}")
        if self.estimator == "hutchinson" or self.student_bn == "running":  # one forward pass, or eval mode
            return
        if any(isinstance(module, DROPOUT) and module.p > 0 for module in student.modules()):
            raise UserError(
                f"{type(self).__name__}: the taylor estimator takes the difference of two passes, in which dropout draws two "
                "masks; set model.dropout=null, or take the hutchinson estimator or student_bn=running"
            )

    def trace(self, step: Step) -> Tensor:
        """The estimate of h, differentiable: (B,). Its mean and mean square are recorded as curves."""
        trace = step.student_hessian_trace(self.estimator, self.sigma, self.target, self.student_bn)
        constant = trace.detach()
        # Looked at once, as a device waits for it. Where the last layer begins at zero, so does the gradient.
        is_flat = self.estimator == "hutchinson" and not self.observed and not constant.any()
        if is_flat and step.student_input_gradient(self.target, self.student_bn).any():
            raise UserError(f"{type(self).__name__}: the Hessian is exactly zero, as that of functional.relu is; {SMOOTH}")
        self.observed = {"hessian_trace": constant.mean(), "hessian_trace/squared": constant.square().mean()}
        return trace


class ScoreMatching(HessianTrace):
    """Stabilised score-matching (Eq. 5.4): h + ½‖∇f‖² + stability · h². Sum over pixels; mean over the batch.

    The expected square of a one-sample estimate is h² plus the estimate's variance, for `taylor` about 4‖∇f‖²/sigma² +
    2‖∇²f‖² (§5.8). With the thesis's constants (stability 1e-4, sigma 0.01) the stability term thus adds 4‖∇f‖².
    """

    def __init__(self, *, stability: float, **options: Any) -> None:
        super().__init__(**options)
        self.stability, self.gradient_target = stability, self.target

    def forward(self, step: Step) -> Tensor:
        trace = self.trace(step)
        norm = step.student_input_gradient(self.target, self.student_bn).square().flatten(1).sum(1)
        self.observed["gradient_norm/squared"] = norm.detach().mean()
        return (trace + norm / 2 + self.stability * trace.square()).mean()


class AntiScoreMatching(HessianTrace):
    """Negative trace of the Hessian up to a ceiling, -min(h, ceiling), clamped image by image (§5.5); mean over the batch.

    Noise in h lowers the mean of min(h, ceiling). For `taylor` its standard deviation is about 2‖∇f‖/sigma (§5.8), with sigma
    0.01 and a gradient norm of 20 four times a ceiling of 1000, so the term also penalises the gradient norm. The noise
    of `hutchinson` does not depend on the gradient.
    """

    def __init__(self, *, ceiling: float, **options: Any) -> None:
        super().__init__(**options)
        self.ceiling = ceiling

    def forward(self, step: Step) -> Tensor:
        trace = self.trace(step)
        self.observed["hessian_trace/at_ceiling"] = (trace.detach() >= self.ceiling).to(trace).mean()
        return -trace.clamp(max=self.ceiling).mean()
