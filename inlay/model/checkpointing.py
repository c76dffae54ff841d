"""Activation checkpointing of transformers' models.

Each layer is computed again in the backward pass, with the adapters it had in the forward pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import MethodType
from typing import Any

from torch import nn

from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid


def enable(model: nn.Module, arguments: dict[str, Any] | None = None) -> None:
    """Let the model checkpoint; `arguments` are those of torch's checkpoint.

    UserError where it cannot. Left out: without reentry, which needs no gradient of the inputs.
    """
    given = dict(arguments or {"use_reentrant": False})
    if given.get("use_reentrant") is False and "context_fn" not in given:
        # a method, so that a copy of the model has its own
        given["context_fn"] = MethodType(_contexts, model)
    _switch(model, "enable", given)
    if given.get("use_reentrant") is False:
        # transformers makes what the embeddings give require a gradient, which without reentry
        # nobody needs: layers below the lowest adapted one would be computed again for it
        _free_inputs(model)


def disable(model: nn.Module) -> None:
    """Let the model keep its activations again."""
    _switch(model, "disable")
    # with reentry, switching it on made the embeddings' outputs require a gradient, by a hook that
    # stays
    _free_inputs(model)


def _free_inputs(model: nn.Module) -> None:
    getattr(model, "disable_input_require_grads", lambda: None)()


def _contexts(model: nn.Module) -> Any:
    """Return the contexts of a layer's two passes; the model may have got adapters by now."""
    host = next((module for module in model.modules() if isinstance(module, Inlaid)), None)
    return (nullcontext(), nullcontext()) if host is None else host.selection.checkpoint_context()


def _switch(model: nn.Module, how: str, *arguments: Any) -> None:
    # transformers calls it activation_... in newer releases, where the older name warns
    for name in (f"activation_checkpointing_{how}", f"gradient_checkpointing_{how}"):
        method = getattr(model, name, None)
        if method is not None:
            method(*arguments)
            return
    raise UserError(
        f"{type(model).__name__} cannot checkpoint its activations; leave gradient checkpointing "
        "off (train.gradient_checkpointing: false), and take a smaller train.micro_batch_size"
    )
