"""A few trials of scripts/reliability.py; the whole of it is run by hand and gives docs/reliability.md."""

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gradexp.engine.run import ROOT

sys.path.insert(0, str(ROOT / "scripts"))  # a trial's processes import it by name

import reliability


def test_a_kill_at_a_random_moment(tmp_path: Path) -> None:
    done = reliability.kills("training", 1, tmp_path, random.Random(1))
    assert done.good == done.times == 1


@pytest.mark.parametrize("trial", [reliability.read_only, reliability.damaged_parquet])
def test_a_trial(tmp_path: Path, trial: object) -> None:
    try:
        done = trial(tmp_path)  # type: ignore[operator]
    except PermissionError:
        pytest.skip("mounting a small file system needs root")
    assert done.good == done.times == 1


def test_a_trial_that_goes_wrong_is_reported(tmp_path: Path) -> None:
    def wrong(_: Path) -> reliability.Trial:
        reliability.expect(False, "as it should not be")
        raise AssertionError

    done = reliability.attempt("wrong", wrong)
    assert (done.good, done.times, done.message) == (0, 1, "WRONG: as it should not be")
    assert "| wrong | 0/1 |" in reliability.page([done])


def test_processes_that_end_together_keep_their_exit_codes() -> None:
    """multiprocessing reads the codes of all processes when one is started: who joins one then finds 255."""
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda _: reliability.exit_code(reliability.started(time.sleep, 0.0)), range(60)))
    assert codes == [0] * 60
