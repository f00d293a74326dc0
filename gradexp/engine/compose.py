"""From overrides to the resolved config of a run, its upstream runs nested in it."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from joblib import Parallel, cpu_count, delayed
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from yaml import YAMLError

from gradexp.base.errors import UserError, nearest
from gradexp.base.files import draft_of
from gradexp.base.typed import check
from gradexp.engine import plugins
from gradexp.engine.run import HARDWARE, ROOT, Config, Paths, Run, RunConfig, Settings, hardware

CONF = ROOT / "conf"
CACHE = ROOT / "outputs" / "cache" / "configs"
FEW = 20  # up to so many configs are composed in this process alone
STATES = 4  # versions of conf/, the last ones, whose configs are kept on disk
PIXELS = ("normalise", "mean", "std", "size", "channels")  # of data: what a network must share with its upstream runs
ELSEWHERE = {  # names that other frameworks have: ours
    **dict.fromkeys(("max_epochs", "epochs", "num_epochs"), "optim.passes"),
    **dict.fromkeys(("max_steps", "iterations"), "optim.steps"),
    **dict.fromkeys(("gpus", "num_devices", "world_size"), "trainer.devices"),
    **{"bs": "optim.batch_size", "dataset": "data", "optimizer": "optim", "num_classes": "data.classes", "wandb": "logger"},
    **{"arch": "model", "num_workers": "trainer.threads", "device": "trainer.accelerator", "amp": "trainer.precision"},
}
PLAIN = re.compile(r"[\w./:@%+-]*")  # a string that Hydra takes without quotes
VARIABLE = re.compile(r"oc\.env:(\w+)")


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


def _plan(overrides: tuple[str, ...], config: Config, above: tuple[tuple[str, ...], ...] = ()) -> Run:
    """above: the overrides of the runs that stand on this one, by which a run that depends on itself is recognised."""
    check(RunConfig, config, f"experiment {config['name']}")
    _check_finite({key: value for key, value in config.items() if key not in HARDWARE})
    maps = ["maps"] if config.get("data", {}).get("removal") else []
    names = [*config["method"]["upstream"], *maps] if "method" in config else config["upstream"]
    _check_added(overrides, config, names)
    upstream = {name: _upstream(config, name, (*above, overrides)) for name in names}
    for name, run in upstream.items():
        if name != "maps":  # the images of the maps themselves are checked where the maps are opened
            _check_pixels(config, run.config, name)
        _check_held_out(config, run.config, name)
    nested = {name: {key: value for key, value in run.config.items() if key not in HARDWARE} for name, run in upstream.items()}
    missing = (
        f"experiment {config['name']} has no {{key}}, which its task reads; add it: +{{key}}=NAME, or `- /{{key}}: NAME` in "
        f"the defaults of its file"
    )
    sections = {
        part: Settings(value, f"{part}.{{key}} is missing, which the task reads; set it: +{part}.{{key}}=VALUE")
        for part, value in config.items()
        if isinstance(value, dict)
    }
    return Run(Settings(config | sections | {"upstream": nested}, missing), Paths.of(config), overrides, upstream)


def _check_added(overrides: Sequence[str], config: Config, names: Sequence[str]) -> None:
    """Raises UserError for an upstream run that a command adds to an experiment and that nothing uses.

    A teacher may be set for all methods of a sweep, also for those without one.
    """
    found = {match[1] for word in overrides if (match := re.match(r"\+{1,2}upstream\.(\w+)", word))}
    added = found - {"teacher", *names}
    own = tuple(word for word in overrides if word.startswith(("experiment=", "scale="))) if added else ()
    if own and (unused := sorted(added - set(_compose(own)["upstream"]))):
        user = f"method {config['method']['name']}" if "method" in config else f"experiment {config['name']}"
        advice = (
            f" A method uses what it lists: method.upstream=[{','.join([*names, unused[0]])}]" if "method" in config else ""
        )
        uses = ", ".join(names) or "no upstream run"
        raise UserError(f"upstream.{unused[0]} is set, but {user} uses {uses}{nearest(unused[0], names)}{advice}")


def _upstream(config: Config, name: str, above: tuple[tuple[str, ...], ...]) -> Run:
    choices = config["upstream"].get(name)
    if choices is None:
        user = f"method {config['method']['name']}" if "method" in config else "it"
        raise UserError(
            f"experiment {config['name']}: {user} needs a {name}, and upstream.{name} is not set; name the experiment that "
            f"makes it: +upstream.{name}.experiment=NAME"
        )
    if not isinstance(choices, dict):
        raise UserError(
            f"upstream.{name}={choices}: expected the settings of a run; name its experiment: "
            f"upstream.{name}={{experiment: NAME}}"
        )
    overrides = (*_as_overrides(choices), f"scale={config['scale']['name']}")
    if overrides in above:
        raise UserError(f"upstream.{name} of experiment {config['name']} depends on itself; choose another experiment")
    return _plan(overrides, _compose(overrides) | hardware(config), above)


def _check_finite(value: Any, where: str = "") -> None:
    """Raises UserError for a number that is nan or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value}: it should be a finite number")
    if isinstance(value, dict) and (numbers := [key for key in value if not isinstance(key, str)]):
        raise UserError(f"{where}: the key {numbers[0]!r} is no text, as a record in JSON needs it; put it in quotes")
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


def _check_held_out(config: Config, upstream: Config, name: str) -> None:
    """Raises UserError where a network was trained on images that are held out here."""
    here, there = config.get("data", {}), upstream.get("data", {})
    held_out = here.get("validation")
    if held_out and there.get("name") == here.get("name") and there.get("validation") != held_out:
        raise UserError(
            f"data.validation={held_out} holds images out, and upstream.{name} is of a training with them; "
            f"hold out the same: +upstream.{name}.data.validation={held_out}"
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
            text = f'"{value}"' if isinstance(value, str) and not PLAIN.fullmatch(value) else value
            words.append(f"{'++' if name.startswith('upstream.') else ''}{name}={text}")  # upstream may have any keys
    return words


# --- composition by Hydra ---------------------------------------------------------------------------------


@cache
def _compose(overrides: tuple[str, ...]) -> Config:
    """The resolved config; kept on disk, as Hydra takes a tenth of a second for each and a report names hundreds of runs."""
    file = _cache_file(overrides)
    with suppress(OSError, EOFError, ValueError, zlib.error):  # missing or damaged
        return json.loads(gzip.decompress(file.read_bytes()))
    config = _compose_anew(overrides)
    with suppress(OSError):
        for folder in sorted(CACHE.glob("*"), key=lambda folder: folder.stat().st_mtime)[:-STATES]:
            shutil.rmtree(folder, ignore_errors=True)
        draft = draft_of(file)
        draft.write_bytes(gzip.compress(json.dumps(config).encode(), 1))
        draft.replace(file)  # without a sync: a damaged file is composed again
    return config


def compose_ahead(commands: Iterable[Sequence[str]], extra: Sequence[str] = ()) -> None:
    """Composes the configs of many runs on all cores and keeps them on disk, where `plan` finds them."""
    absent = [words for words in dict.fromkeys(map(tuple, commands)) if not _cache_file((*words, *extra)).exists()]
    if len(absent) > FEW and cpu_count() > 1:
        size = math.ceil(len(absent) / (4 * cpu_count()))  # neighbours share groups, which are composed once in a process
        parts = [absent[start : start + size] for start in range(0, len(absent), size)]
        Parallel(cpu_count())(delayed(_plan_quietly)(part, tuple(extra)) for part in parts)


def _plan_quietly(commands: Sequence[tuple[str, ...]], extra: tuple[str, ...]) -> None:
    for words in commands:
        with suppress(UserError):  # which whoever needs the run raises again
            plan(words, extra)


def _cache_file(overrides: tuple[str, ...]) -> Path:
    """Where a config is kept on disk, named by all that it comes from: conf/, this module, overrides, the environment."""
    sources = _sources(conf_folders())
    environment = {name: os.environ.get(name) for name in VARIABLE.findall(sources + " ".join(overrides))}
    state, key = (hashlib.sha256(text.encode()).hexdigest() for text in (sources, json.dumps([overrides, environment])))
    return CACHE / state / f"{key}.json.gz"


@cache
def _sources(folders: tuple[Path, ...]) -> str:
    files = [Path(__file__), *(file for folder in folders for file in sorted(folder.rglob("*.yaml")))]
    texts = [f"{file.name} of {file.parent.name}\n{file.read_text(encoding='utf-8', errors='replace')}" for file in files]
    return "\n".join([version("hydra-core"), version("omegaconf"), *texts])


def _compose_anew(overrides: tuple[str, ...]) -> Config:
    """The resolved config. Raises UserError for whatever Hydra or OmegaConf refuse."""
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
    except UnicodeError as error:
        raise UserError(f"{_not_utf_8() or 'a file of conf/'} is not UTF-8: {error}") from error
    except YAMLError as error:
        raise UserError(f"a file of conf/ is not YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _refusal(error) or UserError(_explain(error, overrides)) from error
    except ValueError as error:  # of Hydra, for a choice of a group that is no text, such as model=null
        raise UserError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}") from error
    return resolved


def _not_utf_8() -> Path | None:
    """A file of the configs that is not text."""
    for file in (file for folder in conf_folders() for file in folder.rglob("*.yaml")):
        try:
            file.read_text(encoding="utf-8")
        except UnicodeError:
            return file
    return None


def _refusal(error: BaseException | None) -> UserError | None:
    """The UserError that a resolver raised, out of the error that OmegaConf or Hydra made of it. A Ctrl-C is raised again."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
        if isinstance(error, KeyboardInterrupt):
            raise error
    return error


@cache
def _by_hydra(overrides: tuple[str, ...]) -> DictConfig:
    """The config that Hydra composes, interpolations not resolved. Do not modify it.

    Raises UserError where a chosen file configures Hydra, whose callbacks may call anything, or sets a folder: an experiment
    from somebody else must not do so; a user may on the command line.
    """
    own = tuple(word for word in overrides if word.lstrip("+~").startswith("paths."))
    config = _including_hydra(overrides)
    settings, plain = _settings(config), _plain_settings(own)
    for key in settings:
        if settings[key] != plain.get(key):
            raise UserError(
                f"{' '.join(overrides)}: a file of conf/ sets {key}, which only conf/config.yaml may; "
                f"remove it there, or set it on the command line"
            )
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    OmegaConf.set_struct(config, True)  # as Hydra's
    return config


@cache
def _plain_settings(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The same where no experiment is chosen: what conf/config.yaml and the command line set."""
    return _settings(_including_hydra(("~experiment", *overrides)))


def _including_hydra(overrides: tuple[str, ...]) -> DictConfig:
    """The config that Hydra composes, with the settings of Hydra itself as `hydra`."""
    with hydra_on_conf():
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def _settings(config: DictConfig) -> dict[str, Any]:
    """{dotted name: value} of `hydra`, without what Hydra itself fills in, and of `paths`."""
    parts: Any = {part: OmegaConf.to_container(config[part]) for part in ("hydra", "paths")}
    for filled in ("overrides", "runtime"):
        parts["hydra"].pop(filled)
    for filled in ("override_dirname", "name"):  # `name` is `app` before Hydra's main and `run` inside
        parts["hydra"]["job"].pop(filled)
    return {f"{part}.{key}": value for part, settings in parts.items() for key, value in settings.items()}


@contextmanager
def hydra_on_conf() -> Iterator[ConfigLoader]:
    """Hydra on conf/; its loader of configs. Inside a run of Hydra's, this is the one of that run."""
    with nullcontext() if GlobalHydra.instance().is_initialized() else initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _with_values(overrides: tuple[str, ...]) -> DictConfig | None:
    """The same config as of `_by_hydra`: values set on the config of the groups, which many runs share, in Hydra's order.

    None where only Hydra can do it. It saves the tenth of a second that Hydra takes for a config.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [word for word in parsed if "." in word.key_or_group or not _is_group(word.key_or_group)]
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


def conf_folders() -> tuple[Path, ...]:
    """conf/, and those of the packages of the user's own."""
    return CONF, *plugins.own_conf_folders()


def _is_group(key: str) -> bool:
    return any((folder / key).is_dir() for folder in conf_folders())


def _missing_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return str(error).splitlines()[0]
    files = {file.stem for folder in conf_folders() for file in (folder / group).glob("*.yaml")}
    options = sorted(name for name in files if name.startswith("_") == choice.startswith("_"))
    return f"{group}={choice}: there is no conf/{group}/{choice}.yaml{nearest(choice, options)} Available: {', '.join(options)}"


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
        groups = [] if parent else [folder.name for conf in conf_folders() for folder in conf.iterdir() if folder.is_dir()]
        if name in names or key in groups:
            return f"{override}: {text}"
        return f"{override}: there is no key {key}{_hint(key, config) or nearest(name, [*names, *groups])}"
    if "You must specify 'experiment'" in text:
        experiments = sorted(file.stem for folder in conf_folders() for file in (folder / "experiment").glob("[!_]*.yaml"))
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


# --- resolvers, with which conf/ computes settings from others --------------------------------------------


def by_scale(values: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """The entry of `values`, {scale: value}, for the run's scale, such as `${by_scale:{paper: 500, cpu: 12, quick: 8}}`.

    In a defaults list it chooses the file of a group. Raises UserError where `values` has no entry for the scale.
    """
    scale = _root_["scale"]
    name = scale if isinstance(scale, str) else scale["name"]  # a defaults list knows choices of groups only
    if name not in values:
        known = ", ".join(f"{key}: {value}" for key, value in values.items())
        raise UserError(f"scale={name}: by_scale:{{{known}}} in conf/ has no value for it; add '{name}: VALUE' there")
    return values[name]


def longer(unit: str, passes: int, steps: int, per_class: int | None, classes: int, batch_size: int) -> int | None:
    """The longer of `passes` over the training subset and `steps`: its length if that is in `unit`, otherwise None.

    unit: `passes` or `steps`. per_class: images of each class; None for the whole data set, where `passes` are longer.
    """
    numbers = (classes, batch_size) if per_class is None else (per_class, classes, batch_size)
    if any(type(number) is not int or number < 1 for number in numbers):
        return passes if unit == "passes" else None  # build refuses the wrong setting
    longest = per_class is None or passes * math.ceil(per_class * classes / batch_size) > steps
    return {"passes": passes if longest else None, "steps": None if longest else steps}[unit]


def absolute(folder: str) -> str:
    """A folder of `paths`, relative ones from the repository, as in engine.run.Paths."""
    return str(ROOT / Path(folder).expanduser())


for resolver in (absolute, by_scale, longer):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
