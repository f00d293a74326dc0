"""The numbers in what conf/claims.yaml says of each chapter's evidence are those of the committed records."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import yaml

from gradexp.engine.compose import plan
from gradexp.engine.record import value_of
from gradexp.engine.run import ROOT
from gradexp.report.claims import read
from gradexp.report.comparisons import CellName, Grid

Stated = Iterator[tuple[str, list[float]]]  # a part of a sentence, and its numbers
FILE = ROOT / "conf" / "claims.yaml"
TEST = "test accuracy (%)"
A, A_J, CE_A, CE_A_J = "Match activations (A) only", "Match {A + J}", "CE + match activations (A)", "CE + match {A + J}"
ACTIVATIONS, GRADIENTS, FULL = "Match Activations", "Match i-gradients (iG)", "Match Fullgrad (FG)"
NONE = "No regularisation"
PLAIN, ANTI, NORM, SCORE = "Baseline ResNet", "+ Anti-Score-Matching", "+ Gradient Norm-regularization", "+ Score-Matching"


@cache
def grid(item: str) -> Grid:
    return Grid(item, None, "cpu", plan)


def ours(item: str, row: str, column: str, metric: str | None = None) -> float:
    """The mean over seeds of a cell."""
    return float(grid(item).values(CellName(row, column, metric))["value"].mean())


def thesis(item: str, row: str, column: str) -> float:
    return grid(item).thesis(CellName(row, column))


def gains(item: str, row: str, over: str, *columns: str, cell: Callable[..., float] = ours) -> list[float]:
    """By how much one row is above another, in each column."""
    return [cell(item, row, column) - cell(item, over, column) for column in columns]


def difference(claim: str, label: str) -> Any:
    """The comparison of a claim whose label begins so."""
    comparisons = read(FILE, "cpu", plan).comparisons
    there = (comparisons["id"] == claim) & comparisons["in_scale"]
    (found,) = comparisons[there & comparisons["label"].str.startswith(label)].itertuples()
    return found


def chapter_2() -> Stated:
    table, readings, losses = "table 2.1", "table 2.1-readings", "table 2.3-readings"
    seen = ("1", "5", "10")
    yield "by {:.1f}, {:.1f} and {:.1f} points with labels", gains(table, CE_A_J, CE_A, *seen)
    yield "({:.1f}, {:.1f} and {:.1f} in the thesis)", gains(table, CE_A_J, CE_A, *seen, cell=thesis)
    for cell, text in ((ours, "{:.1f} to {:.1f} points lower at 10"), (thesis, "({:.1f} to {:.1f} in the thesis)")):
        pairs = ((CE_A, A), (CE_A_J, A_J))
        yield text, sorted(gain for pair in pairs for gain in gains(table, *pair, "10", cell=cell))
    squared, warm, hot = "logits, squared error", "soft targets, T = 1", "soft targets, T = 4"
    labels = "labels, and {}".format
    four = [ours(readings, row, TEST) for row in (labels(hot), labels(squared), hot, squared)]
    yield "as good with labels ({:.1f} % against {:.1f}) and better without ({:.1f} against {:.1f})", four
    ahead = [gains(readings, *rows, TEST)[0] for rows in ((labels(squared), labels(warm)), (squared, warm))]
    yield "ahead, by {:.1f} and {:.1f} points", ahead
    reduction = "Gradient loss reduction (%)"
    yield "attention maps, by {:.0f} %", [ours(losses, "attention maps", reduction)]
    below = difference("2.3-output", "the teacher's largest logit")
    yield "(by {:.1f} %; 95 % interval {:.1f} to {:+.1f})", [2 - below.mean, 2 - below.high, 2 - below.low]
    means = ("a mean, λ = 1", "a mean, λ = 10")
    weighed = [(cell, row) for cell in (ours, thesis) for row in means] + [(ours, "a sum, λ = 1")]
    rows = ((ours, "λ = 0.01"), (thesis, "λ = 10.0"))
    kept = [100 * cell("table 2.2", row, "0.4") / cell("table 2.2", row, "0") for cell, row in rows]
    yield "it is {:.0f} % with λ = 0.01 ({:.0f} % with λ = 10 in the thesis)", kept
    left = [100 * cell("table 2.2-readings", row, "0.4") / cell("table 2.2-readings", row, "0") for cell, row in weighed]
    yield "leave {:.0f} and {:.0f} %, nearer to the thesis's {:.0f} and {:.0f} % than the sum's {:.0f} % with λ = 1", left


def chapter_3() -> Stated:
    yield "a rank correlation of {:.2f}", [ours("figure 3-randomisation", "FullGrad", "", "test/correlation")]


def chapter_4() -> Stated:
    table, readings, angle = "table 4.1", "table 4.1-readings", "angle on the training set (degrees)"
    mean, unsquared, summed = "iG, squared, mean over pixels", "iG, unsquared", "iG, squared, sum over pixels"
    yield "by {:.1f} points if the squared distance is averaged over pixels", gains(readings, mean, "nothing", TEST)
    yield "by {:+.1f} if it is not squared", gains(readings, unsquared, "nothing", TEST)
    yield "by {:+.1f} if it is summed", gains(readings, summed, "nothing", TEST)
    yield "by {:+.1f} in the thesis", gains(table, GRADIENTS, ACTIVATIONS, "5", cell=thesis)
    angles = [ours(readings, row, angle) for row in (mean, unsquared, summed, "nothing")]
    yield "stay {:.0f}, {:.0f} and {:.0f} degrees apart ({:.0f} without matching", angles
    author = f"{summed}; author's initialisation"
    yield "(summed, {:.1f} % and {:.0f} degrees)", [ours(readings, author, TEST), ours(readings, author, angle)]
    above = [ours(*cell) - thesis(*cell) for cell in ((table, FULL, "5"), ("table 4.2", FULL, "50"))]
    yield "are {:.0f} points above the thesis on CIFAR-100 and {:.0f} on CIFAR-10", above
    both = [gains(table, FULL, GRADIENTS, "5", cell=cell)[0] for cell in (ours, thesis)]
    yield "only {:.1f} above input-gradients alone ({:.1f} in the thesis)", both
    sizes = [gains("table 4.1-size", "VGG-11", row, "5 / class")[0] for row in ("VGG-4", "VGG-6")]
    yield "VGG-6 are {:.1f} and {:.1f} points below VGG-11", sizes
    attention = [gains(table, "Match Attention", ACTIVATIONS, "5", cell=cell)[0] for cell in (ours, thesis)]
    yield "add {:.1f} points to activations ({:.1f} in the thesis)", attention
    all_three = [gains(table, "Match {FG + Att.}", FULL, "5", cell=cell)[0] for cell in (ours, thesis)]
    yield "{:.1f} points above full-gradients alone ({:.1f} in the thesis)", all_three
    biases = [gains(table, "Match {FG + Att.}", "Match {iG + Att.}", "5", cell=cell)[0] for cell in (ours, thesis)]
    yield "add {:.1f} points beside input-gradients and attention ({:.1f} in the thesis)", biases
    squares = [f"{what}squares, before the ReLU, squared" for what in ("FG, and ", "iG, and ")]
    yield "({:.1f} % against {:.1f})", [ours("table 4.1-readings-attention", row, TEST) for row in squares]
    none, dropout, decay, penalty = NONE, "Dropout (p = 0.5)", "Bias weight decay (0.1)", "Bias-gradient (100)"
    regularised = [difference("4.3-late", f"{row} > {none}, 50") for row in (dropout, decay, penalty)]
    yield "dropout adds {:.1f} points and weight decay of biases {:.1f}", [each.mean for each in regularised[:2]]
    yield "({:.1f} and {:.1f}), but two seeds", [each.thesis for each in regularised[:2]]
    gain = round(regularised[2].mean, 1) + 0.0  # no -0.0
    yield "the thesis's best ({:.1f}), adds {:.1f} with its constant", [regularised[2].thesis, gain]
    averaged = "effective bias, one draw per position, mean"
    yield "gives {:.1f} %, against {:.1f} without", [ours("table 4.3-readings", row, "50") for row in (averaged, "none")]


def chapter_5() -> Stated:
    def cost(figure: str) -> float:
        """What score-matching costs of the models' accuracy on all test images."""
        (plain,), (matched,) = (
            Grid(figure, "a", "cpu", plan).runs(CellName(row, "")).values() for row in ("Baseline", "Score-matching")
        )
        records = [run.upstream["model"].record() for run in (plain, matched)]
        before, after = (value_of(record, "test/accuracy") for record in records if record)
        return before - after

    printed = -gains("table 5.1", SCORE, PLAIN, TEST, cell=thesis)[0]
    yield "costs {:.0f} points of accuracy on CIFAR-100 ({:.1f} in the thesis)", [cost("figure 5.3"), printed]
    yield "and {:.0f} on CIFAR-10", [cost("figure 5.6")]
    explained = [difference("5.3b-best", f"{model} > Baseline, 0.1").mean for model in ("Score-matching", "Gradient-norm")]
    yield "({:.1f} and {:.1f} points)", explained
    recognised = [cell("table 5.1", row, "GAN-test (%)") for cell in (ours, thesis) for row in (PLAIN, NORM, SCORE, ANTI)]
    yield "{:.0f} % of the plain model's samples, {:.0f} % of the gradient-norm model's, {:.0f} %", recognised[:3]
    yield "{:.0f} % of the anti-score-matched one's ({:.0f}, {:.0f}, {:.0f} and {:.0f} % in the thesis)", recognised[3:]
    fooled = partial(ours, "figure 5.5", "VGG-11", "")
    energy = [fooled(f"energy/{name}") for name in ("logit/after", "uniform")]
    yield "{:.0f} % of the logit-gradients' energy is moved into a mask of {:.0f} % of the image", energy
    yield "at a cost of {:.1f} points", [fooled("test/accuracy/before") - fooled("test/accuracy")]
    yield "from {:.0f} to {:.0f} %", [fooled("energy/loss/before"), fooled("energy/loss/after")]
    trained = partial(ours, "figure 5.5", "VGG-11, loss-gradients", "")
    lost = trained("test/accuracy/before") - trained("test/accuracy")
    yield "loss-gradients reach {:.0f} %, and accuracy falls by {:.0f} points", [trained("energy/loss/after"), lost]


@pytest.mark.parametrize("chapter", [chapter_2, chapter_3, chapter_4, chapter_5])
def test_numbers_are_those_of_the_records(chapter: Callable[[], Stated]) -> None:
    text = " ".join(yaml.safe_load(FILE.read_text(encoding="utf-8"))["findings"][chapter.__name__[-1]]["cpu"])
    absent = [stated for part, numbers in chapter() if (stated := part.format(*(n + 1e-9 for n in numbers))) not in text]
    assert not absent
