"""Norms and gated MLPs in one pass each, recognized by what they compute and not by their names.

A module is taken if it has the parts of such a block (a vector and an epsilon; two linears of one
shape, one back, a function) and if, fed what the model feeds it, the fast form gives the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.base import Host, is_bare
from inlay.kernels.elementwise import Gate, gated, rms_norm

NEAR = {torch.float32: 1e-5, torch.float64: 1e-5}
"""How far two forms may be apart, relative to the output; in half precision 0.02."""


@contextmanager
def fast_blocks(model: nn.Module, run: Callable[[], Any]) -> Iterator[list[nn.Module]]:
    """Let the blocks of `model` compute in one pass for a `with` block; yields those that do.

    run: makes one forward pass of the model, without gradient and dropout. Modules whose own
    parameters train are left alone, and so are those that were given a forward of their own.
    """
    found = recognized(model, run)
    for module, form in found.items():
        module.forward = form
    try:
        yield list(found)
    finally:
        for module, form in found.items():
            if vars(module).get("forward") is form:  # and not what was set over it meanwhile
                del module.forward


class Form:
    """The fast form of a module, in the place of its `forward`: compute(module, x, *given).

    Parts of the module are looked up in it at each call, for they may be hosted meanwhile, and a
    copy of the module (`copy.deepcopy`) has a form of its own.
    """

    def __init__(self, module: nn.Module, compute: Callable[..., Tensor], *given: Any) -> None:
        """Stand for the forward of `module`, as whose it is signed."""
        self.module, self.compute, self.given = module, compute, given
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module computes; with more than one tensor, by the module's own."""
        if len(args) == 1 and not kwargs:
            return self.compute(self.module, args[0], *self.given)
        return type(self.module).forward(self.module, *args, **kwargs)


def recognized(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, Form]:
    """Return the fast form of each module that has one, as proved on what `run` feeds it."""
    within = {child for m in model.modules() if isinstance(m, Host) for child in m.modules()}
    forms = {m: _forms(m) for m in model.modules() if m not in within and "forward" not in vars(m)}
    candidates = {module: found for module, found in forms.items() if found}
    proved: dict[nn.Module, Form] = {}
    wrong: set[nn.Module] = set()

    def prove(module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        fits = None
        if len(args) == 1 and not kwargs and isinstance(out, Tensor):
            tried = [proved[module]] if module in proved else candidates[module]
            fits = next((form for form in tried if _same(form(args[0]), out)), None)
        if fits is None:
            wrong.add(module)
        else:
            proved[module] = fits

    hooks = [m.register_forward_hook(prove, with_kwargs=True) for m in candidates]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {module: form for module, form in proved.items() if module not in wrong}


def _forms(module: nn.Module) -> list[Form]:
    """Return what `module` may compute, judged by its parts."""
    return _norms(module) or _mlps(module)


def _norms(module: nn.Module) -> list[Form]:
    names = [name for name, _ in module.named_parameters()]
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    frozen = isinstance(weight, Tensor) and weight.ndim == 1 and not weight.requires_grad
    if names != ["weight"] or not frozen or not isinstance(eps, float):
        return []
    return [Form(module, _norm, eps, plus_one) for plus_one in (False, True)]


def _norm(module: Any, x: Tensor, eps: float, plus_one: bool) -> Tensor:
    return rms_norm(x, module.weight, eps, plus_one=plus_one)


def _mlps(module: nn.Module) -> list[Form]:
    children = dict(module.named_children())
    linears = {n: _below(m) for n, m in children.items() if isinstance(_below(m), nn.Linear)}
    others = [name for name in children if name not in linears]
    function = _function(children[others[0]]) if len(others) == 1 else None
    if function is None:
        return []
    sizes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
    if len(linears) == 3:
        return [
            Form(module, _apart, gate, up, down, *others, function)
            for gate, up, down in permutations(linears)
            if sizes[gate] == sizes[up] == sizes[down][::-1]
        ]
    if len(linears) == 2:
        return [
            Form(module, _joint, both, down, *others, function)
            for both, down in permutations(linears)
            if sizes[both] == (2 * sizes[down][1], sizes[down][0])
        ]
    return []


def _apart(
    module: Any, x: Tensor, gate: str, up: str, down: str, act: str, function: Gate
) -> Tensor:
    parts = module._modules
    if not is_bare(parts[act]):
        return cast(Tensor, type(module).forward(module, x))
    return cast(Tensor, parts[down](gated(parts[gate](x), parts[up](x), function)))


def _joint(module: Any, x: Tensor, both: str, down: str, act: str, function: Gate) -> Tensor:
    parts = module._modules
    if not is_bare(parts[act]):
        return cast(Tensor, type(module).forward(module, x))
    gate, up = parts[both](x).chunk(2, dim=-1)
    return cast(Tensor, parts[down](gated(gate, up, function)))


def _below(module: nn.Module) -> Any:
    return module.base_layer if isinstance(module, Host) else module


def _function(module: nn.Module) -> Gate | None:
    """Return which of the known functions of a gate `module` computes."""
    if any(True for _ in module.parameters()) or any(True for _ in module.children()):
        return None
    x = torch.linspace(-9, 9, 61)
    with torch.no_grad():
        try:
            out = module(x)
        except (RuntimeError, TypeError):
            return None
    known: dict[Gate, Tensor] = {"silu": F.silu(x), "gelu": F.gelu(x, approximate="tanh")}
    for name, wanted in known.items():
        if isinstance(out, Tensor) and torch.allclose(out, wanted, rtol=1e-6, atol=1e-6):
            return name
    return None


def _same(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    apart = (found - wanted).float().norm()
    return bool(apart <= NEAR.get(wanted.dtype, 0.02) * wanted.float().norm())
