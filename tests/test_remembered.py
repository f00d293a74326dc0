"""Configs that are kept on disk are those that Hydra composes, for as long as nothing they come from has changed."""

import os
from pathlib import Path

import pytest

from gradexp.engine import compose, remembered

WORDS = ("experiment=jacobian_distill", "scale=quick", "seed=3")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "cache" / "configs.sqlite"
    monkeypatch.setattr(remembered, "FILE", file)
    return file


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("data: ${oc.env:SOMEWHERE,data}\n")
    return tmp_path / "conf"


def forget() -> None:
    remembered._tree.cache_clear()


def test_a_config_comes_back_as_hydra_composed_it() -> None:
    composed = compose._composed(WORDS)
    remembered.remember(compose.CONF, WORDS, composed)
    assert remembered.recall(compose.CONF, WORDS) == composed
    assert remembered.recall(compose.CONF, WORDS[:2]) is None


def test_an_override_that_reads_the_environment_is_remembered_for_its_value(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("paths.outputs=${oc.env:SCRATCH_OF_JOB}",)
    monkeypatch.setenv("SCRATCH_OF_JOB", "one")
    remembered.remember(conf, words, {"paths": {"outputs": "one"}})
    assert remembered.recall(conf, words) is not None
    monkeypatch.setenv("SCRATCH_OF_JOB", "two")
    assert remembered.recall(conf, words) is None


@pytest.mark.parametrize("change", ["file", "new file", "environment", "resolver"])
def test_a_change_of_what_configs_come_from_is_noticed(conf: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOMEWHERE", raising=False)
    forget()
    remembered.remember(conf, WORDS, {"seed": 3})
    assert remembered.recall(conf, WORDS) == {"seed": 3}
    if change == "environment":
        monkeypatch.setenv("SOMEWHERE", "else")
    elif change == "resolver":
        (conf.parent / "resolvers.py").write_text("# others\n")
        monkeypatch.setattr(remembered.resolvers, "__file__", str(conf.parent / "resolvers.py"))
    else:
        (conf / ("config.yaml" if change == "file" else "other.yaml")).write_text("data: x\n")
    forget()
    assert remembered.recall(conf, WORDS) is None


def test_a_damaged_or_unwritable_file_costs_nothing_but_time(file: Path, conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.mkdir()
    file.write_bytes(os.urandom(4096))
    remembered.remember(conf, WORDS, {"seed": 3})
    assert remembered.recall(conf, WORDS) is None
    remembered.remember(conf, WORDS, {"seed": 3})  # in a new file
    assert remembered.recall(conf, WORDS) == {"seed": 3}
    monkeypatch.setattr(remembered, "FILE", Path("/dev/null/configs.sqlite"))
    remembered.remember(conf, WORDS, {"seed": 3})
    assert remembered.recall(conf, WORDS) is None
