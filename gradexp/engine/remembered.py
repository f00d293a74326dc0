"""Resolved configs kept on disk. Hydra takes a tenth of a second for each, and a report plans hundreds of runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from contextlib import closing
from functools import cache
from importlib.metadata import version
from pathlib import Path

from gradexp.engine import resolvers
from gradexp.engine.run import ROOT, Config

VARIABLE = re.compile(r"oc\.env:(\w+)")
FILE = ROOT / "outputs" / "cache" / "configs.sqlite"


def recall(conf: Path, overrides: tuple[str, ...]) -> Config | None:
    """What `remember` was told of these overrides; None where conf/, or an environment variable that it reads, has changed."""
    try:
        with closing(_open()) as base:
            found = base.execute("select config from configs where key = ?", (_key(conf, overrides),)).fetchone()
        config: Config | None = json.loads(found[0]) if found else None
        return config
    except (OSError, sqlite3.Error, ValueError):
        return None


def remember(conf: Path, overrides: tuple[str, ...], config: Config) -> None:
    """Nothing depends on it: where it can't be written, the config is composed again."""
    try:
        with closing(_open()) as base, base:
            base.execute("delete from configs where tree != ?", (_tree(conf),))
            values = _key(conf, overrides), _tree(conf), json.dumps(config)
            base.execute("insert or replace into configs values (?, ?, ?)", values)
    except (OSError, sqlite3.Error) as error:
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            FILE.unlink(missing_ok=True)


def _open() -> sqlite3.Connection:
    FILE.parent.mkdir(parents=True, exist_ok=True)
    base = sqlite3.connect(FILE, timeout=5)
    base.execute("create table if not exists configs (key text primary key, tree text, config text)")
    return base


def _key(conf: Path, overrides: tuple[str, ...]) -> str:
    read = [os.environ.get(name) for name in VARIABLE.findall(" ".join(overrides))]
    return hashlib.sha256(json.dumps([_tree(conf), overrides, read]).encode()).hexdigest()


@cache
def _tree(conf: Path) -> str:
    """Names everything that a config is made from but the overrides."""
    digest = hashlib.sha256("".join(map(version, ("hydra-core", "omegaconf"))).encode())
    digest.update(Path(resolvers.__file__).read_bytes())
    variables: set[str] = set()
    for file in sorted(conf.rglob("*.yaml")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(conf)} {len(content)} ".encode() + content)
        variables |= set(VARIABLE.findall(content.decode()))
    digest.update(repr(sorted((name, os.environ.get(name)) for name in variables)).encode())
    return digest.hexdigest()
