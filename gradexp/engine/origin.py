"""Where a record comes from: the commit, and the versions of what computed it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from gradexp.engine.run import ROOT

LOADED = "GRADEXP_COMMIT"  # in the environment: the commit whose code a server of processes has loaded
VERSIONED = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "gradexp")


def git_state() -> dict[str, Any]:
    """The commit, and whether code or config differ from it (results do not count).

    A process that was forked from a server has the code of when that was started, whose commit the environment names.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":!results")
    moved = os.environ.get(LOADED, commit) != commit
    return {"commit": commit or None, "dirty": bool(changes) or moved if commit else None}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
