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
    with placed(proved(model, run, _forms)) as modules:
        yield modules


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
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            return self.compute(self.module, args[0], *self.given)
        return type(self.module).forward(self.module, *args, **kwargs)


def proved(
    model: nn.Module,
    run: Callable[[], Any],
    forms: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], list[Form]],
) -> dict[nn.Module, Form]:
    """Return the fast form of each module that has one, as proved on what `run` feeds it.

    forms: what a module that is called with these arguments may compute.
    """
    within = {child for m in model.modules() if isinstance(m, Host) for child in m.modules()}
    found: dict[nn.Module, Form] = {}
    wrong: set[nn.Module] = set()

    def prove(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if module in wrong:
            return
        tried = [found[module]] if module in found else forms(module, args, kwargs)
        fits = next((form for form in tried if same(form(*args, **kwargs), out)), None)
        if fits is None:
            wrong.add(module)
            found.pop(module, None)
        else:
            found[module] = fits

    able = [m for m in model.modules() if m not in within and "forward" not in vars(m)]
    hooks = [module.register_forward_hook(prove, with_kwargs=True) for module in able]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def placed(forms: dict[nn.Module, Form]) -> Iterator[list[nn.Module]]:
    """Let modules compute by these forms for a `with` block; yields the modules."""
    for module, form in forms.items():
        module.forward = form
    try:
        yield list(forms)
    finally:
        for module, form in forms.items():
            if vars(module).get("forward") is form:  # and not what was set over it meanwhile
                del module.forward


def _forms(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Form]:
    """Return what `module` may compute, judged by its parts."""
    return (_norms(module) or _mlps(module)) if len(args) == 1 and not kwargs else []


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
    linears = {n: below(m) for n, m in children.items() if isinstance(below(m), nn.Linear)}
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


def below(module: nn.Module) -> Any:
    """Return the layer that a host stands for, or the module itself."""
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


def same(found: Any, wanted: Any) -> bool:
    """Return whether two outputs, tensors or tuples of them, are as near as two forms may be."""
    if isinstance(found, tuple) and isinstance(wanted, tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return found is wanted
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    apart = (found - wanted).float().norm()
    return bool(apart <= NEAR.get(wanted.dtype, 0.02) * wanted.float().norm())
