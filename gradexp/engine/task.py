"""What a task declares of itself, so that nobody else keeps lists of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gradexp.base.files import sha256
from gradexp.engine.build import build
from gradexp.engine.run import Config, Run

Sizes = Mapping[str, tuple[int, int]]  # {data set: (training images, test images)}


@dataclass
class Result:
    """What a task returns.

    metrics: a flat dict of numbers, curves as lists. facts: whatever else the record should hold
    (data fingerprint, parameters, device, precision, images_per_second). arrays: images and maps that a figure
    shows; they are kept compressed beside the record, so a figure renders from results alone. Keep them small.
    """

    metrics: dict[str, float | list[float]]
    status: str = "finished"
    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A finished upstream run: its record, and the file that it leaves for other runs."""

    run: Run
    record: Config
    product: Path

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the product."""
        return sha256(self.product)


Upstream = Mapping[str, Finished]


def digests_of(upstream: Upstream) -> dict[str, str]:
    """{name: SHA-256 of the file that is used} of upstream runs."""
    return {name: below.digest for name, below in upstream.items()}


@dataclass(kw_only=True)
class Task(ABC):
    """What a run does: a callable that is handed the upstream runs, finished, and starts none itself.

    Its settings are the fields of the class, by their names in `conf/task/`. version: raised when a fix changes the task's
    numbers, so that older records no longer count.
    product: the file in the run's folder that others need of it, such as its weights; "" where it leaves none.
    """

    version: int = 1
    product: ClassVar[str] = ""

    def check(self, run: Run) -> None:  # noqa: B027 (not every task has something to refuse)
        """Raises UserError for all that can be refused before hours of work, before upstream runs are done."""

    @abstractmethod
    def __call__(self, run: Run, upstream: Upstream) -> Result:
        """Does the work. The runs in `upstream` are finished, and their products are on this disk."""

    # What `make plan` asks: how much work a run is, so that the cost of one tells that of another.

    def work(self, config: Config, sizes: Sizes) -> float | None:
        """How many images a run processes, in units of its own task; None where its data set's size is not known yet.

        1 for tasks whose runs are all alike.
        """
        return 1.0

    def shortened(self, config: Config, n: int) -> Config | None:
        """The config of the same run cut to `n` steps, or to 8 `n` images; None for one that can't be cut."""
        return None

    def leaves(self, config: Config, sizes: Sizes) -> float | None:
        """How many MiB a run leaves in its folder, where that can be said beforehand."""
        return None


def task_of(config: Config) -> Task:
    """The task that a config names."""
    task: Task = build(config["task"], where="task")
    return task


def images_of(config: Config, sizes: Sizes) -> tuple[int | None, int | None]:
    """(training images, test images) of a run's data; None for those of a data set whose size is not known yet."""
    data = config.get("data", {})
    train, test = sizes.get(data.get("name", ""), (None, None))
    if data.get("per_class"):
        train = data["per_class"] * len(data.get("only_classes") or range(data["classes"]))
    return train, test


def at_most(wanted: int | None, there: int | None) -> float | None:
    """How many images are looked at: `wanted` of those that are there, None for all."""
    count = wanted or there
    return None if count is None else float(min(count, there or count))
