"""Finds presets: those that come with the project, and the user's own YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lib.configs.preset import Preset, parse_preset, without_own_anatomy
from lib.configs.yaml_files import read_yaml
from lib.errors import ConfigError

PRESETS_FOLDER = Path(__file__).parent / "presets"
OF_OTHER_ANATOMY = frozenset({"labels", "channels", "modality", "intensity"})
"""Keys with which a preset may be about something that drawn body parts show, or that has no HU."""


def shipped_preset_names() -> list[str]:
    """Names of the presets that come with the project."""
    return sorted(path.stem for path in PRESETS_FOLDER.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """Load a preset that comes with the project.

    Raises:
        ConfigError: if there is none with this name.
    """
    return read_preset(_shipped_path(name))


def find_preset(name: str) -> Preset:
    """The preset with this name, or of this YAML file.

    Raises:
        ConfigError: if there is none.
    """
    return read_preset(Path(name)) if name.endswith((".yaml", ".yml")) else load_preset(name)


def read_preset(path: Path) -> Preset:
    """Read a preset from a YAML file; by default its name is the stem of the file name.

    With ``extends: NAME``, missing keys are taken from the shipped preset with that name; its recipe without drawn body
    parts and without changed organs if the file has labels or images of its own.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, or describes an invalid preset.
    """
    data = _read_mapping(path)
    base = _read_mapping(_shipped_path(str(data.pop("extends")))) if "extends" in data else {}
    if "training" in base and OF_OTHER_ANATOMY & data.keys():
        base["training"] = without_own_anatomy(base["training"])
    return parse_preset(base | {"name": path.stem} | data, source=f"preset file {str(path)!r}")


def _shipped_path(name: str) -> Path:
    if name not in shipped_preset_names():
        raise ConfigError(f"there is no preset {name!r}; valid: {', '.join(shipped_preset_names())}, or all")
    return PRESETS_FOLDER / f"{name}.yaml"


def _read_mapping(path: Path) -> dict[str, Any]:
    data = read_yaml(path, f"preset file {str(path)!r}")
    if not isinstance(data, dict):
        raise ConfigError(f"preset file {str(path)!r} holds {type(data).__name__}; valid: a mapping of preset keys")
    return data


def write_preset(path: Path, preset: Preset) -> None:
    """Write a preset as a YAML file for :func:`read_preset`."""
    data = preset.model_dump(mode="json", exclude_none=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
