"""aLoRA: W x_t, and s B A x_t for tokens t from an invocation on; `alora_invocation_tokens`.

Greenewald et al., arXiv:2504.12397.  In each row the tokens from the start of the last invocation,
a sequence of ids, on are adapted; those before it, or all where there is none, are the base's, so
that a cache of theirs serves every adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from inlay.core.adapter import Shared, Wrap
from inlay.core.base import Base, Kind
from inlay.core.errors import UserError
from inlay.core.selection import Selection
from inlay.methods.lora import Lora, LoraConfig


class Invoked(Shared):
    """Which tokens of a call are adapted; it remembers by cache the rows that were invoked."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """Look for `tokens`."""
        super().__init__()
        self._tokens = list(tokens)
        self._rows: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    @property
    def key(self) -> str:
        """What the tokens are called in a call's `said`: no other adapter's name."""
        return f"invocation {id(self)}"

    def ahead(
        self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], selection: Selection
    ) -> dict[str, Tensor]:
        """Return of each token [B, T] whether it is adapted."""
        del selection
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise UserError("aLoRA looks for its invocation among token ids: give input_ids")
        places: Any = kwargs.get("position_ids")
        alone = places is not None and places.ndim == 2 and kwargs.get("attention_mask") is None
        if alone and bool((places[:, 1:] <= places[:, :-1]).any()):
            raise UserError(
                "aLoRA adapts a row from its last invocation on, so rows that are packed into one "
                "have none of their own: set packing: false"
            )
        found, start = self._last(ids)
        adapted = found[:, None] & (torch.arange(ids.shape[1], device=ids.device) >= start[:, None])
        if model.training and torch.is_grad_enabled() and not bool(found.any()):
            warnings.warn(
                f"no row of a batch holds the invocation {self._tokens}: nothing trains on it",
                stacklevel=2,
            )
        cache = kwargs.get("past_key_values")
        if cache is not None:
            if cache.get_seq_length():
                before = self._before(cache, len(ids)).to(ids.device)
                adapted, found = adapted | (before & ~found)[:, None], found | before
            self._rows[cache] = found
        return {self.key: adapted}

    def _last(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each row of ids [B, T] whether the tokens are in it, and where last."""
        width = ids.shape[1] - len(self._tokens) + 1
        if width < 1:
            return ids.new_zeros(len(ids), dtype=torch.bool), ids.new_zeros(len(ids))
        here = (ids.unfold(1, len(self._tokens), 1) == ids.new_tensor(self._tokens)).all(-1)
        last = (here * torch.arange(1, width + 1, device=ids.device)).amax(1)
        return last > 0, last - 1

    def _before(self, cache: Any, rows: int) -> Tensor:
        before = self._rows.get(cache)
        if before is None or rows % len(before):
            raise UserError(
                "this cache was filled in calls that aLoRA did not see: give it, empty, to the "
                "first call too, past_key_values=DynamicCache(), with the adapter active"
            )
        return before.repeat_interleave(rows // len(before))


class ALora(Wrap):
    """The LoRA of one layer, for the tokens that are adapted."""

    on: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    config: LoraConfig

    def make(self, base: Base) -> None:
        """Make the LoRA."""
        self.lora = Lora(self.config, base, device=self._device)

    @classmethod
    def share(
        cls, config: Any, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Invoked:
        """Return what finds the tokens, for all layers."""
        del bases, device
        return Invoked(config.alora_invocation_tokens)

    def reset(self, base: Base) -> None:
        """Start the LoRA."""
        self.lora.reset(base)

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x), and the update where a token is adapted."""
        out: Tensor = base(x, *args, **kwargs)
        (shared,) = self._held
        assert isinstance(shared, Invoked)
        adapted = None if self.selection is None else self.selection.said(shared.key, x)
        if adapted is None:  # no call of the model: there are no ids to look at
            if self.training and torch.is_grad_enabled():
                raise UserError(
                    "a layer with aLoRA computes outside of a call of its model: where activations "
                    "are recomputed, pass context_fn=model.roster.selection.checkpoint_context"
                )
            return out
        if x.shape[:2] != adapted.shape:
            raise UserError(
                f"aLoRA adapts some of the tokens {list(adapted.shape)}, but {base.path!r} is fed "
                f"{list(x.shape)}: name layers that see every token"
            )
        share = self.lora.update(base, x).to(out.dtype)
        return out + torch.where(adapted[..., None], share, torch.zeros_like(share))

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the LoRA's keys."""
        return {key: (f"lora.{name}", s) for key, (name, s) in self.lora.keys(base).items()}
