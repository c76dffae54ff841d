"""Virtual tokens: trained vectors at the model's own input, before the first real token.

B rows, T real tokens, V virtual ones, D width of the embeddings.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import abstractmethod
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

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
        told = {"num_virtual_tokens": USUAL_TOKENS, **self.sizes(model)}
        return self.replace(**{k: v for k, v in told.items() if getattr(self, k) is None})

    def sizes(self, model: Any) -> dict[str, int]:
        """Return what the model says of the fields that are its own."""
        config = model.config
        own = config.get_text_config() if hasattr(config, "get_text_config") else config
        return {
            "token_dim": own.hidden_size,
            "num_transformer_submodules": 2 if is_twofold(model) else 1,
            "num_attention_heads": own.num_attention_heads,
            "num_layers": own.num_hidden_layers,
        }


class Virtual(Wrap):
    """An adapter at the root of a model, which changes what the model is called with."""

    on: ClassVar[frozenset[Kind]] = frozenset({"module"})
    config: PromptConfig

    past: ClassVar[bool] = False
    """Whether the virtual tokens are keys and values of a cache: rows may then lack them."""

    @property
    def count(self) -> int:
        """V, how many virtual tokens a row has."""
        return self.config.num_virtual_tokens or USUAL_TOKENS

    @abstractmethod
    def virtual(self) -> Tensor:
        """Return the virtual tokens [V, D]."""

    def rows(self, real: Tensor) -> Tensor:
        """Return the virtual tokens of each row of `real`, [B, V, D]."""
        return self.virtual().expand(len(real), -1, -1)

    def edit(
        self,
        model: Any,
        call: dict[str, Any],
        count: int,
        virtual: Tensor | None,
        shown: Tensor | None = None,
    ) -> None:
        """Change a call's arguments, so that `count` virtual tokens come first.

        virtual: the tokens [B, V, D] where they are yet to be seen; None: a cache holds them, and
        only mask and positions count them. shown [B, V]: which of them a row has, None: all.
        """
        given: Any = call.get("inputs_embeds")
        real: Any = call.get("input_ids") if given is None else given
        cache = call.get("past_key_values")
        fresh = virtual is not None
        held = 0 if fresh or cache is None else int(cache.get_seq_length())
        if virtual is not None:
            embedded = model.get_input_embeddings()(real) if given is None else given
            call["input_ids"] = None
            call["inputs_embeds"] = torch.cat([virtual.to(embedded), embedded], 1)
        widen_mask(call, count, held + real.shape[1] + (count if fresh else 0), shown)
        shift_positions(call, count, fresh, shown)
        if not fresh:
            return
        for name, fill in (("token_type_ids", 0), ("labels", -100)):
            value = call.get(name)
            if isinstance(value, Tensor) and value.shape == real.shape[:2]:
                call[name] = _in_front(value, count, fill)
        for name in ("logits_to_keep", "start_positions", "end_positions"):
            if isinstance(call.get(name), Tensor):
                call[name] = call[name] + count
        if hasattr(model, "score"):
            _padding_first(call)

    def _put(self, name: str, value: Tensor) -> None:
        """Copy `value` into a parameter, giving it memory where it has none yet."""
        old = self.get_parameter(name)
        if not old.is_meta:
            old.data.copy_(value)
            return
        own = value.to(old.dtype, copy=True)
        self.register_parameter(name, nn.Parameter(own, requires_grad=old.requires_grad))

    def finish(self, output: Any) -> Any:
        """Return what the model returns, with what the adapter has to say to it; most: nothing."""
        return output

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the root of a model calls `edit`."""
        raise TypeError(f"{type(self).__name__} stands at the root of a model alone")


def _padding_first(call: dict[str, Any]) -> None:
    """Move padding before the virtual tokens: a decoder that classifies reads the last position.

    By ids it would find the last token before the padding; among embeddings it cannot.
    """
    mask = call.get("attention_mask")
    if mask is None or bool(mask[:, -1].all()):
        return
    order = mask.argsort(dim=1, stable=True)  # what is masked first, the rest in its order
    embedded = call["inputs_embeds"]
    call["inputs_embeds"] = embedded.gather(1, order[..., None].expand_as(embedded))
    call["attention_mask"] = mask = mask.gather(1, order)
    call["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)


def _in_front(value: Tensor, count: int, fill: int) -> Tensor:
    return torch.cat([value.new_full((len(value), count), fill), value], 1)


def widen_mask(call: dict[str, Any], count: int, whole: int, shown: Tensor | None = None) -> None:
    """Put `count` ones, or `shown` [B, V], before a call's mask of fewer than `whole` columns."""
    mask = call.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UserError(
            "virtual tokens need an attention_mask of one row of tokens each [B, T]: compiled "
            "caches and masks of several dimensions are not supported"
        )
    if mask.shape[1] < whole:
        more = mask.new_ones(len(mask), count) if shown is None else shown.to(mask)
        call["attention_mask"] = torch.cat([more, mask], 1)


def shift_positions(
    call: dict[str, Any], count: int, fresh: bool, shown: Tensor | None = None
) -> None:
    """Count a call's positions on by the virtual tokens of each row; where `fresh`, theirs join."""
    shift: Any = count if shown is None else shown.sum(1, keepdim=True)
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
        value = value + shift
        if fresh:
            first = torch.arange(count, device=value.device, dtype=value.dtype)
            if shown is not None:
                first = (shown.cumsum(1) - 1).clamp(min=0).to(value.dtype)
            value = torch.cat([first.expand(*value.shape[:-1], count), value], -1)
        call[name] = value


def spell_out(part: Any, call: dict[str, Any], past: int) -> None:
    """Give a call the mask and positions that it leaves to the model, `past` tokens being cached.

    Rows with virtual tokens of their own need them; UserError where a model takes no positions.
    """
    given: Any = call.get("inputs_embeds")
    real: Any = call.get("input_ids") if given is None else given
    rows, width = real.shape[:2]
    if call.get("attention_mask") is None:
        call["attention_mask"] = real.new_ones(rows, past + width, dtype=torch.long)
    # what sees only how far apart two tokens are has no positions
    relative = hasattr(part.config, "relative_attention_num_buckets")
    if call.get("position_ids") is None and not relative:
        if "position_ids" not in inspect.signature(part.forward).parameters:
            raise UserError(
                f"{type(part).__name__} takes no position_ids, so the rows of a batch cannot have "
                "virtual tokens of their own number: run them in batches of their own"
            )
        places = torch.arange(past, past + width, device=real.device)
        call["position_ids"] = places.expand(rows, -1)


def is_twofold(model: Any) -> bool:
    """Return whether a model is an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def input_part(model: Any) -> Any:
    """Return the part of a model that takes the input's embeddings."""
    return model.get_encoder() if is_twofold(model) else model


def cache_part(model: Any) -> Any:
    """Return the part of a model that takes a cache, or the one that would were there any."""
    if is_twofold(model):
        return model.get_decoder()
    return model if takes_cache(model) else getattr(model, "base_model", model)


def takes_cache(part: Any) -> bool:
    """Return whether a module can be called with past keys and values."""
    return "past_key_values" in inspect.signature(part.forward).parameters


def word_embeddings(model: Any) -> Any:
    """Return a model's own input embeddings, below any adapter."""
    found = model.get_input_embeddings()
    return cast(Any, getattr(found, "base_layer", found))


def check_width(model: Any, width: int | None) -> None:
    """Raise UserError unless virtual tokens of `width` go before the model's embeddings."""
    embeddings = word_embeddings(model)
    if not hasattr(embeddings, "weight"):
        raise UserError(
            f"{type(model).__name__} takes no tokens, so no virtual ones go before them: take a "
            "method of layers, such as lora"
        )
    own = embeddings.weight.shape[1]
    if width != own:
        raise UserError(
            f"token_dim={width} is not the width of the model's embeddings, {own}: leave it out"
        )
