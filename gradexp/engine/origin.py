"""The origin of a record: the commit, and the versions of the libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from gradexp.engine.run import ROOT

# Environment variable: the commit whose code the server of forked processes has loaded, and whether that was changed.
LOADED = "GRADEXP_COMMIT"
VERSIONED = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "gradexp")


def git_state() -> dict[str, Any]:
    """The commit, and whether code or config differ from it (results do not count); None for both where git can't tell.

    A process that was forked from a server runs the code that the server loaded, which may be of an earlier commit.
    """
    try:
        top = _git("rev-parse", "--show-toplevel")
        if Path(top).resolve() != ROOT:
            raise LookupError(f"it is inside another repository, {top}")
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":!results")
    except (OSError, LookupError) as error:
        _note(str(error))
        return {"commit": None, "dirty": None}
    loaded = os.environ.get(LOADED, commit)
    return {"commit": commit, "dirty": bool(changes) or loaded != commit}


def note_loaded() -> None:
    """Notes, for the processes that will be forked from a server, which code it loads now."""
    state = git_state()
    os.environ.setdefault(LOADED, f"{state['commit']}{' with changes' if state['dirty'] else ''}")


def _git(*words: str) -> str:
    """The output of git in this checkout, wherever GIT_DIR and the like point. Raises LookupError where git fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise LookupError((done.stderr.strip() or "git failed").splitlines()[0])
    return done.stdout.strip()


@cache
def _note(why: str) -> None:
    print(f"records will name no commit, as git does not know that of {ROOT}: {why}", flush=True)


def versions() -> dict[str, str]:
    """The versions of Python, the platform and the packages that decide numbers."""
    numbers = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in VERSIONED:
        try:
            numbers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # gradexp, run from a checkout without installation
            numbers[package] = "not installed"
    return numbers
