"""Small, exact things to test with."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import run_python

from gradexp.engine import record


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks here are tiny


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Overrides that keep records and outputs of a test in its own folder."""
    return [f"paths.results={tmp_path}/results", f"paths.outputs={tmp_path}/outputs"]


@pytest.fixture
def run_py(places: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python run.py ...` as a user types it."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HYDRA")}
        return run_python("run.py", *words, *places, env=environment)

    return call


@pytest.fixture(scope="module")
def sample_records() -> Iterator[None]:
    """Records of runs that never took place can be read: parts of records, with ids that are not those of their configs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "faults", lambda _: [])
        patch.setattr(record, "contradictions", lambda *_: [])
        yield
