"""PEFT's name for the settings of any method, and their way from a folder or a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.checkpoint.folder import fetch, parse_config, read_config
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
    def from_pretrained(model_id: str | Path, *, revision: str | None = None) -> AdapterConfig:
        """Return the settings in an adapter's folder, or in the hub's repository of that id."""
        return read_config(fetch(model_id, revision))


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
