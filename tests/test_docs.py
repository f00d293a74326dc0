"""What the pages say is what happens."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradexp.engine.run import ROOT

TINY = ["scale.width=0.04", "optim.passes=1", "trainer.threads=1", "logger=none"]
TEACHER = ["+upstream.teacher.optim.passes=1", "+upstream.teacher.scale.width=0.03"]


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(the file name in the paragraph above, content) of each fenced block of a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"(?:^`([^`\n]+)`\n\n)?^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    return [line for _, block in blocks(page, "console") for line in block.splitlines() if line.startswith("python ")]


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the files of docs/extend.md written into it."""
    copy = tmp_path_factory.mktemp("extended") / "repository"
    ignored = shutil.ignore_patterns(".git", ".venv", "outputs", "runs", "data", ".*_cache")
    copy.mkdir()
    for name in ("conf", "scripts", "results", "run.py"):
        source = ROOT / name
        shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy / name)
    shutil.copytree(ROOT / "conf" / "data", copy / "conf" / "data")
    shutil.copytree(ROOT / "gradexp", copy / "gradexp")
    for language in ("python", "yaml"):
        for name, content in blocks("docs/extend.md", language):
            assert name, f"a {language} block of docs/extend.md names no file"
            assert not (copy / name).exists(), f"{name} exists already"
            (copy / name).write_text(content, encoding="utf-8")
    return copy


@pytest.mark.parametrize("command", commands("docs/extend.md"))
def test_extend(extended: Path, command: str) -> None:
    words = shlex.split(command)
    tiny = [] if "make_table" in command else [*TINY, *TEACHER]
    done = subprocess.run(
        [sys.executable, *words[1:], *tiny],
        cwd=extended,
        env={"PYTHONPATH": str(extended), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = (
        "python run.py experiment=jacobian_distill scale=quick method=ce_cosine" if "make_table" in command else "finished"
    )
    assert expected in done.stdout


def test_readme_names_only_make_targets_that_exist() -> None:
    names = set(re.findall(r"^\s*make ([a-z0-9.-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"quickstart", "table-2.1"} <= names
    for name in names:
        done = subprocess.run(["make", "-n", name], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"make {name}: {done.stderr}"


def test_readme_commands_compose() -> None:
    from gradexp.engine.compose import check_overrides

    typed = [line for line in commands("README.md") if line.startswith("python run.py")]
    assert len(typed) >= 4
    for line in typed:
        check_overrides(shlex.split(line.partition("#")[0])[2:])
