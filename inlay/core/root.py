"""The host at the root of a model: virtual tokens, put into each call before the model sees it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.base import Layer
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.core.prompted import Virtual
from inlay.core.selection import Selection

NAME = "virtual_tokens"
"""The child of the model that holds the adapters."""


class Root(Inlaid):
    """Adapters of a whole model, which is called, and generates, as its own object still.

    It is a child of the model, not around it: torch's forward hooks let it change the arguments.
    In an encoder-decoder the encoder's are changed, and the decoder is told of the longer input.
    """

    def __init__(self, base: Layer, selection: Selection) -> None:
        """Set the host into the model that `base` views, with no adapter yet."""
        nn.Module.__init__(self)
        self.adapters = nn.ModuleDict()
        self.base, self.selection = base, selection
        self.fast = {}
        self._kept = None
        model: Any = base.module
        self.training = model.training
        model.add_module(NAME, self)
        twice = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        parts = {model.get_encoder(): self._before, model.get_decoder(): self._below}
        hooked = parts if twice else {model: self._before}
        self._hooks = [
            part.register_forward_pre_hook(hook, with_kwargs=True) for part, hook in hooked.items()
        ]

    @property
    def base_layer(self) -> Any:  # type: ignore[override]
        """The model itself."""
        return self.base.module

    def close(self) -> None:
        """Take the host out of the model."""
        for hook in self._hooks:
            hook.remove()
        del self.base.module._modules[NAME]

    def _before(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = inspect.signature(part.forward).bind_partial(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        real: Any = (
            call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
        )
        groups = self._groups(real)
        if not groups:
            return None
        cache = call.get("past_key_values")
        fresh = cache is None or not cache.get_seq_length()
        for adapter, virtual in reversed(groups):
            adapter.edit(call, virtual, self.base.module.get_input_embeddings(), fresh)  # type: ignore[operator]
        return (), call

    def _below(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = inspect.signature(part.forward).bind_partial(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        mask, hidden = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
        if mask is None or hidden is None or mask.shape[1] >= hidden.shape[1]:
            return None
        more = mask.new_ones(len(mask), hidden.shape[1] - mask.shape[1])
        call["encoder_attention_mask"] = torch.cat([more, mask], 1)
        return (), call

    def _groups(self, real: Tensor) -> list[tuple[Virtual, Tensor]]:
        """Return each adapter that computes now, with its virtual tokens for all rows [B, V, D]."""
        chosen, rows = self.selection, len(real)
        held: dict[str, Virtual] = dict(self.adapters.items())  # type: ignore[arg-type]
        if chosen.merged:
            return []
        names = chosen.active if chosen.rows is None else tuple(dict.fromkeys(chosen.rows))
        here = [held[name] for name in names if name in held]
        if chosen.rows is None or len(names) == 1:
            return [(a, a.virtual().expand(rows, -1, -1)) for a in here]
        if not here:
            return []
        tokens = {name: held[name].virtual() for name in names if name in held}
        shapes = {(type(a), tuple(tokens[n].shape)) for n, a in held.items() if n in tokens}
        if len(here) < len(names) or len(shapes) > 1:
            raise UserError(
                "the rows of one batch must all have adapters of the same method with the same "
                f"number of virtual tokens, not {', '.join(names)}: run them in batches of their "
                "own"
            )
        out = next(iter(tokens.values())).new_empty(rows, *next(iter(shapes))[1])
        for name, index in chosen.groups(rows, real.device).items():
            out = out.index_copy(0, index, tokens[name].expand(len(index), -1, -1))
        return [(here[0], out)]
