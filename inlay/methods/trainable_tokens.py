"""Trainable tokens: the rows T of some tokens in place of the embedding's.   T [N, dim].

Of W [dim, vocab] the columns of the N tokens are exchanged; of an output head [vocab, dim], where
one is named or tied to the embedding, its rows.  For words that are new to a model: all else stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method, Reweight
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.numbers import check_whole
from inlay.core.targeted import BY_LAYER, Extra, TargetedConfig
from inlay.core.tied import Tied
from inlay.methods._tied import embedding, tied_to


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(TargetedConfig):
    """Trainable tokens' settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.TRAINABLE_TOKENS

    token_indices: list[int] = dataclasses.field(default_factory=list)
    """Ids of the tokens to train."""
    init_weights: bool = True
    """True: they start as they are in the base. False: random, for tests."""

    everywhere: ClassVar[bool] = False
    unwritten = (*BY_LAYER, "modules_to_save")

    def __post_init__(self) -> None:
        """Refuse ids that cannot be, and one given twice."""
        super().__post_init__()
        if not isinstance(self.token_indices, list | tuple):
            raise UserError(
                f"token_indices={self.token_indices!r:.200} must be a list of token ids"
            )
        for token in self.token_indices:
            check_whole("token_indices", token, least=0, most=2**31 - 1)
        if len(set(self.token_indices)) < len(self.token_indices):
            raise UserError(f"token_indices={self.token_indices!r:.200} names a token twice")
        object.__setattr__(self, "token_indices", list(self.token_indices))

    def filled(self, model: nn.Module) -> Self:
        """Return the settings with the model's input embedding, where no module is named."""
        return self if self.target_modules is not None else self.replace(target_modules=_own(model))

    def more(
        self, model: nn.Module, adapted: Collection[str], saved: Collection[str]
    ) -> dict[str, Extra]:
        """Return the layers tied to the input embedding, which follow it where it is adapted."""
        del saved
        first = _own(model)
        tied = tied_to(model) if first in adapted else []
        return {path: Extra(Tied, self, follows=first) for path in tied}


def _own(model: nn.Module) -> str:
    """Return the path of the input embedding; of a model that names none, the usual one."""
    try:
        return embedding(model)
    except UserError:
        return "embed_tokens"


class TrainableTokens(Reweight):
    """The rows of the trained tokens in one embedding, or head."""

    keeps_bias = True
    on = frozenset({"embedding", "linear"})
    carries = False
    config: TrainableTokensConfig
    index: Tensor

    def make(self, base: Base) -> None:
        """Make T [N, dim]; UserError where there is no token, or one that the layer has not."""
        tokens, (outputs, inputs) = self.config.token_indices, base.shape
        self._axis = 1 if base.kind == "embedding" else 0
        vocabulary, width = (inputs, outputs) if self._axis else (outputs, inputs)
        if not tokens:
            raise UserError("token_indices is empty: name the ids of the tokens to train")
        if max(tokens) >= vocabulary:
            raise UserError(
                f"token_indices names {max(tokens)}, and the layer has the ids 0 to "
                f"{vocabulary - 1}: call resize_token_embeddings first, or leave it out"
            )
        self.trainable_tokens_delta = self.parameter(len(tokens), width)
        # also where the parameters have no memory yet: no file holds it
        index = torch.tensor(tokens, device=base.device)
        self.register_buffer("index", index, persistent=False)

    def lent(self) -> dict[str, Tensor]:
        """Return T, which PEFT writes once more under a head that is tied."""
        return {"trainable_tokens_delta": self.trainable_tokens_delta.detach()}

    def reset(self, base: Base) -> None:
        """Start from the base's rows."""
        with torch.no_grad():
            if self.config.init_weights:
                rows = base.weight().index_select(self._axis, self.index)
                self.trainable_tokens_delta.copy_(rows.T if self._axis else rows)
            else:
                nn.init.normal_(self.trainable_tokens_delta)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W with the tokens' columns (rows in a head) exchanged, and the bias."""
        rows = self.trainable_tokens_delta.to(weight.dtype)
        return weight.index_copy(self._axis, self.index, rows.T if self._axis else rows), bias


METHOD = Method(TrainableTokensConfig, TrainableTokens)
