"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path`, syncs, renames: a reader sees the whole content or none of it."""
    draft = draft_of(path)
    try:
        draft.write_bytes(content)
        put(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def draft_of(path: Path) -> Path:
    """Where this process prepares `path`; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}")


def put(draft: Path, path: Path) -> None:
    """Moves a finished file to its place, and both to the disk, so that a power cut leaves the old file or the new."""
    for place in (draft, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if place == draft:
            draft.replace(path)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a draft and puts it to its place, with checksums beside it: that of the new content and, until it
    is there, that of the old. Drafts of processes that died are removed, so that no disk fills up with them.
    """
    draft, seal = draft_of(path), _seal(path)
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink()
    try:
        write(draft)
        digests = [sha256(draft), *(seal.read_text().split()[:1] if seal.exists() else [])]
        write_atomically(seal, "\n".join(digests).encode())
        put(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def remove_sealed(path: Path) -> None:
    path.unlink(missing_ok=True)
    _seal(path).unlink(missing_ok=True)


def intact(path: Path) -> bool:
    """Whether a file is there and is what was written. One without a seal is taken as it is."""
    seal = _seal(path)
    return path.exists() and (not seal.exists() or sha256(path) in seal.read_text().split())


def reserve(path: Path, size: int) -> None:
    """Makes `path` at least `size` bytes long on the disk itself. Raises OSError where it is full.

    Memory that is mapped to a file without this kills the process when the disk fills up.
    """
    with path.open("ab") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
