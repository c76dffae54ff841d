"""The host at the root of a model: virtual tokens, put into each call before the model sees it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.base import Layer
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.core.prompted import (
    Virtual,
    cache_part,
    input_part,
    is_twofold,
    spell_out,
    takes_cache,
)
from inlay.core.selection import Selection

Group = tuple[Virtual, int, Tensor | None, Tensor | None]
NAME = "virtual_tokens"
"""The child of the model that holds the adapters."""


class Root(Inlaid):
    """Adapters of a whole model, which is called, and generates, as its own object still.

    It is a child of the model, not around it: torch's forward hooks let it change the arguments.
    In an encoder-decoder the encoder's are changed, and the decoder is told of the longer input;
    a cache goes to the part that reads it.
    """

    def __init__(self, base: Layer, selection: Selection) -> None:
        """Set the host into the model that `base` views, with no adapter yet."""
        nn.Module.__init__(self)
        self.adapters = nn.ModuleDict()
        self.base, self.selection = base, selection
        self.fast = None
        self._kept = None
        model: Any = base.module
        self.training = model.training
        model.add_module(NAME, self)
        hooks = {part: [self._before] for part in (input_part(model), cache_part(model))}
        if is_twofold(model):
            hooks[model.get_decoder()].append(self._below)
        self._hooks = [
            part.register_forward_pre_hook(hook, with_kwargs=True)
            for part, own in hooks.items()
            for hook in own
        ]
        self._hooks += [part.register_forward_hook(self._after, with_kwargs=True) for part in hooks]

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
        here = self._here(part)
        if not here:
            return None
        given = call.get("inputs_embeds")
        real: Any = call.get("input_ids") if given is None else given
        cache = call.get("past_key_values")
        fresh = cache is None or not cache.get_seq_length()
        groups = self._groups(here, real, fresh)
        if any(shown is not None for *_, shown in groups):
            past = 0 if cache is None else int(cache.get_seq_length())
            spell_out(part, call, past and past - sum(count for _, count, *_ in groups))
        # what fills the cache comes last: an empty one is what the others know a start by
        for group in sorted(reversed(groups), key=lambda group: group[0].past):
            group[0].edit(self.base.module, call, *group[1:])
        return (), call

    def _after(
        self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Let the adapters finish an output; take out a cache that it was to have none of."""
        del args
        here = self._here(part).values()
        if not here or not isinstance(output, dict):
            return None
        for adapter in here:
            output = adapter.finish(output)
        unasked = kwargs.get("use_cache") is False and output.get("past_key_values") is not None
        if unasked and any(adapter.past for adapter in here):  # `generate` would go on with it
            output = type(output)(**{k: v for k, v in output.items() if k != "past_key_values"})
        return output

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

    def _here(self, part: nn.Module) -> dict[str, Virtual]:
        """Return by name the adapters that compute now and change what `part` is called with."""
        chosen, model = self.selection, self.base.module
        if chosen.merged:
            return {}
        held: dict[str, Virtual] = dict(self.adapters.items())  # type: ignore[arg-type]
        names = chosen.active if chosen.rows is None else tuple(dict.fromkeys(chosen.rows))
        return {
            name: held[name]
            for name in names
            if name in held
            and (cache_part(model) if held[name].past else input_part(model)) is part
        }

    def _groups(self, here: dict[str, Virtual], real: Tensor, fresh: bool) -> list[Group]:
        """Return adapters with their number of virtual tokens, these for all rows, and a mask."""
        rows = set(self.selection.rows or ())
        if len(rows) < 2:
            return [(a, a.count, a.rows(real) if fresh else None, None) for a in here.values()]
        kinds: dict[bool, dict[str, Virtual]] = {}
        for name, adapter in here.items():
            kinds.setdefault(adapter.past, {})[name] = adapter
        return [self._group(held, rows, real, fresh) for held in kinds.values()]

    def _group(self, here: dict[str, Virtual], rows: set[str], real: Tensor, fresh: bool) -> Group:
        """Return adapters of one kind as one, the tokens of each row before which it has none."""
        first, most = next(iter(here.values())), max(adapter.count for adapter in here.values())
        all_alike = len(here) == len(rows) and len({a.count for a in here.values()}) == 1
        model = self.base.module
        # an encoder's first position is often what is read of it
        masks = first.past or (takes_cache(model) and not is_twofold(model))
        if not all_alike and not masks:
            raise UserError(
                f"{type(model).__name__}: the rows of one batch must all have virtual "
                f"tokens of the same number before them, not {', '.join(sorted(rows))}: run them "
                "in batches of their own"
            )
        shown = torch.zeros(len(real), most, dtype=torch.bool, device=real.device)
        out: Tensor | None = None
        for name, index in self.selection.groups(len(real), real.device).items():
            if name not in here:
                continue
            missing = most - here[name].count
            shown[index, missing:] = True
            if fresh:
                with self.selection.alone(name, real, index):
                    tokens = here[name].rows(real.index_select(0, index))
                tokens = F.pad(tokens, (0, 0, missing, 0))
                out = tokens.new_zeros(len(real), *tokens.shape[1:]) if out is None else out
                out = out.index_copy(0, index, tokens)
        return first, most, out, None if all_alike else shown
