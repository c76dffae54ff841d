"""PEFT's name for the settings of any method, and their way to a folder and from one.

`save_pretrained` and `from_pretrained` of each configuration are in core, which knows no files.
This module, which `inlay` imports with the first configuration asked of it, hands them how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.checkpoint.adapter import PEFT_VERSION
from inlay.checkpoint.folder import CONFIG, fetch, parse_config, read_config, write_folder
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError
from inlay.core.targeted import TargetedConfig


class _AnyMethod(type):
    """Makes every method's configuration an instance of `PeftConfig`."""

    def __instancecheck__(cls, found: Any) -> bool:
        return isinstance(found, AdapterConfig)

    def __subclasscheck__(cls, found: type) -> bool:
        return issubclass(found, AdapterConfig)


class PeftConfig(metaclass=_AnyMethod):
    """The settings of any method: `isinstance(LoraConfig(), PeftConfig)` holds."""

    def __init__(self) -> None:
        """Refuse: settings are of one method."""
        raise TypeError(
            "PeftConfig has no method: use LoraConfig, or PeftConfig.from_pretrained(folder)"
        )

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path, *, revision: str | None = None
    ) -> AdapterConfig:
        """Return the settings in an adapter's folder, or in the hub's repository of that id."""
        return read_config(fetch(pretrained_model_name_or_path, revision))


class _Files:
    """Settings in PEFT's file."""

    def read(self, place: str | Path, revision: str | None) -> AdapterConfig:
        return PeftConfig.from_pretrained(place, revision=revision)

    def write(self, config: AdapterConfig, folder: str | Path) -> None:
        if Path(folder).is_file():
            raise UserError(f"{folder} is a file; settings are saved in a folder, as {CONFIG}")
        told = config.to_dict() | {"peft_version": config.peft_version or PEFT_VERSION}
        text = json.dumps(told, indent=2, sort_keys=True)
        write_folder(folder, {CONFIG: text.encode()})


AdapterConfig.files = _Files()


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """Return the configuration that a dictionary of PEFT's fields, `peft_type` among them, says."""
    return parse_config(config_dict, "the dictionary")


def targeted_config(config: AdapterConfig | Mapping[str, Any]) -> TargetedConfig:
    """Return `config`, or what a dictionary of PEFT's fields says; UserError for anything else."""
    if isinstance(config, Mapping):
        config = parse_config(config, "the configuration")
    if not isinstance(config, TargetedConfig):
        raise UserError(
            f"{type(config).__module__}.{type(config).__name__} is no configuration of inlay: "
            "use inlay.LoraConfig, or a dictionary with its fields and peft_type"
        )
    return config
