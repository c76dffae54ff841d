"""The parameters that a module holds itself, where it is no layer: a mixture's experts, a router.

Seen as one vector [N]: all of them in their order, each flattened.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from inlay.core.base import Host
from inlay.core.errors import UserError, nearest

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes in which a weight is what it says; narrower floats come with scales kept elsewhere."""


def raw(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return by name the parameters of plain floats that `module` holds itself."""
    own = module._parameters.items()
    return {name: p for name, p in own if p is not None and p.dtype in PLAIN}


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of these by name."""
    return {name: p.shape for name, p in raw(module).items()}


def split(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return the parts of a vector [N] by name, in their shapes."""
    parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def joined(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the parts as one vector [N]."""
    return torch.cat([part.reshape(-1) for part in parts.values()])


def is_named(path: str, targets: Collection[str]) -> bool:
    """Return whether a parameter's path is one of the names, or ends in one."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def named(field: str, targets: Collection[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths of the parameters that `modules` by path hold themselves and are named.

    A module with adapters counts as the layer that it holds; a parameter by its first path.
    UserError where one of the names in `field` is no parameter's.
    """
    own = {
        f"{path}.{name}": parameter
        for path, module in (modules.items() if targets else ())
        for name, parameter in _plain(module)._parameters.items()
        if parameter is not None
    }
    for target in targets:
        if not any(is_named(path, [target]) for path in own):
            last, known = target[:200].rpartition(".")[2], {p.rpartition(".")[2] for p in own}
            raise UserError(
                f"{field} names {target[:80]!r}, which no parameter of this model is called."
                f"{nearest(last, known)}"
            )
    found: dict[int, str] = {}
    for path, parameter in own.items():
        if is_named(path, targets):
            found.setdefault(id(parameter), path)
    return list(found.values())


def _plain(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, Host) else module
