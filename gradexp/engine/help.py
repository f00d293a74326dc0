"""`python run.py --help`: the experiments, examples and options; with an experiment, what its file says about it."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gradexp.base.errors import UserError, nearest
from gradexp.base.texts import read_text
from gradexp.engine.plugins import own_conf_folders
from gradexp.engine.run import ROOT

EXAMPLES = {
    "experiment=jacobian_distill scale=quick": "one run in seconds, offline",
    "experiment=jacobian_distill method=ce_j data.per_class=5": "another method and training set",
    "-m experiment=jacobian_distill method=ce,ce_j seed=0,1,2": "a sweep: every combination",
    "experiment=jacobian_distill --cfg job": "the config, without interpolations resolved",
    "experiment=jacobian_distill --help": "what the experiment claims, its scales and cost",
    "--show ID": "a record;  --id ID answers from its record, or does its run",
}
END = (
    'Tab completion in this shell: eval "$(python run.py --shell-completion install=bash)"; also zsh and fish.',
    "Tables and figures: make. Configs: conf/. Everything else: README.md and docs/.",
)


def text(words: Sequence[str]) -> str:
    """The help for a command line. Raises UserError for an unknown experiment."""
    folders = [*own_conf_folders(), ROOT / "conf"]
    headers = {file.stem: _header(file) for conf in folders for file in sorted((conf / "experiment").glob("[!_]*.yaml"))}
    chosen = next((word.partition("=")[2] for word in words if word.startswith("experiment=")), None)
    if chosen is not None:
        if chosen not in headers:
            raise UserError(f"experiment={chosen}: there is no such experiment{nearest(chosen, list(headers))}")
        return "\n".join([f"experiment={chosen}", "", *headers[chosen]])
    parts = {
        "Experiments": {name: _claim(lines) for name, lines in headers.items()},
        "Scales": {name: " ".join(_header(ROOT / "conf" / "scale" / f"{name}.yaml")) for name in ("paper", "cpu", "quick")},
        "Examples, after python run.py": EXAMPLES,
    }
    lines = ["python run.py experiment=NAME [key=value ...]: one run; its result is a file of results/runs/NAME/"]
    for title, entries in parts.items():
        lines += ["", title, *(line for name, what in entries.items() for line in _entry(name, what))]
    return "\n".join([*lines, "", *END])


def _entry(name: str, what: str) -> list[str]:
    """A name and a paragraph beside it, or below a long one."""
    column = 26
    lines = textwrap.wrap(what, max(40, min(120, shutil.get_terminal_size().columns) - column)) or [""]
    beside = [f"  {name:<{column - 2}}{lines[0]}"] if len(name) < column - 2 else [f"  {name}", " " * column + lines[0]]
    return beside + [" " * column + line for line in lines[1:]]


def _header(file: Path) -> list[str]:
    """The comment at the top of a config file."""
    lines = [line for line in read_text(file).splitlines() if not line.startswith("# @package")]
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:end]]


def _claim(header: Sequence[str]) -> str:
    """What stands before the first command."""
    end = next((number for number, line in enumerate(header) if line.startswith("  ")), len(header))
    return " ".join(header[:end])
