"""Resolved configs kept on disk: Hydra takes a tenth of a second for each, and a report names hundreds of runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from gradexp.base.files import draft_of
from gradexp.engine import resolvers
from gradexp.engine.run import ROOT, Config

VARIABLE = re.compile(r"oc\.env:(\w+)")
FOLDER = ROOT / "outputs" / "cache" / "configs"


def load(conf: Path, overrides: tuple[str, ...]) -> Config | None:
    """The stored config; None where there is none, or conf/ or an environment variable that it reads has changed since."""
    try:
        digest, _, content = _file(conf, overrides).read_bytes().partition(b"\n")
        config: Config | None = json.loads(content) if digest == _digest(content) else None
        return config
    except (OSError, ValueError):
        return None


def store(conf: Path, overrides: tuple[str, ...], config: Config) -> None:
    """Stores a config, if the folder can be written; those of another state of conf/ are deleted."""
    file = _file(conf, overrides)
    with suppress(OSError):
        for folder in FOLDER.glob("*"):
            if folder != file.parent:
                shutil.rmtree(folder, ignore_errors=True)
        draft = draft_of(file)
        content = json.dumps(config).encode()
        draft.write_bytes(_digest(content) + b"\n" + content)
        draft.replace(file)  # without a sync: a damaged file is composed again


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _file(conf: Path, overrides: tuple[str, ...]) -> Path:
    variables = [os.environ.get(name) for name in VARIABLE.findall(" ".join(overrides))]
    key = hashlib.sha256(json.dumps([overrides, variables]).encode()).hexdigest()
    return FOLDER / _state(conf) / f"{key}.json"


@cache
def _state(conf: Path) -> str:
    """A digest of all that a config depends on except its overrides."""
    digest = hashlib.sha256("".join(map(version, ("hydra-core", "omegaconf"))).encode())
    digest.update(Path(resolvers.__file__).read_bytes())
    variables: set[str] = set()
    for file in sorted(conf.rglob("*.yaml")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(conf)} {len(content)} ".encode() + content)
        variables |= set(VARIABLE.findall(content.decode(errors="replace")))
    digest.update(repr(sorted((name, os.environ.get(name)) for name in variables)).encode())
    return digest.hexdigest()
