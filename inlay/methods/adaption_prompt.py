"""LLaMA-Adapter: y + g O(softmax(s q K^T) V), prompts that the top layers' attention reads, gated.

Zhang et al., arXiv:2303.16199.  q [T, D] a layer's own queries, K = W_k P, V = W_v P, O its output
projection, s its scale; P [L, D] and the gate g (one number, zero at the start) are trained.  Keys
of prompts have no position. As in PEFT g itself is the gate, not tanh(g), and in GPT-2 there is
no O.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Method, Wrap
from inlay.core.base import Base, Kind
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Rank
from inlay.core.targeted import BY_LAYER, TargetedConfig

ATTENTION = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}
"""model_type -> what a layer's attention is called, where it is known what that computes."""
LENGTH = 10
"""The paper's number of prompts, for an unset adapter_len."""
PLAIN = 2
"""The paper's number of layers, the lowest, without prompts, for unset adapter_layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptionPromptConfig(TargetedConfig):
    """LLaMA-Adapter's settings, under PEFT's names; PEFT has no defaults, these are the paper's."""

    method = PeftType.ADAPTION_PROMPT
    everywhere = False
    unwritten = (*BY_LAYER, "modules_to_save")
    not_yet: ClassVar[dict[str, str]] = dict.fromkeys(
        BY_LAYER, "adapter_layers says how many layers have prompts, counted from the top"
    )

    target_modules: list[str] | str | None = None
    """What the attention of each layer is called: one name; unset = by the model's type."""
    adapter_len: Rank | None = None
    """How many prompts a layer has; unset = 10."""
    adapter_layers: Rank | None = None
    """How many layers have prompts, from the top; unset = all but the two lowest."""

    def __post_init__(self) -> None:
        """Check the name; UserError says what it is to be."""
        super().__post_init__()
        if isinstance(self.target_modules, list):  # a file has a string
            if len(self.target_modules) != 1:
                raise UserError(
                    f"target_modules={str(self.target_modules)[:80]} must be one name, that of the "
                    "attention in each layer: leave it out"
                )
            object.__setattr__(self, "target_modules", self.target_modules[0])

    def filled(self, model: Any) -> Self:
        """Return the configuration with what is unset taken from the model's, or the paper."""
        config = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        if self.target_modules is None and kind not in ATTENTION:
            raise UserError(
                f"model_type {kind!r} has an attention that {self.method} does not know; it knows "
                f"that of {', '.join(ATTENTION)}: take a method of layers, such as lora"
            )
        told = {
            "target_modules": ATTENTION.get(str(kind)),
            "adapter_len": LENGTH,
            "adapter_layers": max(1, getattr(config, "num_hidden_layers", 1) - PLAIN),
        }
        return self.replace(**{k: v for k, v in told.items() if getattr(self, k) is None})

    def wanted(self, found: Mapping[str, nn.Module]) -> list[str]:
        """Return the paths of the top layers' attention."""
        count = self.adapter_layers or 1  # `filled` has filled it in
        paths = [path for path in found if f".{path}".endswith(f".{self.target_modules}")]
        if len(paths) < count:
            raise UserError(
                f"adapter_layers={count}, but {len(paths)} modules of this model are called "
                f"{self.target_modules!r}"
            )
        return paths[-count:]


class AdaptionPrompt(Wrap):
    """The prompts of one layer."""

    on: ClassVar[frozenset[Kind]] = frozenset({"module"})
    config: AdaptionPromptConfig

    def make(self, base: Base) -> None:
        """Make P [1, L, D] and the gate [1]; UserError where this is no attention known here."""
        config: Any = getattr(base.module, "config", None)
        if getattr(config, "model_type", "") not in ATTENTION or not hasattr(
            base.module, "scaling"
        ):
            raise UserError(
                f"{type(base.module).__name__} is no attention that {self.config.method} knows: "
                "leave target_modules out"
            )
        length = self.config.adapter_len or LENGTH
        self.adaption_prompt = self.parameter(1, length, config.hidden_size)
        self.adaption_gate = self.parameter(1)

    def reset(self, base: Base) -> None:
        """Start P at random behind a closed gate."""
        nn.init.normal_(self.adaption_prompt)
        nn.init.zeros_(self.adaption_gate)

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the attention's outputs, the prompts' share added to the first."""
        first, *rest = base(x, *args, **kwargs)
        attention: Any = base.module
        prompt = self.adaption_prompt.to(x.dtype)
        if hasattr(attention, "c_attn"):
            q, _, _ = _heads(attention, attention.c_attn(x), 3)
            _, k, v = _heads(attention, attention.c_attn(prompt), 3)
            share = self._read(q, k, v, attention.scaling)
        else:
            (q,) = _heads(attention, attention.q_proj(x))
            (k,), (v,) = (
                _heads(attention, p(prompt)) for p in (attention.k_proj, attention.v_proj)
            )
            cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[0]
            left, right = q.chunk(2, -1)
            q = q * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]
            # several heads of queries to each of keys
            k, v = (h.repeat_interleave(q.shape[1] // h.shape[1], 1) for h in (k, v))
            share = _without_bias(attention.o_proj, self._read(q, k, v, attention.scaling))
        return ((first + share).to(first.dtype), *rest)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return what the heads [B, H, T, d] of queries read of the prompts, [B, T, H d]."""
        weights = F.softmax(q @ k.transpose(2, 3) * scale, -1, dtype=torch.float32)
        gated = self.adaption_gate * weights
        return (gated.to(q.dtype) @ v).transpose(1, 2).flatten(2)


def _heads(attention: Any, states: Tensor, parts: int = 1) -> tuple[Tensor, ...]:
    """Return `parts` equal parts of states [B, T, ..], each in heads [B, H, T, d]."""
    cut = (*states.shape[:2], -1, attention.head_dim)
    return tuple(part.view(cut).transpose(1, 2) for part in states.chunk(parts, -1))


def _without_bias(layer: Any, h: Tensor) -> Tensor:
    """Return the layer's output but for its bias, which y has already."""
    out: Tensor = layer(h)
    return out if layer.bias is None else out - layer(torch.zeros_like(h[:1, :1]))


METHOD = Method(AdaptionPromptConfig, AdaptionPrompt)
