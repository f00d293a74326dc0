"""Loss terms, one per file; docs/extend.md adds one."""

from gradexp.terms.activations import Activations
from gradexp.terms.attention import Attention
from gradexp.terms.attention_jacobian import AttentionJacobian
from gradexp.terms.bias_decay import BiasDecay
from gradexp.terms.bias_gradient import BiasGradient
from gradexp.terms.cross_entropy import CrossEntropy
from gradexp.terms.fooling import Fooling
from gradexp.terms.full_gradient import FullGradient
from gradexp.terms.gradient_norm import GradientNorm
from gradexp.terms.jacobian import Jacobian
from gradexp.terms.score_matching import AntiScoreMatching, ScoreMatching
from gradexp.terms.soft_targets import SoftTargets
from gradexp.terms.step import Step
from gradexp.terms.term import Term

__all__ = [
    "Activations",
    "AntiScoreMatching",
    "Attention",
    "AttentionJacobian",
    "BiasDecay",
    "BiasGradient",
    "CrossEntropy",
    "Fooling",
    "FullGradient",
    "GradientNorm",
    "Jacobian",
    "ScoreMatching",
    "SoftTargets",
    "Step",
    "Term",
]
