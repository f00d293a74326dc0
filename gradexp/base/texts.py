"""Files that people write or edit (YAML, JSON), read so that a damaged one is an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from gradexp.base.errors import UserError


class Loader(yaml.CSafeLoader, get_yaml_loader()):  # type: ignore[misc]
    """Hydra's loader, which refuses a key that occurs twice, with libyaml's parser, which is several times as fast."""


def read_yaml(file: Path) -> Any:
    """The content of a YAML file. Raises UserError where it is missing, not YAML or not UTF-8, or names a key twice."""
    try:
        return yaml.load(read_text(file), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{_short(file)} is not YAML: {_line(error)}") from None


def read_json(file: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, which ends with `advice`, where it can't be read or holds no object."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} can't be read ({_line(error)}); {advice}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} can't be read (it holds no JSON object); {advice}")
    return content


def read_text(file: Path) -> str:
    """The text of a file. Raises UserError where it is missing or not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{_short(file)} is not UTF-8 ({_line(error)}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{_short(file)} can't be read ({error.strerror}); restore it with git") from None


def _short(file: Path) -> str:
    """The last three parts of a path, such as conf/table/2.1.yaml."""
    return "/".join(file.parts[-3:])


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
