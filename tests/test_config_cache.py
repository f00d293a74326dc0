"""Configs that are kept on disk are those that Hydra composes, for as long as nothing they come from has changed."""

import os
from pathlib import Path

import pytest

from gradexp.engine import compose, config_cache

WORDS = ("experiment=jacobian_distill", "scale=quick", "seed=3")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache" / "configs"
    monkeypatch.setattr(config_cache, "FOLDER", folder)
    return folder


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("data: ${oc.env:SOMEWHERE,data}\n")
    return tmp_path / "conf"


def forget() -> None:
    config_cache._state.cache_clear()


def test_a_config_comes_back_as_hydra_composed_it() -> None:
    composed = compose._composed(WORDS)
    config_cache.store(compose.CONF, WORDS, composed)
    assert config_cache.load(compose.CONF, WORDS) == composed
    assert config_cache.load(compose.CONF, WORDS[:2]) is None


def test_an_override_that_reads_the_environment_is_stored_for_its_value(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("paths.outputs=${oc.env:SCRATCH_OF_JOB}",)
    monkeypatch.setenv("SCRATCH_OF_JOB", "one")
    config_cache.store(conf, words, {"paths": {"outputs": "one"}})
    assert config_cache.load(conf, words) is not None
    monkeypatch.setenv("SCRATCH_OF_JOB", "two")
    assert config_cache.load(conf, words) is None


@pytest.mark.parametrize("change", ["file", "new file", "environment", "resolver"])
def test_a_change_of_what_configs_come_from_is_noticed(conf: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOMEWHERE", raising=False)
    forget()
    config_cache.store(conf, WORDS, {"seed": 3})
    assert config_cache.load(conf, WORDS) == {"seed": 3}
    if change == "environment":
        monkeypatch.setenv("SOMEWHERE", "else")
    elif change == "resolver":
        (conf.parent / "resolvers.py").write_text("# others\n")
        monkeypatch.setattr(config_cache.resolvers, "__file__", str(conf.parent / "resolvers.py"))
    else:
        (conf / ("config.yaml" if change == "file" else "other.yaml")).write_text("data: x\n")
    forget()
    assert config_cache.load(conf, WORDS) is None


def test_a_damaged_or_unwritable_file_costs_nothing_but_time(folder: Path, conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_cache.store(conf, WORDS, {"seed": 3})
    (file,) = folder.rglob("*.json")
    for content in (os.urandom(4096), b'{"seed": ', b"", b'{"seed": 3}'):
        file.write_bytes(content)
        assert config_cache.load(conf, WORDS) is None
    config_cache.store(conf, WORDS, {"seed": 3})
    assert config_cache.load(conf, WORDS) == {"seed": 3}
    written = file.read_bytes()
    for position in range(len(written)):  # 3 may become 7, which is JSON, too
        file.write_bytes(written[:position] + bytes([written[position] ^ 4]) + written[position + 1 :])
        assert config_cache.load(conf, WORDS) is None
    file.write_bytes(written)
    monkeypatch.setattr(config_cache, "FOLDER", Path("/dev/null/configs"))
    config_cache.store(conf, WORDS, {"seed": 3})
    assert config_cache.load(conf, WORDS) is None


def test_configs_of_an_earlier_state_are_deleted(folder: Path, conf: Path) -> None:
    config_cache.store(conf, WORDS, {"seed": 3})
    (conf / "config.yaml").write_text("data: x\n")
    forget()
    config_cache.store(conf, WORDS, {"seed": 4})
    assert len(list(folder.rglob("*.json"))) == 1
