"""Runs: one resolved config, one id, one record. Nothing here imports torch, so that tables and plans are quick."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeVar

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from gradexp.base.errors import UserError
from gradexp.base.ranges import Count, Probability, Seed
from gradexp.base.typed import FileName, check, strict
from gradexp.engine.record import HARDWARE as HARDWARE
from gradexp.engine.record import Config as Config
from gradexp.engine.record import Record, read_record
from gradexp.engine.record import identity as identity
from gradexp.engine.record import run_id as run_id

Value = TypeVar("Value")
Node = dict[str, Any]  # a `_target_` and its settings, which are checked against its declared types
DEFAULT_DATA = "data"  # as in conf/config.yaml; the only data root that need not exist
ROOT = Path(__file__).resolve().parents[2]


@strict
class DropoutConfig(TypedDict):
    """Dropout behind one layer (training/dropout.py)."""

    layer: str
    probability: Probability


@strict
class MethodConfig(TypedDict):
    """conf/method/."""

    name: str
    module: str
    upstream: list[str]
    terms: dict[str, Node]
    dropout: NotRequired[DropoutConfig | None]
    angle: NotRequired[str | None]


@with_config(ConfigDict(extra="allow", strict=True))
class EvaluateConfig(TypedDict):
    """conf/evaluate/; further keys are those of the score."""

    images: Count | None
    batch_size: NotRequired[Count]


@strict
class RunConfig(TypedDict):
    """The config of a run: conf/config.yaml, and the groups that an experiment adds to it."""

    name: FileName
    seed: Seed
    objective: str | None
    upstream: dict[str, Any]
    paths: dict[str, str]
    gradients: dict[Literal["backend"], Literal["fast", "autograd"]]
    scale: dict[str, Any]
    task: Node
    trainer: Node
    logger: Node
    data: NotRequired[Node]
    model: NotRequired[Node]
    method: NotRequired[MethodConfig]
    optim: NotRequired[Node]
    saliency: NotRequired[Node]
    evaluate: NotRequired[EvaluateConfig]
    launcher: NotRequired[Node]


@dataclass(frozen=True)
class Paths:
    """The folders of data, records and outputs that can be made again; relative paths start at the repository."""

    data: Path
    results: Path
    outputs: Path

    @classmethod
    def of(cls, config: Config) -> Paths:
        """The folders that a config names.

        Raises UserError for results or outputs that name no folder, for a link to nothing, and for a data root other than the
        default that does not exist.
        """
        named = config["paths"] | {"data": config["paths"].get("data") or DEFAULT_DATA}  # GRADEXP_DATA= is unset
        for name in ("results", "outputs"):
            if not named.get(name):
                raise UserError(f"paths.{name} names no folder; give one: paths.{name}=FOLDER")
        folders = {name: ROOT / Path(value).expanduser() for name, value in named.items()}
        for name, folder in folders.items():
            if gone := next((path for path in (folder, *folder.parents) if path.is_symlink() and not path.exists()), None):
                raise UserError(
                    f"paths.{name}={named[name]}: {gone} is a link to a folder that does not exist; is its disk mounted?"
                )
        if folders["data"] != ROOT / DEFAULT_DATA and not folders["data"].is_dir():
            raise UserError(
                f"paths.data={named['data']}: there is no such folder; name the one with the data sets "
                f"(GRADEXP_DATA=FOLDER or paths.data=FOLDER), or create it, and they are downloaded into it"
            )
        return cls(**folders)

    @property
    def cache(self) -> Path:
        return self.outputs / "cache"


class Settings(dict[str, Value]):
    """A dict that raises UserError when a missing key is read.

    missing: the message, with {key} in the place of the key.
    """

    def __init__(self, entries: Mapping[str, Value], missing: str) -> None:
        super().__init__(entries)
        self.missing = missing

    def __missing__(self, key: str) -> Value:
        raise UserError(self.missing.format(key=key))


def record_files(results: Path, name: str = "") -> list[Path]:
    """The records in a folder of results, and in its subfolder for `quick`, whose names begin with `name`.

    Other files, such as copies that a file manager made, are none: a record is called by its id.
    """
    files = [file for folder in (results, results / "quick") for file in sorted(folder.glob(f"runs/*/{name}*.json"))]
    return [file for file in files if re.fullmatch("[0-9a-f]{12}", file.stem)]


@dataclass(frozen=True, eq=False)
class Run:
    """One piece of work: its resolved config, its paths and its command.

    overrides: () for a run made from a config alone. below: its upstream runs; None to make them from the configs that are
    nested in its own.
    """

    config: Config
    paths: Paths
    overrides: tuple[str, ...] = ()
    below: Mapping[str, Run] | None = None

    @cached_property
    def id(self) -> str:
        return run_id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and (self.id, self.paths) == (other.id, other.paths)

    def __hash__(self) -> int:
        return hash(self.id)

    @cached_property
    def name(self) -> str:
        """The name of its experiment."""
        return str(check(FileName, self.config["name"], "name"))

    @property
    def command(self) -> str:
        return shlex.join(["python", "run.py", *self.overrides])

    @property
    def recorded_command(self) -> str | None:
        """The command without overrides of hardware and paths; None for a run made from a config alone."""
        words = [word for word in self.overrides if part_of(word) not in HARDWARE]
        return shlex.join(["python", "run.py", *words]) if words else None

    @cached_property
    def upstream(self) -> Settings[Run]:
        """Its upstream runs on the same hardware, by their names in its config. Reading another name raises UserError."""
        runs = self.below
        if runs is None:
            configs = self.config["upstream"]
            runs = {name: Run(config | hardware(self.config), self.paths) for name, config in configs.items()}
        advice = "name the experiment that makes it: +upstream.{key}.experiment=NAME"
        return Settings(runs, f"experiment {self.name} needs a {{key}}; {advice}")

    @property
    def record_path(self) -> Path:
        return self.paths.results / "runs" / self.name / f"{self.id}.json"

    @property
    def finished(self) -> bool:
        return self.record_path.exists()

    def record(self) -> Record | None:
        return read_record(self.record_path) if self.finished else None

    @property
    def folder(self) -> Path:
        """The folder of its checkpoint, weights and logs, which can all be deleted and made again."""
        return self.paths.outputs / "runs" / self.name / self.id

    @property
    def weights(self) -> Path:
        return self.folder / "weights.pt"

    @property
    def checkpoint(self) -> Path:
        """The state of an unfinished training."""
        return self.folder / "last.ckpt"

    @property
    def pieces(self) -> Path:
        """The folder of the finished pieces of an unfinished evaluation."""
        return self.folder / "pieces"


def part_of(override: str) -> str:
    """The part of a config that an override sets: `trainer` of `+trainer.devices=2`."""
    return re.split("[.=]", override.lstrip("+~"), maxsplit=1)[0]


def hardware(config: Config) -> Config:
    """The part of a config that its upstream runs share: where and how runs are executed."""
    return {key: config[key] for key in HARDWARE if key in config}
