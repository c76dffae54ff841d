"""The methods, one short file each: the file name is the registry (`lora.py` is peft_type LORA)."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from inlay.core.adapter import Method
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError, nearest


@cache
def names() -> tuple[str, ...]:
    """Return every method's name, in lower case; a file `_x.py` is a part of one, not another."""
    files = (m.name for m in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in files if not name.startswith("_")))


def method(name: str) -> Method:
    """Return the method called `name` (any case); UserError names the nearest if there is none."""
    key = str(name).lower()
    if key not in names():
        raise UserError(
            f"unknown method {name!r}; there are {', '.join(names())}.{nearest(key, names())}"
        )
    found = importlib.import_module(f"{__name__}.{key}").METHOD
    assert isinstance(found, Method)
    return found


def method_of(config: AdapterConfig) -> Method:
    """Return the method a configuration belongs to."""
    return method(config.method)
