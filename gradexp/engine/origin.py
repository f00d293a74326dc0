"""The origin of a record: the commit, digests of the sources, the versions of the libraries."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gradexp.base.errors import UserError
from gradexp.base.files import sha256
from gradexp.engine import plugins
from gradexp.engine.run import ROOT

# Environment variable: the commit, and the digest of changes, that this process and those forked from it have loaded.
LOADED = "GRADEXP_COMMIT"
VERSIONED = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "gradexp")
# Modules of the engine that decide numbers; the others of it do not.
ENGINE = ("assemble", "evaluation", "fit", "hardware")
PACKAGES = ("data", "evaluate", "gradients", "layers", "models", "saliency", "sampling.py", "tasks", "terms", "training")


def git_state() -> dict[str, Any]:
    """The commit, whether code or config differ from it (results do not count), and the digest of these changes.

    None for commit and dirty where git can't tell.

    A process runs the code that it loaded, or that the server from which it was forked loaded; where the working tree has
    changed since the first call, the state is dirty.
    """
    here = ("--", ".", ":!results")
    try:
        top = _git("rev-parse", "--show-toplevel").strip()
        if Path(top).resolve() != ROOT:
            raise LookupError(f"it is inside another repository, {top}")
        commit = _git("rev-parse", "HEAD").strip()
        parts = [_git("diff", "HEAD", "--binary", *here).encode(errors="surrogateescape")]
        names = [name for name in _git("ls-files", "--others", "--exclude-standard", "-z", *here).split("\0") if name]
        parts += [f"{name}\n{_content(ROOT / name)}\n".encode(errors="surrogateescape") for name in names]
    except (OSError, LookupError) as error:
        _note(str(error))
        return {"commit": None, "dirty": None}
    changes = hashlib.sha256(b"".join(parts)).hexdigest()[:12] if any(parts) else ""
    loaded = os.environ.setdefault(LOADED, f"{commit} {changes}".strip())
    digest = loaded.partition(" ")[2] or changes
    return {"commit": commit, "dirty": bool(changes) or loaded != commit, **({"changes": digest} if digest else {})}


def attempt(facts: Mapping[str, Any], used: Mapping[str, str]) -> dict[str, Any]:
    """What decides the numbers of an attempt besides its config: the code, the hardware, the files of upstream runs.

    facts: of the hardware, see Hardware.facts. used: SHA-256 of these files, by name.
    """
    return {"git": git_state(), **{name: facts[name] for name in ("device", "precision", "threads")}, "upstream": dict(used)}


def _content(path: Path) -> str:
    """The digest of a file; the target of a link, which may lead nowhere; nothing of a nested repository."""
    if path.is_symlink():
        return str(path.readlink())
    return sha256(path) if path.is_file() else ""


def _git(*words: str) -> str:
    """The output of git in this checkout, wherever GIT_DIR and the like point. Raises LookupError where git fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, env=environment)
    if done.returncode:
        raise LookupError((done.stderr.decode(errors="replace").strip() or "git failed").splitlines()[0])
    return done.stdout.decode(errors="surrogateescape")


@cache
def _note(why: str) -> None:
    print(f"records will name no commit, as git does not know that of {ROOT}: {why}", flush=True)


def versions() -> dict[str, str]:
    """The versions of Python, the platform and the packages that decide numbers."""
    numbers = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in VERSIONED:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:  # gradexp, run from a checkout without installation
            numbers[package] = "not installed"
    return numbers


def _digests() -> dict[str, str]:
    """{package: digest of its source files}, for the packages that decide numbers, those of the user's own among them."""
    home = ROOT / "gradexp"
    digests = {package: _digest(home, home / package) for package in PACKAGES}
    with suppress(UserError):  # for a package that does not exist, which is raised when a run is composed
        digests |= {name: _digest(folder, folder) for name, folder in plugins.packages().items()}
    return digests | {"engine": _digest(home, *(home / "engine" / f"{name}.py" for name in ENGINE))}


def _digest(home: Path, *paths: Path) -> str:
    """Of the names and contents of source files; paths: files, and folders of them, inside the package at `home`."""
    digest = hashlib.sha256()
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            content, name = file.read_bytes(), file.relative_to(home.parent)
            digest.update(f"{name.as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()[:12]


SOURCES = _digests()  # when this module is imported, with the code itself: the files may change while a process runs
