"""Rows of tokens beside a LoRA: its field `trainable_token_indices`, by trainable tokens' file."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from inlay.core import patterns
from inlay.core.adapter import Reweight
from inlay.core.base import Base
from inlay.core.errors import UserError, nearest
from inlay.core.targeted import Extra
from inlay.core.tied import Tied
from inlay.methods._tied import embedding, paths, tied_to
from inlay.methods.trainable_tokens import TrainableTokens, TrainableTokensConfig


class TokenRows(Reweight):
    """Trainable tokens, under the name they have in a LoRA's file."""

    on = TrainableTokens.on
    carries = False
    keeps_bias = True
    config: TrainableTokensConfig

    def make(self, base: Base) -> None:
        """Make the rows."""
        self.token_adapter = TrainableTokens(self.config, base, device=self._device)

    def reset(self, base: Base) -> None:
        """Start from the base's rows."""
        self.token_adapter.reset(base)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight with the tokens' rows exchanged, and the bias."""
        return self.token_adapter.reweight(weight, bias)


def token_settings(given: Any) -> dict[str, TrainableTokensConfig]:
    """Return by layer ("": the input embedding) the settings that the field means."""
    if given is None:
        return {}
    by_name = given if isinstance(given, dict) else {"": given}
    try:
        return {str(k): TrainableTokensConfig(token_indices=ids) for k, ids in by_name.items()}
    except UserError as error:
        raise UserError(f"trainable_token_indices: {error}") from None


def token_rows(config: Any, model: nn.Module, taken: Collection[str]) -> dict[str, Extra]:
    """Return the sites of tokens' rows in `model`; UserError where one is not there, or `taken`.

    A layer whose weight is the embedding's follows it, unless other ids are said for it.
    """
    settings = token_settings(config.trainable_token_indices)
    if not settings:
        return {}
    found = paths(model)
    chosen: dict[str, TrainableTokensConfig] = {}
    for name, wanted in settings.items():
        sites = [p for p in found if patterns.names(name, p)] if name else [embedding(model)]
        if not sites:
            known = {path.rpartition(".")[2] for path in found}
            raise UserError(
                f"trainable_token_indices names {name[:80]!r}, which no module of this model is "
                f"called.{nearest(name[:200], known)}"
            )
        chosen |= dict.fromkeys(sites, wanted)
    for path in chosen:
        if path in taken:
            raise UserError(
                f"{path!r} is in trainable_token_indices, and in target_modules or modules_to_save "
                "too: leave it out of one"
            )
    extra = {path: Extra(TokenRows, wanted) for path, wanted in chosen.items()}
    first = next((path for path in chosen if path == embedding(model)), None)
    for path in tied_to(model) if first is not None else ():
        if path in taken or (path in chosen and chosen[path] != chosen[first or ""]):
            if config.ensure_weight_tying:
                raise UserError(
                    f"ensure_weight_tying, but {path!r} is adapted otherwise than the embedding "
                    "it is tied to: give both the same token ids"
                )
            continue
        extra[path] = Extra(Tied, chosen[first or ""], follows=first or "")
    return extra
