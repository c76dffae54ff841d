"""IA3: diag(l) W and l * b; in the feed-forward part W diag(l)   (Liu et al., arXiv:2205.05638).

l [O] scales what a layer puts out, or [C] what it takes in: C = I, for a convolution its channels.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from inlay.core import patterns
from inlay.core.adapter import Method, Reweight
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.targeted import TargetedConfig, listed

USUAL: dict[str, str] = {
    "k_proj v_proj | down_proj": "llama mistral",
    "q_proj v_proj | down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "k_proj v_proj | w2": "mixtral",
    "q_proj k_proj | fc2": "opt",
    "q_proj v_proj | fc2": "bart phi",
    "q_proj v_proj | fc_out": "gptj",
    "q_proj v_proj | c_proj": "gpt_neo",
    "query_key_value | dense_4h_to_h": "gpt_neox falcon RefinedWeb RefinedWebModel",
    "query_key_value | mlp.dense_4h_to_h": "bloom",
    "c_attn | mlp.c_proj": "gpt2 gpt_bigcode",
    "key value | output.dense": "bert roberta",
    "key_proj value_proj | output.dense": "deberta-v2",
    "in_proj | output.dense": "deberta",
    "k v | wo": "t5",
    "k v wi_1 |": "mt5",
}
"""Layers whose outputs are scaled | those whose inputs are -> model types; PEFT's choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config(TargetedConfig):
    """IA3's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.IA3

    feedforward_modules: list[str] | str | None = None
    """Those of target_modules whose input is scaled, by name or expression; nothing given, the
    usual ones of the model's type."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    init_ia3_weights: bool = True
    """True: every scale starts at 1. False: random, for tests."""

    everywhere: ClassVar[bool] = False
    feeds: ClassVar[bool] = False
    """Whether these settings are those of a site of the feed-forward part."""
    unwritten: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")

    def __post_init__(self) -> None:
        """Refuse switches that cannot be, and feed-forward modules that are no targets."""
        super().__post_init__()
        named = listed("feedforward_modules", self.feedforward_modules)
        object.__setattr__(self, "feedforward_modules", named)
        if isinstance(named, list) and isinstance(self.target_modules, list):
            stray = sorted(set(named) - set(self.target_modules))
            if stray:
                raise UserError(
                    f"feedforward_modules names {', '.join(stray)[:200]}, which target_modules "
                    "does not: add them there, or leave them out here"
                )

    def filled(self, model: nn.Module) -> Self:
        """Return the settings with the usual modules of the model's type for those not given."""
        kind = getattr(getattr(model, "config", None), "model_type", None)
        names = next((names for names, kinds in USUAL.items() if kind in kinds.split()), "|")
        outputs, inputs = (side.split() for side in names.split("|"))
        targets, feeding = self.target_modules, self.feedforward_modules
        if targets is None:
            targets = [*outputs, *inputs] or None
        if feeding is None:
            feeding = [n for n in inputs if n in targets] if isinstance(targets, list) else inputs
        return self.replace(target_modules=targets, feedforward_modules=feeding)

    def at(self, site: str) -> Self:
        """Return the settings at `site`, with `feeds` set where its input is scaled."""
        named = self.feedforward_modules
        looked_up = frozenset(named) if isinstance(named, list) else named
        here = copy.copy(self)
        object.__setattr__(here, "feeds", patterns.matches(looked_up, site))
        return here


class IA3(Reweight):
    """The scales of one layer's outputs, or of its inputs."""

    on = frozenset({"linear", "conv"})
    config: IA3Config

    def make(self, base: Base) -> None:
        """Make l, in the shape it has in PEFT's files."""
        config = self.config
        (_, channels, *kernel), (outputs, *_) = base.file_shapes(1)
        if kernel:
            shape = [1, channels if config.feeds else outputs, *[1] * len(kernel)]
        else:
            shape = [1, channels] if config.feeds else [outputs, 1]
        self.ia3_l = self.parameter(*shape)

    def reset(self, base: Base) -> None:
        """Start from scales of 1."""
        del base
        nn.init.normal_(self.ia3_l, mean=1.0, std=0.0 if self.config.init_ia3_weights else 1.0)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return diag(l) W and l * b, or W diag(l) and b."""
        scale = self.ia3_l.to(weight.dtype).flatten()
        if self.config.feeds:
            # a channel's scale holds for all I / C entries of its kernel
            return weight * scale.repeat_interleave(weight.shape[1] // len(scale)), bias
        return weight * scale[:, None], None if bias is None else bias * scale

    def rebias(self, base: Base) -> Tensor | None:
        """Return l * b, or b."""
        bias = base.bias()
        return bias if bias is None or self.config.feeds else bias * self.ia3_l.flatten()

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return l * base(x), or base(l * x): neither needs the weight."""
        scale = base.spread(self.ia3_l.flatten())
        if self.config.feeds:
            return base((x * scale).to(x.dtype), *args, **kwargs)
        below = base(x, *args, **kwargs)
        return (below * scale).to(below.dtype)


METHOD = Method(IA3Config, IA3)
