"""The origin of a record: the commit, and the versions of the libraries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from gradexp.engine.run import ROOT

LOADED = "GRADEXP_COMMIT"  # environment variable: the commit whose code the server of forked processes has loaded
VERSIONED = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "gradexp")


def git_state() -> dict[str, Any]:
    """The commit, and whether code or config differ from it (results do not count).

    A process that was forked from a server runs the code that the server loaded, which may be of an earlier commit.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":!results")
    moved = os.environ.get(LOADED, commit) != commit
    return {"commit": commit or None, "dirty": bool(changes) or moved if commit else None}


def versions() -> dict[str, str]:
    """The versions of Python, the platform and the packages that decide numbers."""
    numbers = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in VERSIONED:
        try:
            numbers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # gradexp, run from a checkout without installation
            numbers[package] = "not installed"
    return numbers
