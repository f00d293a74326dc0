"""Every setting of the thesis's tables and figures at scale=paper, against tests/thesis_settings.yaml."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradexp.engine.compose import plan
from gradexp.engine.run import Config, Run, identity
from gradexp.report import specs

PAGE = yaml.safe_load(Path(__file__).with_name("thesis_settings.yaml").read_text(encoding="utf-8"))
ITEMS = PAGE["items"]
SOURCE = re.compile(
    r"L\d+|§[\d.]+|Eq\. [\d.]+|Proposition \d+|author's code|inferred|ours|the data set|torchvision|Hooker et al\."
)
# What follows from the rest, or names it.
LEFT_OUT = re.compile(r"(^|\.)(name|version|_partial_)$|^(data|model)\.(channels|classes)$|^method\.upstream$")
NAMED = ("data.name",)  # which data set it is, all the same


def settings(run: Run) -> Config:
    """{setting: value} of all that a run's id depends on; `^teacher` and the like: those of the runs that it stands on."""
    config = {key: value for key, value in identity(run.config).items() if key not in ("scale", "upstream")}
    flat = {key: value for key, value in _flat(config, "") if key in NAMED or not LEFT_OUT.search(key)}
    return flat | {f"^{name}": settings(below) for name, below in run.upstream.items()}


def _flat(node: Config, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# --- the page ---------------------------------------------------------------------------------------------


def entries(node: Any) -> Iterator[tuple[str, Any]]:
    """(setting, [value, source]) of a part's name, of {setting: [value, source]}, or of a list of these."""
    if isinstance(node, str):
        yield from entries(PAGE["parts"][node])
    elif isinstance(node, list):
        for one in node:
            yield from entries(one)
    else:
        yield from node.items()


def stated(*nodes: Any) -> Config:
    """{setting: value} of a cell or run. A setting that is stated again, later, replaces what a part has."""
    found: Config = {}
    below: dict[str, list[Any]] = {}
    for key, value in itertools.chain.from_iterable(map(entries, nodes)):
        if key.startswith("^"):
            below.setdefault(key, []).append(PAGE["runs"][value] if isinstance(value, str) else value)
        else:
            found[key] = value[0]
    return found | {name: stated(*parts) for name, parts in below.items()}


def cells(item: str) -> dict[tuple[str, str], tuple[list[int], list[str]]]:
    """{(row, column): (seeds, what to type for the first)} of a table or figure; a figure's row is its panel and series."""
    kind, number = item.split()
    spec = specs.load(kind, number)
    found = {}
    if kind == "table":
        for row, column, seeds in specs.cells(spec, "paper"):
            found[row["label"], column["label"]] = list(seeds), next(iter(seeds.values()))
    else:
        for series, point, seeds in specs.cells(spec, "paper"):
            row = " ".join([*([f"({series['panel']})"] if "panel" in series else []), series["label"]])
            found[row, f"{point['x']:g}" if point else ""] = list(seeds), next(iter(seeds.values()))
    return found


def expected(item: str, row: str, column: str) -> tuple[list[int], Config]:
    """The seeds and settings that the page states for a cell."""
    said = ITEMS[item]
    parts = [said.get("all", []), said.get("rows", {}).get(row, []), said.get("columns", {}).get(column, [])]
    return said["seeds"][0], stated(*parts)


def differences(found: Config, wanted: Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{setting: (here, on the page)} where they differ, in the runs below too."""
    wrong: dict[str, tuple[Any, Any]] = {}
    for key in sorted(found.keys() | wanted.keys()):
        here, there = found.get(key, "not set"), wanted.get(key, "not set")
        if isinstance(here, dict) and isinstance(there, dict):
            wrong |= differences(here, there, f"{prefix}{key} ")
        elif here != there:
            wrong[prefix + key] = (here, there)
    return wrong


# --- the tests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", ITEMS)
def test_every_cell_has_the_settings_of_the_page(item: str) -> None:
    for (row, column), (seeds, words) in cells(item).items():
        wanted_seeds, wanted = expected(item, row, column)
        wrong = differences(settings(plan(words)), wanted)
        assert not wrong, f"{item}, {row}, {column}: " + "; ".join(f"{key} {a}, page: {b}" for key, (a, b) in wrong.items())
        assert seeds == wanted_seeds, f"{item}, {row}, {column}"


def test_every_source_can_be_looked_up() -> None:
    """Nothing is stated without saying where it comes from, and every table and figure of the thesis is on the page."""
    nodes = [*PAGE["parts"].values(), *PAGE["runs"].values()]
    for said in ITEMS.values():
        nodes += [
            said.get("all", []),
            *said.get("rows", {}).values(),
            *said.get("columns", {}).values(),
            {"seeds": said["seeds"]},
        ]
    while nodes:
        for key, value in entries(nodes.pop()):
            if key.startswith("^"):
                nodes += [] if isinstance(value, str) else [value]
            else:
                assert len(value) == 2, key
                assert SOURCE.match(value[1]), f"{key}: {value[1]}"
    there = {f"{kind} {number}" for kind in ("table", "figure") for number in specs.numbers(kind)}
    assert {name for name in there if re.fullmatch(r"\w+ \d\.\d[ab]?(-size)?", name)} == ITEMS.keys()


# Each makes one cell another experiment: `item | row | column | override`. The first twelve once passed all tests of conf/.
MUTANTS = """
table 2.3 | CE + match {A + J} | 5 | optim.batch_size=16
table 2.3 | CE + match {A + J} | 5 | optim.passes=40
table 2.3 | CE + match {A + J} | 5 | optim.schedule.at=[0.3,0.6]
table 2.3 | CE + match {A + J} | 5 | method.terms.jacobian.level=3
table 2.3 | CE + match {A + J} | 5 | method.terms.jacobian.window=s/7
table 2.3 | CE + match {A + att.} | 5 | method.terms.attention.squared=true
table 2.3 | CE + match {A + J} | 5 | method.terms.jacobian.weight=0.1
table 2.1 | CE + match {A + J} | 1 | optim.batch_size=64
table 2.1 | CE + match {A + J} | 1 | optim.optimizer.lr=0.002
table 2.1 | CE + match {A + J} | 1 | optim.schedule.at=[0.5]
table 2.1 | CE + match {A + J} | 1 | method.terms.jacobian.weight=0.01
table 2.2 | λ = 0.1 | 0.1 | task.draws=2
table 2.1 | CE + match {A + J} | 1 | method.terms.activations.reduction=sum
table 2.1 | CE + match {A + J} | 1 | method.terms.jacobian.target=top
table 2.1 | CE + match {A + J} | 1 | method.terms.jacobian.student_bn=running
table 2.1 | Cross-Entropy (CE) | 5 | data.crop=0
table 2.1 | Cross-Entropy (CE) | 5 | data.flip=false
table 2.1 | Cross-Entropy (CE) | 5 | optim.passes=499
table 2.1 | CE + match {A + J} | 1 | +upstream.teacher.optim.passes=12
table 2.2 | λ = 10.0 | 0.4 | +upstream.model.method.terms.gradient_norm.target=logprob
table 2.2 | Dropout | 0 | +upstream.model.optim.optimizer.weight_decay=1e-4
table 2.3 | CE + match activations (A) | 10 | method.terms.activations.head=null
table 2.3 | CE + match {A + att.} | 10 | method.terms.attention.student_layers=[features.pool2]
table 2.5 | Accuracy (%) | Full | method.terms.jacobian.level=2
figure 3.2a | FullGrad |  | saliency.separate=true
figure 3.2a | FullGrad |  | saliency.psi=[abs,rescale_channels,upsample]
figure 3.2a | SmoothGrad |  | saliency.sigma=0.05
figure 3.2a | SmoothGrad |  | saliency.samples=50
figure 3.2a | Random |  | evaluate.fill=image_mean
figure 3.2a | Random |  | evaluate.order=most
figure 3.2a | Grad-CAM |  | saliency.smallest=14
figure 3.2b | FullGrad | 50 | data.subset_seed=null
figure 3.2b | FullGrad | 50 | optim.optimizer.lr=0.003
figure 3.2b | SmoothGrad-squared | 90 | data.removal.fraction=0.8
table 3.1 | Δ log-odds | FullGrad | evaluate.fraction=0.1
table 3.2 | RF = 0.5 | IntegratedGrad | saliency.steps=20
table 4.1 | Match {FG + Att.} | 5 | method.terms.attention.power=2
table 4.1 | Match {FG + Att.} | 5 | method.terms.attention.squared=false
table 4.1 | Match {FG + Att.} | 5 | method.terms.full_gradient.times_bias=true
table 4.1 | Match {FG + Att.} | 5 | method.terms.full_gradient.student_layers=[block 1,block 2,block 4]
table 4.1 | Match i-gradients (iG) | 5 | method.terms.jacobian.reduction=mean
table 4.1 | Match Activations | 10 | method.terms.activations.weight=1
table 4.1 | Match Activations | 10 | optim.schedule.at=[0.8]
table 4.2 | Cross-Entropy training | 50 | method.terms.cross_entropy.weight=1
table 4.3 | Bias-gradient (100) | 50 | method.terms.bias_gradient.bias=effective
table 4.3 | Bias-gradient (100) | 50 | method.terms.bias_gradient.noise=position
table 4.3 | Bias weight decay (0.1) | 50 | method.terms.bias_decay.weight=0.05
table 4.3 | Dropout (p = 0.5) | 50 | method.dropout.layer=last
figure 4.1b | VGG-4 |  | model=vgg9
table 5.1 | + Score-Matching | GAN-test (%) | task.samples=512
table 5.1 | + Score-Matching | GAN-test (%) | task.sampling.steps=1000
table 5.1 | + Score-Matching | GAN-test (%) | task.sampling.pull=0
table 5.1 | + Score-Matching | GAN-test (%) | +upstream.model.method.terms.score_matching.sigma=0.001
table 5.1 | + Score-Matching | GAN-test (%) | +upstream.model.method.terms.score_matching.student_bn=running
table 5.1 | + Anti-Score-Matching | GAN-test (%) | +upstream.model.method.terms.anti_score_matching.ceiling=10000
table 5.1 | + Gradient Norm-regularization | GAN-test (%) | +upstream.model.method.terms.gradient_norm.weight=0.001
table 5.1 | Baseline ResNet | GAN-test (%) | +upstream.judge.model.head=average
table 5.1 | Baseline ResNet | GAN-test (%) | +upstream.model.optim.schedule.at=[0.5]
table 5.2 | λ = 1e-5 | μ = 1e-3 | +upstream.model.optim.passes=100
figure 5.3 | (a) Baseline |  | task.replacement=0.5
figure 5.5 | VGG-11 |  | method.terms.fooling.weight=10000
figure 5.8 | Baseline |  | task.denoising.rate=0.1
"""


@pytest.mark.parametrize("mutant", MUTANTS.strip().splitlines())
def test_another_setting_is_noticed(mutant: str) -> None:
    item, row, column, override = map(str.strip, mutant.split("|"))
    _, words = cells(item)[row, column]
    _, wanted = expected(item, row, column)
    wrong = differences(settings(plan([*words, override])), wanted)
    setting = override.lstrip("+").partition("=")[0].removeprefix("upstream.")
    assert any(key.replace("^", "").replace(" ", ".").startswith(setting) for key in wrong), wrong
