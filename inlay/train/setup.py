"""What must hold before a run's first step, and what is put back after its last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from inlay.core.errors import UserError
from inlay.train.settings import TrainConfig


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what requires a gradient, by name; a shared parameter once.

    Raises UserError where nothing does.
    """
    found = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if not found:
        raise UserError(
            "no parameter of the model requires a gradient, so nothing would be trained; "
            "add an adapter (get_peft_model), or load it with is_trainable=True"
        )
    return found


def require_fresh(folder: Path) -> None:
    """Raise UserError where `folder` holds checkpoints: those of two runs must not mix."""
    found = sorted(folder.glob("checkpoints/step-*"))
    if found:
        raise UserError(
            f"{folder} holds a run already ({found[0].name}, ...): "
            f"resume it, or give another output_dir"
        )


@contextmanager
def training_mode(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Put `model` in training mode for a `with` block, checkpointing activations where wanted."""
    was_training = model.training
    model.train()
    checkpointing = config.gradient_checkpointing and not getattr(
        model, "is_gradient_checkpointing", False
    )
    if checkpointing:
        _checkpoint_activations(model)
    try:
        yield
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        model.train(was_training)


def _checkpoint_activations(model: nn.Module) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise UserError(
            f"{type(model).__name__} cannot checkpoint its activations; "
            f"set train.gradient_checkpointing false "
            f"and a smaller train.micro_batch_size"
        )
    kwargs: dict[str, Any] = {"use_reentrant": False}
    selection = getattr(model, "selection", None)
    if selection is not None:
        # the backward pass must recompute with the adapters that the forward pass had
        kwargs["context_fn"] = selection.checkpoint_context
    enable(gradient_checkpointing_kwargs=kwargs)
