"""The kinds of layer an adapter can be set into, one file a kind; `view` finds a module's.

A file states its views as `LAYERS`, the most particular first, and as `SAMPLES` the layers that the
laws are tried on: name -> () -> (module, input). One whose name begins with _ is a part of others.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from inlay.core.base import Layer


@cache
def layers() -> tuple[type[Layer], ...]:
    """Return every view this package offers, `plain` last: it accepts whatever the others leave."""
    found = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    names = sorted(found, key=lambda n: n == "plain")
    return tuple(c for n in names for c in importlib.import_module(f"{__name__}.{n}").LAYERS)


def view(module: nn.Module) -> Layer:
    """Return the view of `module` that an adapter works with."""
    return next(layer for layer in layers() if layer.accepts(module))(module)
