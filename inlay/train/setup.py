"""What must hold before a run's first step, and what is put back after its last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.core.adapter import Adapter
from inlay.core.errors import UserError
from inlay.data.pack import check_packable
from inlay.model import checkpointing
from inlay.model.attention import packed_attention
from inlay.model.fast import inference
from inlay.model.offload import Offload, Streamed, offloaded, require_offload
from inlay.train.precision import device_of
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


def choose_packing(model: nn.Module, objective: Any, config: TrainConfig) -> tuple[Any, str | None]:
    """Return the objective, packing where nothing was said of it and it can; and why it cannot.

    That is None where it packs, where `config` says what is to be, and where the objective itself
    has no use for it. With a mask of all tokens by all tokens packed rows of like length take
    longer than padded ones, up to four times: then they are padded.
    """
    if config.packing is not None or not config.fast:
        return objective, None
    try:
        packing = replace(objective, packing=True)
    except UserError:
        return objective, None
    try:
        with packed_attention(model) as by_rows:
            require_isolation(model)
    except UserError as error:
        told = str(error).removeprefix("train.packing: ")
        return objective, told.removesuffix("set packing: false").rstrip(" ;:")
    except Exception as error:  # a model that does not like to be tried still trains, padded
        return objective, f"trying it failed with {type(error).__name__}: {error}"
    if not (by_rows or _varlen(model)):
        return objective, "its attention would compare each token with those of all packed rows"
    return packing, None


def _varlen(model: nn.Module) -> bool:
    # transformers hands positions that begin anew to these as lengths of rows
    named = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    return "flash_attention" in named


@torch.no_grad()
def require_isolation(model: nn.Module) -> None:
    """Raise UserError where packed rows see each other in `model`; tried on 2 rows of 8 tokens.

    Only trying tells: several architectures (OPT, Falcon, Bloom, ...) take position_ids that begin
    anew, and join the rows all the same.
    """
    check_packable(getattr(model, "config", None))
    # at its start an adapter may compute nothing yet, so that trying does not tell
    if any(isinstance(module, Adapter) and module.sees_rows for module in model.modules()):
        raise UserError(
            "train.packing: the adapter computes something of each row as a whole, which packed "
            "rows would share; set packing: false"
        )
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    words, device = embeddings.weight.shape[0], device_of(model)
    ids = (torch.arange(16, device=device) * 7919 + 1)[None] % words
    anew = torch.arange(8, device=device).repeat(2)[None]
    with inference(model):
        try:
            packed = model(input_ids=ids, position_ids=anew, use_cache=False).logits[0, 8:]
        except TypeError as error:
            raise UserError(
                f"train.packing: {type(model).__name__} takes no position_ids; set packing: false"
            ) from error
        alone = model(input_ids=ids[:, 8:], use_cache=False).logits[0]
        joined = model(input_ids=ids, use_cache=False).logits[0, 8:]
    leak, all_of_it = (float((one - alone).abs().max()) for one in (packed, joined))
    # in float32 rounding is a millionth of what a joined row differs by; in half precision, where
    # experts may be chosen anew, it is up to a tenth
    share = 1e-3 if packed.dtype == torch.float32 else 0.25
    if leak > share * all_of_it:
        raise UserError(
            f"train.packing: in {type(model).__name__} packed rows see each other (their outputs "
            f"change by {leak:.1e}, of {all_of_it:.1e} where rows are joined); set packing: false"
        )


@contextmanager
def training_mode(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Put `model` in training mode for a `with` block, checkpointing activations where wanted."""
    if config.offload_activations:
        require_offload(device_of(model))
    was_training = model.training
    # a model that checkpoints already does so as its owner chose, and still will afterwards
    already = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    wanted = config.gradient_checkpointing and not already
    if wanted:
        checkpointing.enable(model)
    model.train()
    try:
        with ExitStack() as stack:
            if config.offload_activations:
                offload = Offload(Streamed(device_of(model)))
                stack.enter_context(offloaded(model, offload))
            yield
    finally:
        model.train(was_training)
        if wanted:
            checkpointing.disable(model)
