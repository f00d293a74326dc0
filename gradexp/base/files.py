"""Files that are written completely or not at all."""

from __future__ import annotations

import glob
import hashlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ABANDONED = 24 * 3600.0  # seconds after which an untouched draft is that of a process that died


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader gets all of the old content or all of the new."""
    with _drafted(path) as draft:
        draft.write_bytes(content)
        move_into_place(draft, path)


@contextmanager
def _drafted(path: Path) -> Iterator[Path]:
    """A draft, which is removed at the end. An OSError names `path`: the user knows no draft."""
    draft = draft_of(path)
    try:
        yield draft
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        draft.unlink(missing_ok=True)


def draft_of(path: Path) -> Path:
    """A new name beside `path`, of a file or folder in which this process prepares it; the parent folder is made.

    It names host and process, for whoever finds one that was left; containers may share both, so it is random, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{_draft_prefix(path)}{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(8)}")


def _draft_prefix(path: Path) -> str:
    """What the names of drafts of `path` begin with; cut, as a name has at most 255 bytes."""
    return os.fsdecode(f".{path.name}".encode(errors="surrogateescape")[:128]) + "."


def remove_drafts(path: Path, age: float = ABANDONED) -> None:
    """Removes the drafts of `path` that nobody has touched for `age` seconds. age: 0 where nobody else can write `path`."""
    for draft in path.parent.glob(f"{glob.escape(_draft_prefix(path))}*"):
        with suppress(FileNotFoundError):  # another process removed or renamed it
            if time.time() - draft.stat().st_mtime >= age:
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def move_into_place(draft: Path, path: Path) -> None:
    """Renames a draft to `path` and syncs both to the disk, so that a power cut leaves the old file or the new."""
    _sync(draft)
    draft.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Writes a file atomically, and its checksum to a file beside it, which keeps the old one too until the file is replaced.

    content: bytes, or a function that writes a draft. Drafts of processes that died are removed.
    """
    seal = _seal(path)
    remove_drafts(path)
    with _drafted(path) as draft:
        if isinstance(content, bytes):
            draft.write_bytes(content)
        else:
            content(draft)
        digests = [sha256(draft), *(seal.read_text(errors="replace").split()[:1] if seal.exists() else [])]
        write_atomically(seal, "\n".join(digests).encode())
        move_into_place(draft, path)


def remove_sealed(path: Path) -> None:
    path.unlink(missing_ok=True)
    _seal(path).unlink(missing_ok=True)


def intact(path: Path) -> bool:
    """Whether a file exists and, if it has a checksum, has the content that was written."""
    seal = _seal(path)
    return path.exists() and (not seal.exists() or sha256(path) in seal.read_text(errors="replace").split())


def reserve(path: Path, size: int) -> None:
    """Allocates at least `size` bytes of disk for a file. Raises OSError if the disk is full.

    Without it, a process that writes to a memory-mapped file is killed when the disk fills up.
    """
    with path.open("ab") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
