"""The words of a command line, checked before anything runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException

from gradexp.base.errors import UserError
from gradexp.engine.compose import compose_run, hydra_on_conf
from gradexp.engine.run import Config


def check_overrides(arguments: Sequence[str]) -> list[Config]:
    """Composes the configs of a command line, with every value of a sweep once, before anything runs.

    Raises UserError with the nearest valid word for a misspelt key or choice.
    """
    given = get_args_parser().parse_known_args(arguments)[0].overrides
    _check_search(given)
    words = [word for word in given if not word.lstrip("+~").startswith("hydra")]
    misformed = """{!r} is not of the form key=value; a value with special characters is put in double quotes: 'key="a=b"'"""
    for word in words:
        if word.startswith("="):  # Hydra takes it for a group without a name
            raise UserError(misformed.format(word))
    try:
        with hydra_on_conf() as loader:  # which lists the files that a glob matches
            values = [choices for choices in map(_choices, OverridesParser.create(loader).parse_overrides(words)) if choices]
    except OverrideParseException as error:
        raise UserError(misformed.format(str(error.override))) from None
    except HydraException as error:
        raise UserError(str(error).splitlines()[0]) from None
    first = [choices[0] for choices in values]
    others = [[*first[:i], other, *first[i + 1 :]] for i, choices in enumerate(values) for other in choices[1:]]
    return [compose_run(overrides) for overrides in [first, *others]]


def _check_search(words: Sequence[str]) -> None:
    """Raises UserError for settings of a search that Optuna refuses with a traceback."""
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        value = value.strip("'\"")
        if key == "hydra.sweeper.n_trials" and not re.fullmatch("0*[1-9][0-9_]*", value):
            raise UserError(f"{word}: a search has a number of trials, 1 or more")
        if key == "hydra.sweeper.direction" and value not in ("maximize", "minimize"):
            raise UserError(f"{word}: it is maximize or minimize")


def _choices(override: Override) -> list[str]:
    """The override itself, one override for each value of a sweep, or none for a continuous sweep."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.is_interval_sweep():
        interval: Any = override.value()
        if interval.start > interval.end or ("log" in interval.tags and interval.start <= 0):
            raise UserError(
                f"{override.input_line}: an interval goes from a smaller to a larger number, on a log scale above 0"
            )
    if not override.is_discrete_sweep():
        return []
    choices = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    if not choices:
        raise UserError(f"{override.input_line}: nothing matches")
    return choices


def refuse_many_devices(config: Config) -> None:
    """Raises UserError where each of several runs would take several devices."""
    trainer = config["trainer"]
    if trainer["devices"] != 1 or trainer["num_nodes"] != 1:
        raise UserError(
            f"trainer.devices={trainer['devices']} trainer.num_nodes={trainer['num_nodes']} is for one run at a time; "
            f"give each of several runs one device (trainer.devices=1), or start them one by one without -m"
        )


def refuse_copies(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises UserError where torchrun or srun started several copies of this command: it starts its processes itself."""
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher, count, machines = "torchrun", int(environment["WORLD_SIZE"]), int(environment.get("GROUP_WORLD_SIZE", 1))
    else:
        launcher = "srun"
        count, machines = (int(environment.get(f"SLURM_STEP_NUM_{what}", 1)) for what in ("TASKS", "NODES"))
        if count == 1:
            return
    kept = [word for word in words if not word.startswith(("trainer=", "trainer.devices=", "trainer.num_nodes="))]
    wanted = ["trainer=ddp", f"trainer.devices={count // machines}"]
    wanted += [f"trainer.num_nodes={machines}"] if machines > 1 else []
    raise UserError(
        f"{launcher} started this command {count} times, which starts its processes itself; type it once, without {launcher}: "
        f"python run.py {shlex.join([*kept, *wanted])}"
    )
