"""LoRA's settings: PEFT's names, defaults and refusals of what cannot go together."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from torch import nn

from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Rank, Scale
from inlay.core.targeted import Extra, TargetedConfig
from inlay.methods._starts import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    nested,
)
from inlay.methods._tied import ties
from inlay.methods._tokens import token_rows, token_settings

INITS = re.compile(
    r"gaussian|pissa|pissa_niter_\d{1,2}|olora|orthogonal|mica|loftq|eva|corda|lora_ga"
)
STARTS: dict[str, type[Any]] = {
    "eva": EvaConfig,
    "corda": CordaConfig,
    "lora_ga": LoraGAConfig,
    "loftq": LoftQConfig,
}
"""Starts with settings of their own, which stand in `<start>_config`."""
VARIANTS = ("use_dora", "lora_bias", "use_qalora", "use_bdlora")
"""Fields that choose another update than s B A: one of them at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(TargetedConfig):
    """LoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.LORA

    r: Rank = 8
    """Rank of the update."""
    lora_alpha: Scale = 8
    """Numerator of the scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r), so that high ranks keep learning."""
    use_dora: bool = False
    """Learn the length of each row of the weight apart from its direction (DoRA)."""
    init_lora_weights: bool | str = True
    """True: A Kaiming-uniform, B zero. "gaussian": A normal with deviation 1/r, B zero. False: both
    random, for tests. Computed from the layer's weight: "pissa", "pissa_niter_4" (or another number
    of rounds), "olora", "orthogonal", "mica", "loftq". From data: "eva", "corda", "lora_ga"."""
    rank_pattern: dict[str, Rank] = dataclasses.field(default_factory=dict)
    """Rank of the modules whose path ends in the key (a regular expression), instead of r."""
    alpha_pattern: dict[str, Scale] = dataclasses.field(default_factory=dict)
    """lora_alpha of the modules whose path ends in the key (a regular expression)."""

    megatron_config: dict[str, Any] | None = None
    """PEFT's field for Megatron's parallel layers."""
    megatron_core: str | None = "megatron.core"
    """PEFT's field for Megatron's parallel layers."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Ids of tokens whose rows of the input embedding train too, and those of a head tied to it; or
    names of embeddings, or heads, with ids for each."""
    loftq_config: LoftQConfig | dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the start "loftq": loftq_bits, loftq_iter."""
    eva_config: EvaConfig | dict[str, Any] | None = None
    """Settings of the start "eva": rho, tau, use_label_mask, whiten, adjust_scaling_factors."""
    corda_config: CordaConfig | dict[str, Any] | None = None
    """Settings of the start "corda": corda_method (ipm or kpm), cache_file, covariance_file."""
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = None
    """Settings of the start "lora_ga": direction, scale, stable_gamma."""
    velora_config: dict[str, Any] | None = None
    """PEFT's field for VeLoRA."""
    alora_invocation_tokens: list[int] | None = None
    """PEFT's field for aLoRA."""
    use_qalora: bool = False
    """Let A see sums over groups of inputs, as wide as a quantized weight's groups (QA-LoRA)."""
    qalora_group_size: Rank = 16
    """How many inputs make a group; it divides the layer's."""
    monteclora_config: dict[str, Any] | None = None
    """PEFT's field for MonteCLoRA."""
    layer_replication: list[tuple[int, int]] | None = None
    """PEFT's field for repeating layers."""
    lora_bias: bool = False
    """Train a bias with B, scaled as the update is."""
    target_parameters: list[str] | None = None
    """PEFT's field for raw parameters (mixture-of-experts weights)."""
    use_bdlora: BdLoraConfig | dict[str, Any] | None = None
    """Make one factor block-diagonal (BD-LoRA): target_modules_bd_a, target_modules_bd_b, nblocks,
    match_strict."""
    arrow_config: dict[str, Any] | None = None
    """PEFT's field for Arrow routing."""
    kasa_config: dict[str, Any] | None = None
    """PEFT's field for KaSA."""
    ensure_weight_tying: bool = False
    """Where the embedding or the head is named in target_modules or modules_to_save, and the two
    are one weight: adapt both by the embedding's adapter, or copy."""

    by_site: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    not_yet: ClassVar[dict[str, str]] = {
        "megatron_config": "inlay runs no Megatron; leave it unset",
        "megatron_core": "inlay runs no Megatron; leave it as it is",
        "velora_config": (
            "VeLoRA compresses what the backward pass keeps of the inputs, which gradient "
            "checkpointing does here; leave it unset"
        ),
        "monteclora_config": (
            "MonteCLoRA draws the factors anew at each step and adds a loss of its own; take "
            "lora_dropout against overfitting"
        ),
        "arrow_config": "Arrow routes tokens among trained LoRAs; X-LoRA does that here",
        "kasa_config": (
            "KaSA cuts the smallest singular values off the base itself, which other adapters "
            "share; take init_lora_weights='pissa' or 'mica'"
        ),
        "alora_invocation_tokens": "not yet",
        "layer_replication": "not yet",
        "target_parameters": "not yet",
    }

    def __post_init__(self) -> None:
        """Refuse ranks, scales and switches that cannot be."""
        super().__post_init__()
        if not isinstance(self.init_lora_weights, bool) and not INITS.fullmatch(
            str(self.init_lora_weights)
        ):
            raise UserError(
                f"init_lora_weights={self.init_lora_weights!r} is not one of true, false, "
                "gaussian, pissa, pissa_niter_4, olora, orthogonal, mica, loftq, eva, corda, "
                "lora_ga"
            )
        for init, cls in STARTS.items():
            field = f"{init}_config"
            given = getattr(self, field) or ({} if self.init_lora_weights == init else None)
            found = nested(field, cls, given)
            if field == "loftq_config":  # PEFT keeps this one as a mapping
                found = {} if found is None else dataclasses.asdict(found)
            object.__setattr__(self, field, found)
        object.__setattr__(self, "use_bdlora", nested("use_bdlora", BdLoraConfig, self.use_bdlora))
        token_settings(self.trainable_token_indices)
        chosen = [field for field in VARIANTS if getattr(self, field)]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} do not go together: leave out all but one")
        if chosen and self.start is not None:
            raise UserError(
                f"{chosen[0]} goes with the plain starts, not with init_lora_weights="
                f"{self.init_lora_weights!r}: leave one of them out"
            )
        if chosen and self.ensure_weight_tying:
            raise UserError(f"ensure_weight_tying goes with a plain LoRA, not with {chosen[0]}")
        if "_niter_" in str(self.init_lora_weights) and self.bias != "none":
            raise UserError(
                f"bias={self.bias!r} has no place in the files of "
                f"init_lora_weights={self.init_lora_weights!r}: take 'pissa' itself"
            )

    @property
    def start(self) -> str | None:
        """The name of the start that is computed from the weight, where it is one of these."""
        init = self.init_lora_weights
        return init if isinstance(init, str) and init != "gaussian" else None

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def more(
        self, model: nn.Module, adapted: Collection[str], saved: Collection[str]
    ) -> dict[str, Extra]:
        """Return the rows of tokens, and what is tied to an embedding."""
        found = token_rows(self, model, {*adapted, *saved})
        return found | (ties(self, model, adapted, saved) if self.ensure_weight_tying else {})
