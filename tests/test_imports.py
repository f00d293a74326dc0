"""Who may import whom: every arrow points downwards."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from gradexp.engine.run import ROOT

# From the ground up: a room may import those below it that it names here.
SCIENCE = {"base", "layers", "models", "data", "gradients", "terms", "saliency", "sampling", "training", "evaluate"}
MAY_IMPORT = {
    "base": set(),
    "layers": {"base"},
    "models": {"base"},
    "data": {"base"},
    "gradients": {"base", "layers"},
    "terms": {"base", "data", "gradients"},
    "saliency": {"base", "gradients"},
    "sampling": {"base", "gradients"},
    "training": {"base", "layers", "data", "gradients", "terms"},
    "evaluate": {"base", "data", "gradients", "saliency", "sampling"},
    "engine": SCIENCE,
    "report": {"base", "engine"},
    "tasks": {*SCIENCE, "engine"},
    "__main__": {*SCIENCE, "engine", "report", "tasks"},  # what is typed: nothing imports it
}
ONLY_IN = {"lightning": {"training", "engine", "tasks"}, "hydra": {"engine"}}


def modules() -> list[Path]:
    return sorted((ROOT / "gradexp").rglob("*.py"))


def room(path: Path) -> str:
    inside = path.relative_to(ROOT / "gradexp")
    return "__main__" if path.name == "__main__.py" else inside.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_downwards(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    for name in imported(path):
        package, *rest = name.split(".")
        if package == "gradexp" and rest and rest[0] != here:
            assert rest[0] in MAY_IMPORT[here], f"{here} may not import {name}"
        if package in ONLY_IN:
            assert here in ONLY_IN[package], f"{here} may not import {name}"


def test_no_circle() -> None:
    """Imports inside functions count too."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}

    def module(name: str) -> str | None:
        """The module that an imported name is, or comes from."""
        while name and name not in names:
            name = name.rpartition(".")[0]
        return name or None

    graph = {here: {module(name) for name in imported(path)} - {here, None} for here, path in names.items()}
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_every_room_has_a_rule() -> None:
    assert {room(path) for path in modules()} - {"__init__"} <= MAY_IMPORT.keys()


def test_the_structure_page_names_every_room_above_those_it_imports() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    floors = {name: floor for floor, cell in enumerate(cells) for name in re.findall(r"`(\w+)`", cell)}
    assert floors.keys() == MAY_IMPORT.keys()
    for here, below in MAY_IMPORT.items():
        assert all(floors[name] <= floors[here] for name in below), here


def test_tables_and_the_page_need_no_torch() -> None:
    code = "import sys, gradexp.report.html, gradexp.engine.compose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
