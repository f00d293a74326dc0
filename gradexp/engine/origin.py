"""The origin of a record: the commit, and the versions of the libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from gradexp.engine.run import ROOT

LOADED = "GRADEXP_COMMIT"  # environment variable: the commit and the digest of changes that this and forked processes loaded
VERSIONED = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "gradexp")


def git_state() -> dict[str, Any]:
    """The commit, whether code or config differ from it (results do not count), and the digest of these changes.

    A process runs the code that it loaded, or that the server from which it was forked loaded; where the working tree has
    changed since the first call, the state is dirty.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, errors="replace")
        return done.stdout.strip() if done.returncode == 0 else ""

    here = ("--", ".", ":!results")
    commit = git("rev-parse", "HEAD")
    new = [ROOT / name for name in git("ls-files", "--others", "--exclude-standard", "-z", *here).split("\0") if name]
    parts = [git("diff", "HEAD", "--binary", *here).encode()] + [str(file).encode() + file.read_bytes() for file in new]
    changes = hashlib.sha256(b"".join(parts)).hexdigest()[:12] if any(parts) else ""
    loaded = os.environ.setdefault(LOADED, f"{commit} {changes}".strip())
    dirty = bool(changes) or loaded != commit
    digest = loaded.partition(" ")[2] or changes
    return {"commit": commit or None, "dirty": dirty if commit else None, **({"changes": digest} if commit and digest else {})}


def versions() -> dict[str, str]:
    """The versions of Python, the platform and the packages that decide numbers."""
    numbers = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in VERSIONED:
        try:
            numbers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # gradexp, run from a checkout without installation
            numbers[package] = "not installed"
    return numbers
