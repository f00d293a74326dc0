"""Configs that are kept on disk are those that Hydra composes, for as long as nothing they come from has changed."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from gradexp.engine import compose

WORDS = ("experiment=jacobian_distill", "scale=quick", "seed=3")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compose, "CACHE", tmp_path / "cache" / "configs")
    return compose.CACHE


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(compose.CONF, tmp_path / "conf")
    monkeypatch.setattr(compose, "CONF", tmp_path / "conf")
    return compose.CONF


def forget() -> None:
    for cached in (compose._sources, compose._by_hydra, compose._compose):
        cached.cache_clear()


def mark(words: tuple[str, ...] = WORDS) -> None:
    """Changes the stored config, so that it is recognised when it is read."""
    forget()
    compose._compose(words)
    compose._cache_file(words).write_bytes(gzip.compress(b'{"stored": true}'))


def is_read(words: tuple[str, ...] = WORDS) -> bool:
    forget()
    return compose._compose(words) == {"stored": True}


def test_a_config_comes_back_as_hydra_composed_it() -> None:
    forget()
    composed = compose._compose(WORDS)
    assert json.loads(gzip.decompress(compose._cache_file(WORDS).read_bytes())) == composed == compose._compose_anew(WORDS)
    mark()
    assert is_read()
    assert not is_read(WORDS[:2])


def test_an_override_that_reads_the_environment_is_stored_for_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*WORDS, "paths.outputs=${oc.env:SCRATCH_OF_JOB}")
    monkeypatch.setenv("SCRATCH_OF_JOB", "one")
    mark(words)
    assert is_read(words)
    monkeypatch.setenv("SCRATCH_OF_JOB", "two")
    assert not is_read(words)


@pytest.mark.parametrize("change", ["file", "new file", "environment", "resolver"])
def test_a_change_of_what_configs_come_from_is_noticed(conf: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADEXP_DATA", raising=False)
    mark()
    assert is_read()
    if change == "environment":
        monkeypatch.setenv("GRADEXP_DATA", "else")
    elif change == "resolver":
        (conf.parent / "compose.py").write_text("# other resolvers\n")
        monkeypatch.setattr(compose, "__file__", str(conf.parent / "compose.py"))
    else:
        file = conf / ("config.yaml" if change == "file" else "other.yaml")
        file.write_text((file.read_text() if file.exists() else "") + "\n# changed\n")
    assert not is_read()


def test_a_damaged_or_unwritable_file_costs_nothing_but_time(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    good = compose._compose(WORDS)
    file = compose._cache_file(WORDS)
    written = file.read_bytes()
    flipped = [written[:position] + bytes([written[position] ^ 4]) + written[position + 1 :] for position in range(10, 30)]
    for content in (os.urandom(4096), written[:-9], b"", b'{"seed": 3}', *flipped):
        file.write_bytes(content)
        compose._compose.cache_clear()
        assert compose._compose(WORDS) == good
    monkeypatch.setattr(compose, "CACHE", Path("/dev/null/configs"))
    compose._compose.cache_clear()
    assert compose._compose(WORDS) == good


def test_configs_of_an_earlier_state_are_deleted(folder: Path, conf: Path) -> None:
    for number in range(compose.STATES + 2):
        (conf / "other.yaml").write_text(f"data: {number}\n")
        assert not is_read()
    assert len(list(folder.rglob("*.gz"))) <= compose.STATES + 1
