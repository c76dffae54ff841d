"""A LoRA's two factors trained apart.      B [O, R], A [R, I], s the scale, g a gradient.

    LoRA+         lr_B = ratio * lr_A                     (Hayou, Ghosh and Yu, arXiv:2402.12354)
    LoRA-FA       A stays;  g_B <- g_B (A A^T)^+ / s^2    (Zhang et al., arXiv:2308.03303)
    Riemannian    g_A <- (B^T B + d)^-1 g_A;  g_B <- g_B (A A^T + d)^-1
                                                          (Zhang and Pilanci, arXiv:2402.02347)

LoRA-FA's step of B is the one whose update of the weight, s B A, comes nearest to that of full
fine-tuning; with A frozen, of a layer's input only A x [R] is kept for the backward pass. The
Riemannian gradients are those of the product B A, however its length is shared out; d damps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapter import Adapter
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.methods.lora import Lora

EMBEDDING_RATE = 1e-6
"""LoRA+'s learning rate for adapters on embeddings where none is given, as in PEFT."""
DAMPING = 1e-2
"""Of the Riemannian gradients where none is given, as in PEFT."""

Factors = Mapping[nn.Parameter, tuple[nn.Parameter, float]]
"""B -> (A, s)."""


def before_each_step(optimizer: torch.optim.Optimizer, turn: Callable[[], None]) -> None:
    """Let `turn` change the gradients whenever `optimizer` is about to step."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(given is not None for given in (*args[1:], *kwargs.values())):
            raise UserError("this optimizer takes no closure, which would compute gradients anew")
        turn()

    optimizer.register_step_pre_hook(hook)


@torch.no_grad()
def turn_to_full(factors: Factors) -> None:
    """Turn the gradient of each B for LoRA-FA."""
    for b, (a, scale) in factors.items():
        if b.grad is not None:
            b.grad = nearest_to_full(b.grad, a, scale)


@torch.no_grad()
def turn_to_product(factors: Factors, damping: float) -> None:
    """Turn the gradients of each A and B for the Riemannian step."""
    for b, (a, _) in factors.items():
        at_a, at_b = (
            torch.linalg.inv(square + damping * torch.eye(len(square)).to(square))
            for square in (_wide(b).T @ _wide(b), _wide(a) @ _wide(a).T)
        )
        if a.grad is not None:
            a.grad = (at_a @ a.grad.to(at_a.dtype)).to(a.dtype)
        if b.grad is not None:
            b.grad = (b.grad.to(at_b.dtype) @ at_b).to(b.dtype)


def nearest_to_full(gradient: Tensor, a: Tensor, scale: float) -> Tensor:
    """Return g (A A^T)^+ / s^2 of the gradient g [O, R] of B; in float32, where a step is small."""
    wide = _wide(a)
    # the rows of A may depend on one another (an orthogonal start): those get the shortest step
    inverse = torch.linalg.pinv(wide @ wide.T, hermitian=True)
    return (gradient.to(wide.dtype) @ inverse / scale**2).to(gradient.dtype)


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def factors_of(model: nn.Module) -> Factors:
    """Return B -> (A, s) of every LoRA in training, but for embeddings; UserError for none.

    On an embedding A starts at zero: frozen it would teach nothing.
    """
    found = {
        lora.lora_B: (lora.lora_A, lora.config.scaling)
        for host, adapter in adapters(model)
        if host.base.kind != "embedding"
        for lora in adapter.modules()
        if isinstance(lora, Lora) and lora.lora_B.requires_grad
    }
    if not found:
        raise UserError("this optimizer is for a LoRA in training, and there is none: take AdamW")
    return found


@contextmanager
def first_factors_frozen(model: nn.Module) -> Iterator[None]:
    """Keep every A that LoRA-FA leaves as it is from getting gradients, for a `with` block."""
    frozen = [a for a, _ in factors_of(model).values() if a.requires_grad]
    for a in frozen:
        a.requires_grad_(False)
    try:
        yield
    finally:
        for a in frozen:
            a.requires_grad_(True)


def rates(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], lr: float, ratio: float, embed: float
) -> dict[str, float]:
    """Return by name LoRA+'s multiple of `lr`: `ratio` for B and vectors, on embeddings another.

    UserError where there is no B.
    """
    embedded = {
        p
        for host, adapter in adapters(model)
        if host.base.kind == "embedding"
        for p in adapter.parameters()
    }
    found = {
        name: embed / lr if p in embedded else ratio if is_second(name) or p.ndim == 1 else 1.0
        for name, p in parameters.items()
    }
    if not any(is_second(name) for name in parameters):
        raise UserError(
            "LoRA+ sets the learning rate of a LoRA's B apart, and none is in training: leave "
            "loraplus_lr_ratio out"
        )
    return found


def is_second(name: str) -> bool:
    """Return whether a parameter of this name is the factor B of a LoRA or of its like."""
    return name.endswith("lora_B")


def adapters(model: nn.Module) -> Iterator[tuple[Inlaid, Adapter]]:
    """Yield each adapter with its host."""
    for host in model.modules():
        if isinstance(host, Inlaid):
            for adapter in host.adapters.values():
                yield host, adapter  # type: ignore[misc]
