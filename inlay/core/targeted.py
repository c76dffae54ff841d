"""The settings of every method that is set into chosen layers: which modules, and what trains beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from inlay.core import patterns
from inlay.core.config import AdapterConfig, plain
from inlay.core.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetedConfig(AdapterConfig):
    """PEFT's fields for choosing modules."""

    target_modules: list[str] | str | None = None
    """Names or path ends of the modules to adapt, a regular expression over whole paths, "all-linear" for every linear
    layer but the head, or nothing for the usual ones of the model's type."""
    exclude_modules: list[str] | str | None = None
    """Names or an expression of modules to leave out; wins over target_modules."""
    layers_to_transform: list[int] | int | None = None
    """Adapt only the layers with these indices."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers that layers_to_transform counts in, where the first numbered list is not the one."""
    modules_to_save: list[str] | None = None
    """Names of modules of which a full copy is trained and saved with the adapter (a classification head)."""

    def __post_init__(self) -> None:
        """Bring sets and tuples of names into lists; refuse what is no name and combinations without a meaning."""
        super().__post_init__()
        for field in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            object.__setattr__(self, field, _listed(field, getattr(self, field)))
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            if self.target_modules != "all-linear":
                raise UserError(
                    "layers_to_transform goes with a list of target_modules or all-linear; "
                    f"put the layer numbers into the expression {self.target_modules!r}"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform to say which layers"
            )

    def pattern(self, by_pattern: Mapping[str, T], site: str, otherwise: T) -> T:
        """Return the first value whose key matches the end of `site`, or `otherwise`."""
        return patterns.first(by_pattern, site, otherwise)


def _listed(field: str, value: Any) -> Any:
    if isinstance(value, str) and field == "modules_to_save":
        return [value]
    if value is None or isinstance(value, str):
        return value
    value = plain(value)
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise UserError(f"{field}={value!r} must be a list of module names")
    return value
