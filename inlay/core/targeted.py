"""The settings of every method that is set into layers: which, and what trains beside them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import nn

from inlay.core import patterns
from inlay.core.adapter import Adapter
from inlay.core.config import AdapterConfig, plain
from inlay.core.errors import UserError

BY_LAYER = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""The fields of choosing modules that PEFT has in some methods' configurations only."""


@dataclasses.dataclass(frozen=True)
class Extra:
    """An adapter that a configuration sets somewhere beside those of its method.

    kind: None is the method's own. follows: the path of the site whose adapter this one computes
    with, where it has nothing of its own.
    """

    kind: type[Adapter] | None
    config: TargetedConfig
    follows: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetedConfig(AdapterConfig):
    """PEFT's fields for choosing modules."""

    target_modules: list[str] | str | None = None
    """Names or path ends of the modules to adapt, a regular expression over whole paths,
    "all-linear" for every linear layer but the head, or nothing for the model's usual ones."""
    exclude_modules: list[str] | str | None = None
    """Names or an expression of modules to leave out; wins over target_modules."""
    layers_to_transform: list[int] | int | None = None
    """Adapt only the layers with these indices."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers that layers_to_transform counts in, where it is not the first
    numbered list."""
    modules_to_save: list[str] | None = None
    """Names of modules of which a full copy is trained and saved with the adapter (a head)."""

    everywhere: ClassVar[bool] = True
    """Whether a recipe that names no modules means every linear layer; else the usual ones."""

    @property
    def usual(self) -> str:
        """The table of usual target_modules that is this configuration's: its method's."""
        return self.method

    rooted: ClassVar[bool] = False
    """Whether the adapter stands at the root of the model, at no layer in it."""

    by_site: ClassVar[Mapping[str, str]] = {}
    """Fields that map patterns of module paths to values -> the field these replace there."""

    def __post_init__(self) -> None:
        """Bring sets and tuples of names into lists; refuse what is no name or has no meaning."""
        super().__post_init__()
        for field in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            object.__setattr__(self, field, listed(field, getattr(self, field)))
        for field in self.by_site:
            value = getattr(self, field)
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise UserError(f"{field}={str(value)[:200]} must map module names to values")
            patterns.check_counts(field, value)
        object.__setattr__(self, "layers_to_transform", _numbers(self.layers_to_transform))
        by_expression = (
            isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        )
        if self.layers_to_transform is not None and by_expression:
            raise UserError(
                "layers_to_transform goes with a list of target_modules or all-linear; "
                f"put the layer numbers into the expression {self.target_modules!r}"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform "
                "to say which layers"
            )

    def at(self, site: str) -> Self:
        """Return the settings at `site`, the values that `by_site` gives it in their fields."""
        if not any(getattr(self, patterned) for patterned in self.by_site):
            return self
        here = copy.copy(self)  # its values were checked when the configuration was made
        for patterned, field in self.by_site.items():
            value = self.site_keys(patterned).first(site, getattr(self, field))
            object.__setattr__(here, field, value)
        return here

    def wanted(self, found: Mapping[str, nn.Module]) -> list[str] | str | None:
        """Return the target_modules meant among a model's modules by path; None: the usual."""
        del found
        return self.target_modules

    @property
    def repeats(self) -> Sequence[Sequence[int]]:
        """The ranges of its own layers that the model is to have instead, in their order."""
        return ()

    def parameters(self, found: Mapping[str, nn.Module]) -> Collection[str]:
        """Return the paths of the parameters adapted that are in no layer, of modules by path."""
        del found
        return ()

    def more(
        self, model: nn.Module, adapted: Collection[str], saved: Collection[str]
    ) -> Mapping[str, Extra]:
        """Return by module path what is set in beside the sites found, or in their place."""
        del model, adapted, saved
        return {}

    def site_keys(self, field: str) -> patterns.Keys[Any]:
        """Return the patterns in a field of `by_site`, sorted once for all sites."""
        made: dict[str, patterns.Keys[Any]] = self.__dict__.setdefault("_keys", {})
        if field not in made:
            made[field] = patterns.Keys(getattr(self, field))
        return made[field]


def listed(field: str, value: Any) -> Any:
    """Return a field of names as a list, a string or None as it is; UserError for what is none."""
    if isinstance(value, str) and field == "modules_to_save":
        return [value]
    if value is None or isinstance(value, str):
        return value
    named = isinstance(value, list | tuple | set | frozenset)
    if not named or not all(isinstance(v, str) and v for v in value):
        raise UserError(f"{field}={str(value)[:200]} must be a list of module names")
    patterns.check_counts(field, value)
    return plain(value)


def _numbers(value: Any) -> Any:
    if value is None:
        return None
    many = list(value) if isinstance(value, list | tuple | set | frozenset | range) else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in many):
        raise UserError(
            f"layers_to_transform={str(value)[:200]} must be a layer's number from 0, or a list"
        )
    return value if isinstance(value, int) else sorted(set(many))
