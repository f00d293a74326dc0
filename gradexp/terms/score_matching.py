from torch import Tensor

from gradexp.gradients import TARGETS
from gradexp.terms.step import Step
from gradexp.terms.term import Term, choose


class ScoreMatching(Term):
    """Stabilised score-matching (Eq. 5.4): h + ½‖∇f‖² + stability h², h the trace of the Hessian (Eq. 5.9).

    h is a one-sample estimate with noise of standard deviation sigma; the expectation of its square is h² plus its
    variance. Sum over pixels, mean over the batch.
    """

    full_precision = True  # 2/sigma^2 times the difference of two logits: bf16 would leave only rounding

    def __init__(self, *, weight: float, stability: float, sigma: float, target: str) -> None:
        super().__init__(weight=weight)
        self.stability, self.sigma = stability, sigma
        self.target = self.gradient_target = choose("target", target, *TARGETS[:3])

    def forward(self, step: Step) -> Tensor:
        trace = step.student_hessian_trace(self.sigma, self.target)
        norm = step.student_input_gradient(self.target, "batch").square().flatten(1).sum(1)
        return (trace + norm / 2 + self.stability * trace.square()).mean()


class AntiScoreMatching(Term):
    """Maximises the trace of the Hessian up to a ceiling, image by image (§5.5): -min(h, ceiling); mean over the batch."""

    full_precision = True

    def __init__(self, *, weight: float, ceiling: float, sigma: float, target: str) -> None:
        super().__init__(weight=weight)
        self.ceiling, self.sigma = ceiling, sigma
        self.target = choose("target", target, *TARGETS[:3])

    def forward(self, step: Step) -> Tensor:
        return -step.student_hessian_trace(self.sigma, self.target).clamp(max=self.ceiling).mean()
