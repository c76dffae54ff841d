"""PEFT's `prepare_model_for_kbit_training`: what is not packed in float32; checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.model import checkpointing, packing

M = TypeVar("M", bound=nn.Module)


def prepare_model_for_kbit_training(
    model: M,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> M:
    """Return `model`, changed in place: frozen, and its 16-bit parameters in float32.

    These are norms, embeddings and head: what runs through the layers is then in float32 too. A
    packed model checkpoints its activations, unless use_gradient_checkpointing is false;
    gradient_checkpointing_kwargs are those of torch's checkpoint (default: without reentry; with
    it the embeddings' outputs require a gradient). auto_clear_cache: give the memory of the 16-bit
    copies back to the GPU. For a loop of one's own, before `get_peft_model`; a recipe needs none of
    it. UserError for a model with adapters, or one that cannot checkpoint.
    """
    if any(isinstance(module, Inlaid) for module in model.modules()):
        raise UserError(
            "prepare_model_for_kbit_training freezes the whole model, adapters too: call it before "
            "get_peft_model"
        )
    if use_gradient_checkpointing and packing.count(model)[0]:
        given = dict(gradient_checkpointing_kwargs or {})
        given.setdefault("use_reentrant", False)
        checkpointing.enable(model, given)
        if given["use_reentrant"]:
            # else a layer whose inputs need no gradient is not computed again, and gets none
            model.enable_input_require_grads()  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model
