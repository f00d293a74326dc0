"""Runs whose records lie where a test wants them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradexp.engine.ensure import finish
from gradexp.engine.run import Paths, Run
from gradexp.engine.task import Finished

Planner = Callable[[Sequence[str]], Run]


def places(folder: Path) -> Paths:
    """Records below `folder` itself."""
    return Paths(Path("data"), folder, Path("outputs"))


def at(folder: Path, plan: Planner) -> Planner:
    """The planner, with records of runs and of what they stand on below `folder`."""

    def moved(run: Run) -> Run:
        return replace(run, paths=places(folder), below={name: moved(below) for name, below in run.upstream.items()})

    return lambda overrides: moved(plan(overrides))


def fake_plan(overrides: Sequence[str]) -> Run:
    """A planner whose configs are the overrides themselves: ids do not change with conf/."""
    settings = dict(word.split("=") for word in overrides)
    config: dict[str, Any] = {"name": settings.pop("experiment"), "scale": {"name": settings.pop("scale")}, "upstream": {}}
    passes = 500 if config["scale"]["name"] == "paper" else 60
    config["data"] = {"name": "toy"}
    return Run({**config, "settings": settings, "optim": {"passes": passes}}, places(Path("results")), tuple(overrides))


@dataclass(frozen=True, eq=False)
class FakeRun(Run):
    """A run with an id and a record that are not those of its config."""

    given: str = ""
    file: Path = Path()

    @property
    def id(self) -> str:  # type: ignore[override]
        return self.given

    @property
    def record_path(self) -> Path:
        return self.file


def fake_run(name: str, file: Path, *overrides: str) -> FakeRun:
    return FakeRun({"name": file.parent.name, "upstream": {}}, places(file.parent), overrides, {}, name, file)


def upstream_of(run: Run) -> dict[str, Finished]:
    """What `ensure` hands to the run's task."""
    return {name: finish(below) for name, below in run.upstream.items()}
