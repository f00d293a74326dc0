"""Ids do not change: what is typed names the run that it has always named."""

import json
import re
from pathlib import Path

import pytest

from gradexp.engine.compose import plan
from gradexp.engine.run import ROOT, run_id

LINES = (Path(__file__).parent / "golden" / "ids.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:12])
def test_a_command_names_the_run_that_it_always_named(line: str) -> None:
    """golden/ids.txt: the ids of committed records of every experiment, and of some runs at scale=paper, and their commands.

    A line may change only where the numbers of the run do, with the reason in the commit.
    """
    name, words = line.split("  ", maxsplit=1)
    assert plan(re.split(r" (?=[+~\w.]+=)", words)).id == name


def test_every_committed_record_has_the_id_of_its_config() -> None:
    files = sorted((ROOT / "results" / "runs").glob("*/*.json"))
    assert len(files) > 200
    for file in files:
        assert run_id(json.loads(file.read_text(encoding="utf-8"))["config"]) == file.stem


def test_only_terms_of_weight_0_are_no_part_of_an_id() -> None:
    config = plan(["experiment=jacobian_distill", "method=ce_j"]).config
    terms = config["method"]["terms"]
    idle = config | {"method": config["method"] | {"terms": terms | {"idle": {"weight": 0, "scale": 3}}}}
    assert run_id(idle) == run_id(config)
    tasks = [run_id(config | {"task": {"_target_": name, "weight": 0}}) for name in ("a.A", "b.B")]
    assert len({*tasks, run_id(config)}) == 3
