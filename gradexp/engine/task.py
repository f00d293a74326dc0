"""The base class of tasks, which declare all that the rest of the suite has to know about them."""

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
from gradexp.engine.record import Record
from gradexp.engine.run import Config, Run

Sizes = Mapping[str, tuple[int, int]]  # {data set: (training images, test images)}


@dataclass
class Result:
    """What a task returns.

    metrics: numbers, and curves as lists. facts: other fields of the record (data fingerprint, parameters, device,
    precision, images_per_second). arrays: images and maps that a figure shows, compressed beside the record; keep them small.
    """

    metrics: dict[str, float | list[float]]
    status: str = "finished"
    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A finished upstream run, its record, and the file that it left for other runs."""

    run: Run
    record: Record
    product: Path

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the product."""
        return sha256(self.product)


Upstream = Mapping[str, Finished]


def digests_of(upstream: Upstream) -> dict[str, str]:
    """{name: SHA-256 of the product} of upstream runs."""
    return {name: below.digest for name, below in upstream.items()}


@dataclass(kw_only=True)
class Task(ABC):
    """What a run does: a callable that gets the finished upstream runs and starts none itself.

    Its settings are the fields of the class, by their names in `conf/task/`. version: raised when a fix changes the task's
    numbers, so that older records no longer count. product: the file in the run's folder that other runs need, such as
    its weights; "" if there is none.
    """

    version: int = 1
    product: ClassVar[str] = ""

    def check(self, run: Run) -> None:  # noqa: B027 (not abstract: many tasks check nothing)
        """Raises UserError for every mistake that can be noticed before the work, and before the upstream runs are done."""

    @abstractmethod
    def __call__(self, run: Run, upstream: Upstream) -> Result:
        """Does the work. The runs in `upstream` are finished, and their products exist on this disk."""

    # For `make plan`, which estimates the cost of a run from the cost of others.

    def work(self, config: Config, sizes: Sizes) -> float | None:
        """How many images a run processes; 1 if all runs of the task cost the same, None if the data set's size is unknown."""
        return 1.0

    def leaves(self, config: Config, sizes: Sizes) -> float | None:
        """How many MiB a run leaves in its folder; None if that is unknown beforehand."""
        return None


def task_of(config: Config) -> Task:
    """The task that a config names."""
    return build(config["task"], where="task")


def images_of(config: Config, sizes: Sizes) -> tuple[int | None, int | None]:
    """(training images, test images) of a run's data; None for a data set whose size is unknown."""
    data = config.get("data", {})
    train, test = sizes.get(data.get("name", ""), (None, None))
    if data.get("per_class"):
        train = data["per_class"] * len(data.get("only_classes") or range(data["classes"]))
    return train, test
