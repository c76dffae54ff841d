"""Norms and gated MLPs in one pass each, recognized by what they compute and not by their names.

A module is taken if it has the parts of such a block (a vector and an epsilon; two linears of one
shape, one back, a function) and if, fed what the model feeds it, the fast form gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.base import Host
from inlay.kernels.elementwise import Gate, gated, rms_norm

Forward = Callable[[Tensor], Tensor]
NEAR = {torch.float32: 1e-5, torch.float64: 1e-5}
"""How far two forms may be apart, relative to the output; in half precision 0.02."""


@contextmanager
def fast_blocks(model: nn.Module, run: Callable[[], Any]) -> Iterator[list[nn.Module]]:
    """Let the blocks of `model` compute in one pass for a `with` block; yields those that do.

    run: makes one forward pass of the model, without gradient and dropout. Modules whose own
    parameters train are left alone, and so are those that were given a forward of their own.
    """
    found = recognized(model, run)
    for module, forward in found.items():
        module.forward = forward
    try:
        yield list(found)
    finally:
        for module in found:
            del module.forward


def recognized(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, Forward]:
    """Return the fast form of each module that has one, as proved on what `run` feeds it."""
    within = {child for m in model.modules() if isinstance(m, Host) for child in m.modules()}
    forms = {m: _forms(m) for m in model.modules() if m not in within and "forward" not in vars(m)}
    candidates = {module: found for module, found in forms.items() if found}
    proved: dict[nn.Module, Forward] = {}
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


def _forms(module: nn.Module) -> list[Forward]:
    """Return what `module` may compute, judged by its parts."""
    return _norms(module) or _mlps(module)


def _norms(module: nn.Module) -> list[Forward]:
    names = [name for name, _ in module.named_parameters()]
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    frozen = isinstance(weight, Tensor) and weight.ndim == 1 and not weight.requires_grad
    if names != ["weight"] or not frozen or not isinstance(eps, float):
        return []

    def form(*, plus_one: bool) -> Forward:
        # read anew at each call: the weight may be moved or replaced meanwhile
        return lambda x: rms_norm(x, module.get_parameter("weight"), eps, plus_one=plus_one)

    return [form(plus_one=False), form(plus_one=True)]


def _mlps(module: nn.Module) -> list[Forward]:
    children = list(module.children())
    linears = [child for child in children if isinstance(_below(child), nn.Linear)]
    others = [child for child in children if child not in linears]
    function = _function(others[0]) if len(others) == 1 else None
    if function is None:
        return []
    sizes = {m: (_below(m).out_features, _below(m).in_features) for m in linears}
    if len(linears) == 3:
        return [
            _apart(gate, up, down, function)
            for gate, up, down in permutations(linears)
            if sizes[gate] == sizes[up] == sizes[down][::-1]
        ]
    if len(linears) == 2:
        return [
            _joint(both, down, function)
            for both, down in permutations(linears)
            if sizes[both] == (2 * sizes[down][1], sizes[down][0])
        ]
    return []


def _apart(gate: nn.Module, up: nn.Module, down: nn.Module, function: Gate) -> Forward:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = down(gated(gate(x), up(x), function))
        return out

    return forward


def _joint(both: nn.Module, down: nn.Module, function: Gate) -> Forward:
    def forward(x: Tensor) -> Tensor:
        gate, up = both(x).chunk(2, dim=-1)
        out: Tensor = down(gated(gate, up, function))
        return out

    return forward


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
