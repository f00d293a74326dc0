"""Packages of a user's own, named in GRADEXP_PLUGINS: what they define may be built, and what their conf/ holds is found.

A package is trusted like the checkout: naming it is what allows a config to run its code.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from gradexp.base.errors import UserError

VARIABLE = "GRADEXP_PLUGINS"  # names of packages, separated by commas


def packages() -> dict[str, Path]:
    """{name: folder} of the packages. Raises UserError for one that can't be imported."""
    return dict(_folder(name.strip()) for name in os.environ.get(VARIABLE, "").split(",") if name.strip())


@cache
def _folder(name: str) -> tuple[str, Path]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{VARIABLE}={name}: there is no package {name}; install it, or name the folder that it is in: PYTHONPATH=FOLDER"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    for file in (folder / "conf").rglob("*.yaml"):
        if (Path(__file__).parents[2] / file.relative_to(folder)).exists() and file.name != "claims.yaml":
            raise UserError(f"{file} has the name of a file of gradexp's conf/, which would be taken instead; rename it")
    return name, folder


def own_conf_folders() -> list[Path]:
    """The folders conf/ of the packages that have one."""
    return [folder / "conf" for folder in packages().values() if (folder / "conf").is_dir()]


class PluginConfigs(SearchPathPlugin):
    """Hydra looks for a config in conf/ first, then in those of the packages."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in own_conf_folders():
            search_path.append("gradexp-plugins", f"file://{folder}")


Plugins.instance().register(PluginConfigs)
