"""X-LoRA: W x + g sum_n s_n(h) B_n A_n x, trained LoRAs mixed anew for each token.

Buehler and Buehler, arXiv:2402.07148.  The model runs twice: h [T, D], its last hidden states with
the LoRAs weighed alike (at 0: without them), go through a classifier to the weights s [T, L, N] of
N LoRAs in L layers, with which it runs again.  Only the classifier trains, or the LoRAs with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method, Wrap
from inlay.core.base import Base, Kind
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Rank, Scale
from inlay.core.targeted import BY_LAYER, TargetedConfig
from inlay.methods._classifier import Classifier
from inlay.methods.lora import Lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLoraConfig(TargetedConfig):
    """X-LoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.XLORA
    everywhere = False
    unwritten = ("target_modules", *BY_LAYER, "modules_to_save")
    not_yet: ClassVar[dict[str, str]] = dict.fromkeys(
        ("target_modules", *BY_LAYER), "the LoRAs that are mixed say where"
    )

    hidden_size: Rank | None = None
    """Width of the model's hidden states; unset = the model's (in PEFT: 4096)."""
    adapters: dict[str, str] = dataclasses.field(default_factory=dict)
    """The LoRAs: name -> folder or hub id, loaded where the model has none of that name. PEFT takes
    no other names than "0", "1" and so on."""
    enable_softmax: bool = True
    """Weights that add up to 1 over the LoRAs; without, they are the classifier's own outputs."""
    enable_softmax_topk: bool = False
    """Let the weights of the top_k_lora that are left add up to 1."""
    layerwise_scalings: bool = False
    """Weights of each layer's own, and not the same in all layers."""
    xlora_depth: Rank = 1
    """How many linear layers the classifier has."""
    xlora_size: Rank = 2048
    """Width between these."""
    xlora_dropout_p: Dropout = 0.2
    """Probability of zeroing a value between these in training."""
    use_trainable_adapters: bool = False
    """Train the LoRAs too; they are saved beside."""
    softmax_temperature: Scale = 1.0
    """What the classifier's outputs are divided by before they become weights."""
    top_k_lora: Rank | None = None
    """Mix only so many LoRAs, those of the largest weights; unset = all."""
    scaling_pass_value: Scale = 0.0
    """The weight of every LoRA in the first run."""
    global_scaling_weight: Scale = 1.0
    """A factor g of the mixture."""

    def __post_init__(self) -> None:
        """Check the LoRAs and the numbers; UserError names the limit."""
        object.__setattr__(self, "adapters", dict(self.adapters or {}))  # PEFT's default is null
        super().__post_init__()
        if self.softmax_temperature <= 0:
            raise UserError(f"softmax_temperature={self.softmax_temperature} must be above 0")
        if (self.top_k_lora or 0) > len(self.adapters):
            raise UserError(
                f"top_k_lora={self.top_k_lora}, but there are {len(self.adapters)} adapters to mix"
            )

    @property
    def parts(self) -> Mapping[str, str]:
        """The LoRAs."""
        return self.adapters

    @property
    def trains_parts(self) -> bool:
        """Whether the LoRAs train too."""
        return self.use_trainable_adapters

    def filled(self, model: Any) -> Self:
        """Return the configuration with the model's width; UserError where it has none such."""
        config = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"{type(model).__name__} is no model of transformers with one sequence: "
                f"{self.method} reads its hidden states first"
            )
        width = config.get_text_config().hidden_size
        if self.hidden_size not in (None, width):
            raise UserError(f"hidden_size={self.hidden_size}, but the model's is {width}")
        return self.replace(hidden_size=width)

    def wanted(self, found: Mapping[str, nn.Module]) -> list[str]:
        """Return the paths of the layers that any of the LoRAs is in."""
        held = {path: getattr(module, "adapters", {}) for path, module in found.items()}
        sites = {
            path: [adapters[name] for name in self.adapters if name in adapters]
            for path, adapters in held.items()
        }
        missing = [n for n in self.adapters if not any(n in a for a in held.values())]
        if missing or not self.adapters:
            raise UserError(
                f"adapters={self.adapters} must name the LoRAs to mix"
                + (f"; the model has no {missing[0]!r}: load it first" if missing else "")
            )
        for path, experts in sites.items():
            for expert in experts:
                plain = isinstance(expert, Lora) and expert.config.start is None
                if not plain or expert.bias is not None:
                    raise UserError(
                        f"{path!r} has a {type(expert).__name__} of an adapter to mix: "
                        f"{self.method} mixes plain LoRAs that train nothing else"
                    )
        return [path for path, experts in sites.items() if experts]


class XLora(Wrap):
    """The mixture in one layer, of what LoRAs the host there has."""

    on: ClassVar[frozenset[Kind]] = frozenset({"linear", "embedding"})
    carries = False
    config: XLoraConfig
    _experts: tuple[nn.ModuleDict, ...] = ()

    @classmethod
    def share(
        cls, config: Any, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Classifier:
        """Return the classifier for the layers of `bases`."""
        return Classifier(config, len(bases), device or bases[0].device, bases[0].adapter_dtype)

    def beside(self, adapters: nn.ModuleDict) -> None:
        """Take note of the host's adapters, which are not this one's to save or move."""
        self._experts = (adapters,)

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) and the mixture; where no call of the model said weights, base(x)."""
        out: Tensor = base(x, *args, **kwargs)
        (shared,) = self._held
        assert isinstance(shared, Classifier)
        weights = None if self.selection is None else self.selection.said(shared.key, x)
        if weights is None:
            return out
        if x.shape[:2] != weights.shape[:2]:
            raise UserError(
                f"X-LoRA weighs the tokens of {list(weights.shape[:2])}, but a layer is fed "
                f"{list(x.shape)}: mix LoRAs of layers that see every token"
            )
        here = weights[:, :, min(self.number, weights.shape[2] - 1)]
        for n, name in enumerate(self.config.adapters):
            expert = dict(self._experts[0]).get(name)
            if isinstance(expert, Lora):
                share = expert.update(base, x) * here[..., n, None]
                out = out + (share * self.config.global_scaling_weight).to(out.dtype)
        return out


METHOD = Method(XLoraConfig, XLora)
