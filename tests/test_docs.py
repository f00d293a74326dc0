"""What the pages say is what happens."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from commands import run_python
from test_findings import difference

from gradexp.engine.compose import plan
from gradexp.engine.run import ROOT
from gradexp.report.comparisons import CellName, Grid


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(the file name in the paragraph above, content) of each fenced block of a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"(?:^`([^`\n]+)`\n\n)?^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    return [line for _, block in blocks(page, "console") for line in block.splitlines() if line.startswith("python ")]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of docs/extend.md."""
    folder = tmp_path_factory.mktemp("extended")
    for language in ("python", "yaml"):
        for name, content in blocks("docs/extend.md", language):
            assert name, f"a {language} block of docs/extend.md names no file"
            file = folder / name
            assert not file.exists(), f"{name} is there twice"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
    return folder


def typed_with_plugin(extended: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with the package, in folders of its own."""
    words = shlex.split(command)
    places = [f"paths.results={extended / 'results'}", f"paths.outputs={extended / 'outputs'}"]
    tiny = ["scale.width=0.04", "trainer.threads=1", "logger=none"]
    if "run.py" in words:
        below = "teacher" if "jacobian_distill" in command else "model"
        if "jacobian_distill" in command:
            tiny += ["optim.passes=1"]
        if "experiment=teacher" in command:
            tiny += ["optim.passes=1"]
        else:
            tiny += [f"+upstream.{below}.optim.passes=1", f"+upstream.{below}.scale.width=0.03"]
        words += [*tiny, *places]
    else:
        words += ["--set", *places, *tiny[1:]]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{extended}", "GRADEXP_PLUGINS": "mine"}
    return run_python(*words[1:], env=environment)


EXTEND = commands("docs/extend.md")


@pytest.mark.parametrize("command", [command for command in EXTEND if "run.py" in command])
def test_extend(extended: Path, command: str) -> None:
    done = typed_with_plugin(extended, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished: " in done.stdout


def test_own_tables_figures_and_claims_have_a_folder_of_their_own(extended: Path) -> None:
    assert [command.split()[1] for command in EXTEND if "make_" in command] == [
        f"scripts/make_{what}.py" for what in ("table", "figure", "claims")
    ]
    own = extended / "results" / "own"
    table, figure, claims = (command for command in EXTEND if "make_" in command)
    for command in (f"{table} --render-only", claims):
        done = typed_with_plugin(extended, command)
        assert done.returncode == 0, done.stdout + done.stderr
    rendered = {str(file.relative_to(own)) for file in own.rglob("*") if file.is_file()}
    assert {"tables/quick/table_calibration.md", "claims/quick.md"} <= rendered
    done = typed_with_plugin(extended, f"{figure} --render-only")
    assert "method=ce_a_j" in done.stdout + done.stderr  # the runs that it needs
    assert "calibrated" in (own / "claims" / "quick.md").read_text(encoding="utf-8")
    thesis = (extended / "results" / "claims" / "quick.md").read_text(encoding="utf-8")
    assert "calibrated" not in thesis


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("method.terms.cosine.power=-1", "method.terms.cosine.power=-1: it should be greater than 0"),
        ("method.terms.cosine.powr=1", "did you mean power?"),
    ],
)
def test_settings_of_ones_own_are_checked_by_their_annotations(extended: Path, command: str, message: str) -> None:
    done = typed_with_plugin(extended, f"python run.py experiment=jacobian_distill method=ce_cosine scale=quick {command}")
    assert done.returncode == 1
    assert message in done.stderr


def test_help_shows_an_experiment_of_ones_own(extended: Path) -> None:
    done = typed_with_plugin(extended, "python run.py experiment=calibration --help")
    assert "is better calibrated" in done.stdout


def test_a_config_of_ones_own_does_not_hide_behind_one_of_ours(extended: Path, tmp_path: Path) -> None:
    """Hydra would take ours. A file without a comment at its top is listed, too."""
    experiments = tmp_path / "hers" / "conf" / "experiment"
    experiments.mkdir(parents=True)
    (experiments / "plain.yaml").write_text("# @package _global_\nname: plain\n")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "GRADEXP_PLUGINS": "hers"}
    done = run_python("run.py", "--help", env=environment)
    assert "  plain\n" in re.sub(" +\n", "\n", done.stdout)
    (experiments / "teacher.yaml").write_text("# @package _global_\nname: teacher\n")
    done = run_python("run.py", "--help", env=environment)
    assert "teacher.yaml has the name of a file of gradexp's conf/" in done.stderr


def test_what_no_plugin_names_is_refused(extended: Path) -> None:
    """GRADEXP_PLUGINS is what allows a config to run the code of a package, not that Python finds it."""
    words = (
        "experiment=jacobian_distill method=ce scale=quick +method.terms.x={_target_: mine.cosine.Cosine, weight: 1, power: 1}"
    )
    command = ["run.py", *words.split(maxsplit=3)[:3], words.split(maxsplit=3)[3]]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{extended}"}
    environment.pop("GRADEXP_PLUGINS", None)
    done = run_python(*command, env=environment)
    assert "mine.cosine.Cosine is refused" in done.stderr
    assert "GRADEXP_PLUGINS" in done.stderr
    environment["GRADEXP_PLUGINS"] = "yours"
    done = run_python(*command, env=environment)
    assert "GRADEXP_PLUGINS=yours: there is no package yours" in done.stderr


def test_readme_names_only_make_targets_that_exist() -> None:
    names = set(re.findall(r"^\s*make ([a-z0-9.-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"quickstart", "table-2.1"} <= names
    for name in names:
        done = subprocess.run(["make", "-n", name], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"make {name}: {done.stderr}"


def test_readme_commands_compose() -> None:
    from gradexp.engine.command_line import check_overrides

    typed = [line for line in commands("README.md") if line.startswith("python run.py")]
    assert len(typed) >= 4
    for line in typed:
        check_overrides(shlex.split(line.partition("#")[0])[2:])


SOFT = ("soft targets, T = 1", "soft targets, T = 4")


def mean(item: str, row: str, column: str, metric: str | None = None) -> float:
    """The mean over seeds of a cell of the committed records at scale=cpu."""
    return float(Grid(item, None, "cpu", plan).values(CellName(row, column, metric))["value"].mean())


def test_headline_numbers_of_the_readme_are_those_of_the_records() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {"ce": "Cross-Entropy (CE)", "a": "CE + match activations (A)", "a_j": "CE + match {A + J}"}
    shown = [f"{mean('table 2.1', row, '10'):.1f}" for row in rows.values()]
    assert shown == re.findall(r"\| \**(\d+\.\d)\** \| \**\d+\.\d\** \|$", text, re.MULTILINE)

    def here(of: str) -> str:
        (line,) = re.findall(rf"^\| {of}.*$", text, re.MULTILINE)
        return line.split(" | ")[2]

    def gain(item: str, column: str) -> float:
        return mean(item, rows["a_j"], column) - mean(item, rows["a"], column)

    one, five, ten = (gain("table 2.1", column) for column in ("1", "5", "10"))
    fitted = f"({five:.1f} took part in a choice of settings and is not tested)"
    assert here("Gain from a teacher's Jacobians") == f"{one:.1f}, {five:.1f}, {ten:.1f}: holds {fitted}"
    losses = [mean("table 2.1-readings", row, "test accuracy (%)") for row in ("logits, squared error", *SOFT)]
    assert here("Squared error") == "{:+.1f}, {:+.1f}: contradicted".format(*(losses[0] - soft for soft in losses[1:]))
    noisy = [mean("table 2.2", f"λ = {weight}", "0.4", "test/accuracy@noise=0.4") for weight in ("0", "0.01", "0.1", "1.0")]
    shares = ", ".join(f"{share:.1f}" for share in noisy)
    assert here("Accuracy at noise") == f"{shares} %: mixed (λ = 10 is not trained to an end)"
    none, *gained = ("No regularisation", "Dropout (p = 0.5)", "Bias weight decay (0.1)", "Bias-gradient (100)")
    regularised = [round(difference("4.3-late", f"{row} > {none}, 50").mean, 1) + 0.0 for row in gained]  # no -0.0
    assert here("Gain from dropout") == "{:.1f}, {:.1f}, {:.1f}: too few seeds to decide".format(*regularised)
    assert here("Gain from Jacobians of attention") == f"{gain('table 2.3', '10'):.1f} (inside CIFAR-100): undecided"
    flips = [mean("table 3.1", "Δ log-odds", method) for method in ("FullGrad (no abs)", "IntegratedGrad")]
    assert here("Digit flipping") == "{:.1f} ({:.1f})".format(*flips)
    names = ("iG, squared, mean over pixels", "iG, unsquared", "iG, squared, sum over pixels")
    start, *gains = (mean("table 4.1-readings", row, "test accuracy (%)") for row in ("nothing", *names))
    models = ("Baseline ResNet", "+ Gradient Norm-regularization", "+ Score-Matching", "+ Anti-Score-Matching")
    recognised = [mean("table 5.1", row, "GAN-test (%)") for row in models]
    assert here("Samples that another network") == "{:.0f}, {:.0f}, {:.0f}, {:.0f} %: mixed".format(*recognised)
    metrics = ("energy/logit/after", "energy/logit/before", "test/accuracy/before", "test/accuracy")
    fooled = [mean("figure 5.5", "VGG-11", "", metric) for metric in metrics]
    assert here("Energy") == "{:.0f} % ({:.0f} % before); {:.1f} → {:.1f} %".format(*fooled)
    assert here("Gain from a teacher's input-gradients") == "{:.1f}, {:.1f} or {:.1f}, by how distance is measured".format(
        *(gain - start for gain in gains)
    )


def test_verdicts_counted_in_the_readme_are_those_of_the_claims() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    claims = pd.read_csv(ROOT / "results/claims/cpu.csv")
    other = claims["section"].str.startswith("other")
    claims = claims[~other]
    count = claims.groupby("verdict").size()
    seeds, images = (claims[claims["unit"] == unit].groupby("verdict").size() for unit in ("seeds", "images"))
    part = claims["words"].str.startswith("holds where tested").sum()
    ways = [claims["words"].str.startswith(f"direction only: {way}").sum() for way in ("for", "against", "mixed")]
    assert f"tests {len(claims)} claims of the thesis, each a set of comparisons" in text and part == 2
    assert f"over seeds, {seeds['holds']} hold, two of them in the cells that this scale has" in text
    assert f"{seeds['contradicted']} is contradicted and {seeds['undecided']} are undecided; over the images of one" in text
    assert f"one network, {images['holds']} hold" in text
    assert f"{images['contradicted']} are contradicted in one or two of their comparisons, and {images['undecided']} is" in text
    assert f"{count['direction only']} have only a direction" in text
    assert "{} for the claim, {} against it and {} mixed".format(*ways) in text
    assert f"{count['not run']} wait for runs" in text and f"{count['withheld']} are withheld" in text
    assert f"{count['not part of this scale']} are about cells" in text and f"{other.sum()} other readings" in text
