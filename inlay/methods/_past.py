"""Past keys and values for every layer: virtual tokens that only attention sees, as its cache.

V virtual tokens, L layers, H heads of keys (fewer than those of queries where they are grouped), d
the width of a head, D = H d. A table [V, 2 L D] has the keys and then the values of each layer; in
an encoder-decoder they are of the decoder's own attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor

from inlay.core.base import Base
from inlay.core.errors import UserError
from inlay.core.prompted import (
    PromptConfig,
    cache_part,
    is_twofold,
    shift_positions,
    takes_cache,
    widen_mask,
)
from inlay.methods._computed import Computed

_UNLIKE = ("per_layer_config", "global_head_dim", "kv_lora_rank")
"""Settings of models whose layers differ in the widths of keys, or keys and values do."""
_OTHERWISE = "take prompt_tuning or p_tuning, which stand before the model's input"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PastConfig(PromptConfig):
    """PEFT's fields of virtual tokens, where `token_dim` is D and `num_attention_heads` H."""

    def sizes(self, model: Any) -> dict[str, int]:
        """Return H, D and L of the part that reads the cache; UserError where there is none."""
        part = cache_part(model)
        if not takes_cache(part):
            raise UserError(
                f"{type(part).__name__} reads no past keys and values, which {self.method} needs: "
                + _OTHERWISE
            )
        config = model.config
        own = config.get_text_config(decoder=True)
        if any(own.to_dict().get(name) for name in _UNLIKE):
            raise UserError(
                f"model_type {config.model_type!r} has keys and values of different widths, which "
                f"{self.method} does not know: {_OTHERWISE}"
            )
        heads: int = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
        if getattr(own, "multi_query", False) and not getattr(own, "new_decoder_architecture", 0):
            heads = 1
        told = (getattr(own, name, None) for name in ("head_dim", "d_kv"))
        wide: int = next(filter(None, told), own.hidden_size // own.num_attention_heads)
        return super().sizes(model) | {
            "token_dim": heads * wide,
            "num_attention_heads": heads,
            "num_layers": len(empty_cache(model)),
        }

    def filled(self, model: Any) -> Self:
        """Return the configuration with what is unset taken from the model's; checked."""
        whole = super().filled(model)
        for name, own in self.sizes(model).items():
            told = getattr(whole, name)
            alone = name == "num_transformer_submodules" and told == 1
            if told != own and not alone:
                raise UserError(f"{name}={told} is not the model's, {own}: leave it out")
        return whole


class Past(Computed):
    """A table of past keys and values, or what computes it."""

    past = True
    config: PastConfig

    def size(self) -> tuple[int, int]:
        """Return V and 2 L D."""
        config = self.config
        return self.count, 2 * (config.num_layers or 1) * (config.token_dim or 1)

    def make(self, base: Base) -> None:
        """Make the table, or what computes it."""
        super().make(base)
        # of an encoder-decoder's files PEFT gives layer i the keys and values 2 i (modulo L)
        self._step = self.config.num_transformer_submodules or 1

    def edit(
        self,
        model: Any,
        call: dict[str, Any],
        count: int,
        virtual: Tensor | None,
        shown: Tensor | None = None,
    ) -> None:
        """Put the keys and values into a call's cache, and count them in mask and positions."""
        given: Any = call.get("inputs_embeds")
        real: Any = call.get("input_ids") if given is None else given
        _no_checkpointing(model)
        cache = call.get("past_key_values")
        held = 0 if cache is None else int(cache.get_seq_length())
        if virtual is not None:
            cache = empty_cache(model) if cache is None else cache
            self._write(cache, virtual.to(real.device, _dtype(model, given)))
            call["past_key_values"] = cache
            held += count
        widen_mask(call, count, held + real.shape[1], shown)
        shift_positions(call, count, False, shown)

    def _write(self, cache: Any, virtual: Tensor) -> None:
        """Write the rows of a table [B, V, 2 L D] into a cache."""
        if cache.is_compileable:
            raise UserError(
                "a cache of fixed size has no room for past keys and values: leave "
                "cache_implementation out"
            )
        layers, heads = self.config.num_layers or 1, self.config.num_attention_heads or 1
        parts = virtual.view(*virtual.shape[:2], 2 * layers, heads, -1).permute(2, 0, 3, 1, 4)
        own = getattr(cache, "self_attention_cache", cache)
        for layer in range(layers):
            at = 2 * (layer * self._step % layers)
            own.update(parts[at], parts[at + 1], layer)


def empty_cache(model: Any) -> Any:
    """Return a cache without tokens for the part of the model that reads one."""
    from transformers import DynamicCache, EncoderDecoderCache

    part = cache_part(model)
    cache = DynamicCache(config=getattr(part, "config", model.config))
    if any(not hasattr(layer, "is_sliding") for layer in cache.layers):
        raise UserError(
            f"model_type {model.config.model_type!r} has layers without keys and values: "
            + _OTHERWISE
        )
    return EncoderDecoderCache(cache, DynamicCache()) if is_twofold(model) else cache


def cached_table(cache: Any, count: int) -> Tensor:
    """Return the first `count` tokens of a cache of one row as a table [count, 2 L D]."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    both = [states for layer in layers for states in (layer.keys, layer.values)]
    if any(states is None or len(states) != 1 or states.shape[2] < count for states in both):
        raise UserError(f"the cache must hold one row of {count} tokens or more in every layer")
    return torch.cat([states[0, :, :count].transpose(0, 1).flatten(1) for states in both], 1)


def _dtype(model: Any, embedded: Tensor | None) -> torch.dtype:
    found: torch.dtype = model.dtype if embedded is None else embedded.dtype
    return found


def _no_checkpointing(model: Any) -> None:
    """Raise UserError where layers are computed anew in the backward pass, which takes no cache."""
    if not (model.training and torch.is_grad_enabled()):
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UserError(
            "gradient checkpointing drops the cache that holds the past keys and values: set "
            "gradient_checkpointing: false (model.gradient_checkpointing_disable()), and a smaller "
            "micro_batch_size where memory is short"
        )
