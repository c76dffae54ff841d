"""The parameters that a module holds itself, where it is no layer: a mixture's experts, a router.

Seen as one vector [N]: all of them in their order, each flattened. Packed ones are dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from inlay.core.base import Host, PackedModule
from inlay.core.errors import UserError, nearest

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes in which a weight is what it says; narrower floats come with scales kept elsewhere."""


def raw(module: nn.Module) -> dict[str, Tensor]:
    """Return by name the parameters of plain floats that `module` holds itself."""
    found: dict[str, Tensor] = {}
    for name in shapes(module):
        own = module._parameters[name]
        found[name] = getattr(module, name) if own is None else own
    return found


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of these by name."""
    packed = module.stacks if isinstance(module, PackedModule) else {}
    found: dict[str, torch.Size] = {}
    for name, p in module._parameters.items():
        if p is None and name in packed:
            found[name] = packed[name]
        elif p is not None and p.dtype in PLAIN:
            found[name] = p.shape
    return found


def split(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return the parts of a vector [N] by name, in their shapes."""
    parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def joined(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the parts as one vector [N]."""
    return torch.cat([part.reshape(-1) for part in parts.values()])


def called(
    module: nn.Module,
    parts: Callable[[], Mapping[str, Tensor]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Return what `module` computes with parts() in the place of its own parameters.

    Where it holds packed ones, a gradient does not keep these numbers: its pass makes them again,
    and runs the module again.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(module, dict(parts()), args, kwargs)

    if torch.is_grad_enabled() and isinstance(module, PackedModule):
        return checkpoint(run, *args, use_reentrant=False, **(kwargs or {}))
    return run(*args, **(kwargs or {}))


def is_named(path: str, targets: Collection[str]) -> bool:
    """Return whether a parameter's path is one of the names, or ends in one."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def named(field: str, targets: Collection[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths of the parameters that `modules` by path hold themselves and are named.

    A module with adapters counts as the layer that it holds; a parameter by its first path.
    UserError where one of the names in `field` is no parameter's.
    """
    own: dict[str, Any] = {}
    for path, module in modules.items() if targets else ():
        plain = _plain(module)
        packed = plain.stacks if isinstance(plain, PackedModule) else {}
        held = {**plain._parameters, **packed}
        own |= {f"{path}.{name}": value for name, value in held.items() if value is not None}
    for target in targets:
        if not any(is_named(path, [target]) for path in own):
            last, known = target[:200].rpartition(".")[2], {p.rpartition(".")[2] for p in own}
            raise UserError(
                f"{field} names {target[:80]!r}, which no parameter of this model is called."
                f"{nearest(last, known)}"
            )
    found: dict[int, str] = {}
    for path, value in own.items():
        if is_named(path, targets):
            found.setdefault(id(value), path)
    return list(found.values())


def _plain(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, Host) else module
