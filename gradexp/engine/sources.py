"""Digests of the sources that decide numbers, so that a record states which code computed it."""

from __future__ import annotations

import hashlib

from gradexp.engine.run import ROOT

PACKAGES = ("data", "evaluate", "gradients", "layers", "models", "saliency", "sampling", "tasks", "terms", "training")


def _digests() -> dict[str, str]:
    """{package: digest of its source files}."""
    digests = {}
    for package in PACKAGES:
        digest = hashlib.sha256()
        folder = ROOT / "gradexp" / package
        for file in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(ROOT).as_posix()} {len(content)} ".encode() + content)
        digests[package] = digest.hexdigest()[:12]
    return digests


SOURCES = _digests()  # when this module is imported, with the code itself: the files may change while a process runs
