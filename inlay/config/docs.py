"""The docstrings below a dataclass's fields, which Python throws away, read from its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Return field name -> its docstring on one line, those of base classes included."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        if owner.__module__.startswith("inlay."):
            found |= _own(owner)
    return found


def _own(cls: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found
