"""From overrides to the resolved config of a run, its upstream runs nested in it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from yaml import YAMLError

from gradexp.base.errors import UserError, nearest
from gradexp.base.texts import read_text
from gradexp.base.typed import check
from gradexp.engine import config_cache
from gradexp.engine import resolvers as resolvers  # conf/ uses them
from gradexp.engine.registry import check_targets
from gradexp.engine.run import HARDWARE, ROOT, Config, Paths, Run, RunConfig, hardware

CONF = ROOT / "conf"
HYDRA_OPTIONS = (  # that take a value
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
)
PIXELS = ("normalise", "mean", "std", "size", "channels")  # of data: what a network must share with its upstream runs
ELSEWHERE = {  # names that other frameworks have: ours
    **dict.fromkeys(("max_epochs", "epochs", "num_epochs"), "optim.passes"),
    **dict.fromkeys(("max_steps", "iterations"), "optim.steps"),
    **dict.fromkeys(("gpus", "num_devices", "world_size"), "trainer.devices"),
    **{"bs": "optim.batch_size", "dataset": "data", "optimizer": "optim", "num_classes": "data.classes", "wandb": "logger"},
    **{"arch": "model", "num_workers": "trainer.threads", "device": "trainer.accelerator", "amp": "trainer.precision"},
}
BY_SCALE = re.compile(r"\$\{by_scale:[^$]*\}")  # one that depends on nothing but the scale
# A line, comments aside, that configures Hydra itself, or a header that puts a whole file there.
TO_HYDRA = re.compile(r"^[^#\n]*\bhydra\b.*$|^#\s*@package\s+hydra\b.*$", re.MULTILINE)


def compose_run(overrides: Sequence[str]) -> Config:
    """The resolved config of the run that `python run.py OVERRIDES` does."""
    return plan(overrides).config


def plan(overrides: Sequence[str], extra: Sequence[str] = ()) -> Run:
    """The run that `python run.py OVERRIDES` does, with its upstream runs.

    extra: overrides of hardware and paths, which are not part of the run's command.

    Each entry of `upstream` (experiment, model, ... as on a command line) becomes the config of that run at the same scale;
    entries that neither the method nor the data (saliency maps, for ROAR) need are dropped. A run without a method (one that
    evaluates a trained model) needs all of them.
    """
    return _plan(tuple(overrides), _compose((*overrides, *extra)))


def _plan(overrides: tuple[str, ...], config: Config) -> Run:
    check(RunConfig, config, f"experiment {config['name']}")
    _check_finite({key: value for key, value in config.items() if key not in HARDWARE})
    maps = ["maps"] if config.get("data", {}).get("removal") else []
    names = [*config["method"]["upstream"], *maps] if "method" in config else config["upstream"]
    upstream = {name: _upstream(config, name) for name in names}
    for name, run in upstream.items():
        if name != "maps":  # the images of the maps themselves are checked where the maps are opened
            _check_pixels(config, run.config, name)
    check_targets(config | {"upstream": {}})
    nested = {name: {key: value for key, value in run.config.items() if key not in HARDWARE} for name, run in upstream.items()}
    return Run(config | {"upstream": nested}, Paths.of(config), overrides, upstream)


def _upstream(config: Config, name: str) -> Run:
    choices = config["upstream"].get(name)
    if choices is None:
        user = f"method {config['method']['name']}" if "method" in config else "it"
        raise UserError(
            f"experiment {config['name']}: {user} needs a {name}, and upstream.{name} is not set; name the experiment that "
            f"makes it: +upstream.{name}.experiment=NAME"
        )
    overrides = (*_as_overrides(choices), f"scale={config['scale']['name']}")
    return _plan(overrides, _compose(overrides) | hardware(config))


def _check_finite(value: Any, where: str = "") -> None:
    """Raises UserError for a number that is nan or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value}: it should be a finite number")
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            _check_finite(below, f"{where}.{key}".removeprefix("."))


def _check_pixels(config: Config, upstream: Config, name: str) -> None:
    """Raises UserError where a network would get pixels in other units than it was trained on."""
    here, there = config.get("data", {}), upstream.get("data", {})
    for key in PIXELS:
        if there and here.get(key) != there.get(key):
            raise UserError(
                f"data.{key} is {here.get(key)}, and of upstream.{name}, which gets the same images, {there.get(key)}; "
                f"give both the same value: +upstream.{name}.data.{key}=..."
            )


def _as_overrides(choices: Config, prefix: str = "") -> list[str]:
    """{model: vgg9, optim: {passes: 3}} -> [model=vgg9, optim.passes=3].

    A group's choice and its keys together: {method: {choice: gradient_norm, module: x}} -> [method=gradient_norm, ...].
    Null leaves the value of the upstream experiment.
    """
    words: list[str] = []
    for key, value in choices.items():
        if isinstance(value, dict):
            words += _as_overrides(value, f"{prefix}{key}.")
        elif value is not None:
            name = prefix.removesuffix(".") if key == "choice" else prefix + key
            words.append(f"{'++' if name.startswith('upstream.') else ''}{name}={value}")  # upstream may have any keys
    return words


def check_overrides(arguments: Sequence[str]) -> list[Config]:
    """Composes the configs of a command line, with every value of a sweep once, before anything runs.

    Raises UserError with the nearest valid word for a misspelt key or choice.
    """
    check_hydra(CONF)
    after = zip(["", *arguments], arguments, strict=False)
    words = [word for before, word in after if not word.startswith(("-", "hydra")) and before not in HYDRA_OPTIONS]
    for word in words:
        if word.startswith("="):  # Hydra takes it for a group without a name
            raise UserError(_misformed(word))
    try:
        with _hydra() as loader:  # which lists the files that a glob matches
            values = [choices for choices in map(_choices, OverridesParser.create(loader).parse_overrides(words)) if choices]
    except OverrideParseException as error:
        raise UserError(_misformed(str(error.override))) from None
    except HydraException as error:
        raise UserError(str(error).splitlines()[0]) from None
    first = [choices[0] for choices in values]
    others = [[*first[:i], other, *first[i + 1 :]] for i, choices in enumerate(values) for other in choices[1:]]
    return [compose_run(overrides) for overrides in [first, *others]]


def _misformed(word: str) -> str:
    """What is wrong with an override that Hydra can't parse: it has no key, or its value must be quoted."""
    key, equals, value = word.partition("=")
    quoted, wrong = key + '="' + value.replace('"', '\\"') + '"', f"{word!r} is not of the form key=value"
    if not key or not equals:
        return wrong
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return wrong
    return f"{word}: Hydra takes such a value in double quotes; for a shell: {shlex.quote(quoted)}"


def check_hydra(conf: Path) -> None:
    """Raises UserError for a file other than conf/config.yaml that configures Hydra, whose callbacks may call anything.

    An experiment from somebody else must not do so; a user may on the command line.
    """
    for file in sorted(conf.rglob("*.yaml")):
        line = TO_HYDRA.search(read_text(file))
        if line and file != conf / "config.yaml":
            raise UserError(
                f"conf/{file.relative_to(conf)} configures Hydra ({line[0].strip()!r}), which only conf/config.yaml may; "
                f"remove that line, or set it on the command line"
            )


def refuse_many_devices(config: Config) -> None:
    """Raises UserError where each of several runs would take several devices."""
    trainer = config["trainer"]
    if trainer["devices"] != 1 or trainer["num_nodes"] != 1:
        raise UserError(
            f"trainer.devices={trainer['devices']} trainer.num_nodes={trainer['num_nodes']} is for one run at a time; "
            f"give each of several runs one device (trainer.devices=1), or start them one by one without -m"
        )


def refuse_copies(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises UserError where torchrun or srun started several copies of a command, which starts its processes itself."""
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


def _choices(override: Override) -> list[str]:
    """The override itself, one override for each value of a sweep, or none for a continuous sweep."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        return []
    choices = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    if not choices:
        raise UserError(f"{override.input_line}: nothing matches")
    return choices


@cache
def _compose(overrides: tuple[str, ...]) -> Config:
    config = config_cache.load(CONF, overrides)
    if config is None:
        config = _composed(overrides)
        config_cache.store(CONF, overrides, config)
    return config


def _composed(overrides: tuple[str, ...]) -> Config:
    try:
        composed = _with_values(overrides) or _by_hydra(overrides)
        resolved: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingConfigException as error:
        raise UserError(_missing_choice(error)) from error
    except InterpolationKeyError as error:
        missing = str(error).splitlines()[0].removeprefix("Interpolation key ").removesuffix(" not found")
        raise UserError(
            f"{error.full_key} takes its value from {missing}, which does not exist; choose a method that fits the experiment"
        ) from error
    except (YAMLError, UnicodeError) as error:
        raise UserError(f"a file of conf/ is not YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _refusal(error) or UserError(_explain(error, overrides)) from error
    return resolved


def _refusal(error: BaseException | None) -> UserError | None:
    """The UserError of a resolver, which OmegaConf and Hydra wrap in their own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


@cache
def _by_hydra(overrides: tuple[str, ...]) -> DictConfig:
    """The config that Hydra composes, interpolations not resolved. Do not modify it."""
    with _hydra():
        return _settle(compose("config", overrides=list(overrides)))


@contextmanager
def _hydra() -> Iterator[ConfigLoader]:
    """Hydra on conf/; its loader of configs. Inside a run of Hydra's, this is the one of that run."""
    with nullcontext() if GlobalHydra.instance().is_initialized() else initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _settle(config: Any) -> Any:
    """The config with by_scale's choices made, which many runs share: parsing them takes milliseconds each."""
    for key in config.keys() if isinstance(config, DictConfig) else range(len(config)):
        child = config._get_node(key)
        if isinstance(child, DictConfig | ListConfig):
            if isinstance(child._value(), dict | list):  # neither null nor an interpolation
                _settle(child)
        elif BY_SCALE.fullmatch(str(child._value())):
            config[key] = config[key]
    return config


def _with_values(overrides: tuple[str, ...]) -> DictConfig | None:
    """The same config as of `_by_hydra`: values set on the config of the groups, which many runs share, in Hydra's order.

    None where only Hydra can do it. It saves the tenth of a second that Hydra takes for a config.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [word for word in parsed if "." in word.key_or_group or not (CONF / word.key_or_group).is_dir()]
    if any(word.package or word.is_delete() or word.is_sweep_override() for word in values):
        return None
    config = deepcopy(_by_hydra(tuple(str(word.input_line) for word in parsed if word not in values)))
    try:
        for word in values:
            added = word.is_add() or word.is_force_add()
            if word.is_add() and OmegaConf.select(config, word.key_or_group, throw_on_missing=False) is not None:
                return None
            OmegaConf.update(config, word.key_or_group, word.value(), merge=True, force_add=added)
    except OmegaConfBaseException:
        return None  # Hydra raises the error
    return config


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = [option for option in error.options or [] if not option.startswith("_")]
    if not group:
        return str(error).splitlines()[0]
    hint = nearest(choice, options)
    return f"{group}={choice}: there is no conf/{group}/{choice}.yaml{hint} Available: {', '.join(options)}"


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error).splitlines()[0]
    for override in overrides:
        key = override.partition("=")[0]
        if f"'{key}'" not in text:
            continue
        parent, _, name = key.lstrip("+~").rpartition(".")
        config = _compose(tuple(word for word in overrides if word != override))
        known = OmegaConf.select(OmegaConf.create(config), parent) if parent else config
        names = list(known) if isinstance(known, Mapping) else []
        groups = [] if parent else [folder.name for folder in CONF.iterdir() if folder.is_dir()]
        if name in names or key in groups:
            return f"{override}: {text}"
        return f"{override}: there is no key {key}{_hint(key, config) or nearest(name, [*names, *groups])}"
    if "You must specify 'experiment'" in text:
        experiments = sorted(file.stem for file in (CONF / "experiment").glob("[!_]*.yaml"))
        return f"name an experiment: python run.py experiment=NAME, one of {', '.join(experiments)}"
    return text


def _hint(key: str, config: Config) -> str:
    """Where the config has what another framework calls `key`, or a key of the same last name; "" where nothing has."""
    words = key.split(".")
    first, last = words[0], words[-1]
    if first == "upstream":
        return f"; a value of an upstream run is added with a plus: +{key}=..."
    ours = ELSEWHERE.get(last) or ELSEWHERE.get(first)
    places = [ours] if ours else [place for place in _places(config) if place.rpartition(".")[2] == last]
    return f"; did you mean {' or '.join(places)}?" if 0 < len(places) < 4 else ""


def _places(config: Config, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys, but not those of upstream runs."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict) and key != "upstream":
            yield from _places(value, f"{prefix}{key}.")
