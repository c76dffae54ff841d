"""Virtual tokens: trained vectors at the model's own input, before the first real token.

B rows, T real tokens, V virtual ones, D width of the embeddings.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from inlay.core.adapter import Wrap
from inlay.core.base import Base, Kind
from inlay.core.errors import UserError
from inlay.core.targeted import TargetedConfig

USUAL_TOKENS = 20
"""Virtual tokens where num_virtual_tokens is unset: PEFT then fails."""
_AT_THE_INPUT = "virtual tokens stand before the model's input, at no layer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig(TargetedConfig):
    """PEFT's fields that all methods of virtual tokens share; those unset are the model's."""

    rooted = True
    everywhere = False
    unwritten = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    not_yet: ClassVar[dict[str, str]] = dict.fromkeys(unwritten, _AT_THE_INPUT)

    num_virtual_tokens: int | None = None
    """How many virtual tokens there are; unset = 20."""
    token_dim: int | None = None
    """Width of a virtual token; unset = the model's."""
    num_transformer_submodules: int | None = None
    """2 for an encoder-decoder, 1 for any other; unset = the model's."""
    num_attention_heads: int | None = None
    """Attention heads of the model; unset = the model's."""
    num_layers: int | None = None
    """Layers of the model; unset = the model's."""

    def __post_init__(self) -> None:
        """Check the numbers; UserError names the limit."""
        super().__post_init__()
        for name in (
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_attention_heads",
            "num_layers",
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= 1 << 20):
                raise UserError(f"{name}={value!r} must be a whole number from 1 to {1 << 20}")

    def filled(self, model: Any) -> Self:
        """Return the configuration with what is unset taken from the model's."""
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings"):
            raise UserError(
                f"{type(model).__name__} is no model of transformers: {self.method} needs its "
                "embeddings and configuration"
            )
        own = config.get_text_config() if hasattr(config, "get_text_config") else config
        twice = getattr(config, "is_encoder_decoder", False)
        told = {
            "num_virtual_tokens": USUAL_TOKENS,
            "token_dim": own.hidden_size,
            "num_transformer_submodules": 2 if twice else 1,
            "num_attention_heads": own.num_attention_heads,
            "num_layers": own.num_hidden_layers,
        }
        return self.replace(**{k: v for k, v in told.items() if getattr(self, k) is None})


class Virtual(Wrap):
    """An adapter at the root of a model, which changes what the model is called with."""

    on: ClassVar[frozenset[Kind]] = frozenset({"module"})
    config: PromptConfig

    @abstractmethod
    def virtual(self) -> Tensor:
        """Return the virtual tokens [V, D]."""

    def edit(self, call: dict[str, Any], virtual: Tensor, embed: Any, fresh: bool) -> None:
        """Change a call's arguments, so that the virtual tokens [B, V, D] come first.

        embed: ids -> embeddings. fresh: whether they are yet to be seen; where a cache holds them,
        only mask and positions count them.
        """
        ids, given = call.get("input_ids"), call.get("inputs_embeds")
        real: Any = ids if given is None else given
        count, width = virtual.shape[1], real.shape[1]
        if fresh:
            embedded = embed(ids) if given is None else given
            call["input_ids"] = None
            call["inputs_embeds"] = torch.cat([virtual.to(embedded), embedded], 1)
        cache = call.get("past_key_values")
        held = 0 if fresh or cache is None else int(cache.get_seq_length())
        _widen_mask(call, count, held + width + (count if fresh else 0))
        _shift_positions(call, count, fresh)
        if not fresh:
            return
        for name, fill in (("token_type_ids", 0), ("labels", -100)):
            value = call.get(name)
            if isinstance(value, Tensor) and value.shape == real.shape[:2]:
                call[name] = _in_front(value, count, fill)
        for name in ("logits_to_keep", "start_positions", "end_positions"):
            if isinstance(call.get(name), Tensor):
                call[name] = call[name] + count

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the root of a model calls `edit`."""
        raise TypeError(f"{type(self).__name__} stands at the root of a model alone")


def _in_front(value: Tensor, count: int, fill: int) -> Tensor:
    return torch.cat([value.new_full((len(value), count), fill), value], 1)


def _widen_mask(call: dict[str, Any], count: int, whole: int) -> None:
    mask = call.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UserError(
            "virtual tokens need an attention_mask of one row of tokens each [B, T]: compiled "
            "caches and masks of several dimensions are not supported"
        )
    if mask.shape[1] < whole:
        call["attention_mask"] = _in_front(mask, count, 1)


def _shift_positions(call: dict[str, Any], count: int, fresh: bool) -> None:
    for name in ("position_ids", "cache_position"):
        value = call.get(name)
        if value is None:
            continue
        alone = call.get("attention_mask") is None and value.ndim == 2
        if alone and bool((value[:, 1:] <= value[:, :-1]).any()):
            raise UserError(
                "virtual tokens stand before whole rows, so rows that are packed into one have "
                "none of their own: set packing: false"
            )
        value = value + count
        if fresh:
            first = torch.arange(count, device=value.device, dtype=value.dtype)
            value = torch.cat([first.expand(*value.shape[:-1], count), value], -1)
        call[name] = value


def word_embeddings(model: Any) -> Any:
    """Return a model's own input embeddings, below any adapter."""
    found = model.get_input_embeddings()
    return cast(Any, getattr(found, "base_layer", found))
