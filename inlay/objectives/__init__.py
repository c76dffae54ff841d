"""Objectives: what a run minimizes.

One file each; the file name is its name in a recipe (`objective: sft`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.objectives.base import Objective


class _ByFileName(Mapping[str, "type[Objective[Any]]"]):
    """The objectives of this package by file name; a file is imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Objective[Any]]:
        if name not in set(self):
            raise KeyError(name)
        found: type[Objective[Any]] = importlib.import_module(f"{__name__}.{name}").OBJECTIVE
        return found

    def __iter__(self) -> Iterator[str]:
        names = (module.name for module in pkgutil.iter_modules(__path__))
        return (name for name in sorted(names) if name not in ("base", "tokens"))

    def __len__(self) -> int:
        return len(list(iter(self)))


OBJECTIVES: Mapping[str, type[Objective[Any]]] = _ByFileName()
"""name -> class; `OBJECTIVES["sft"]()` is ready to train with."""
