"""LoRA's settings: PEFT's names, defaults and refusals of what cannot go together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from torch import nn

from inlay.core.config import PeftType
from inlay.core.limits import Dropout, Rank, Scale, Token
from inlay.core.raw import named
from inlay.core.targeted import Extra, TargetedConfig
from inlay.methods._lora_checks import check_together
from inlay.methods._starts import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    nested,
)
from inlay.methods._tied import paths, ties
from inlay.methods._tokens import token_rows, token_settings

STARTS: dict[str, type[Any]] = {
    "eva": EvaConfig,
    "corda": CordaConfig,
    "lora_ga": LoraGAConfig,
    "loftq": LoftQConfig,
}
"""Starts with settings of their own, which stand in `<start>_config`."""


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
    alora_invocation_tokens: list[Token] | None = None
    """Ids of the sequence that invokes the adapter: a row's tokens before its last one are left to
    the base (aLoRA), whose cache of them then serves every adapter."""
    use_qalora: bool = False
    """Let A see sums over groups of inputs, as wide as a quantized weight's groups (QA-LoRA)."""
    qalora_group_size: Rank = 16
    """How many inputs make a group; it divides the layer's."""
    monteclora_config: dict[str, Any] | None = None
    """PEFT's field for MonteCLoRA."""
    layer_replication: list[list[int]] | None = None
    """Ranges (first, end) of the model's layers: it then has these, one after the other, a layer
    more than once over the same weights, each with an adapter of its own."""
    lora_bias: bool = False
    """Train a bias with B, scaled as the update is."""
    target_parameters: list[str] | None = None
    """Names, or path ends, of parameters to adapt that are in no layer of their own: a mixture's
    experts. Without target_modules, these alone."""
    use_bdlora: BdLoraConfig | dict[str, Any] | None = None
    """Make one factor block-diagonal (BD-LoRA): target_modules_bd_a, target_modules_bd_b, nblocks,
    match_strict."""
    arrow_config: dict[str, Any] | None = None
    """PEFT's field for Arrow routing."""
    kasa_config: KasaConfig | dict[str, Any] | None = None
    """Leave the weight's r smallest singular values out, and give the update values of its own
    between its factors (KaSA): beta, gamma."""
    ensure_weight_tying: bool = False
    """Where the embedding or the head is named in target_modules or modules_to_save, and the two
    are one weight: adapt both by the embedding's adapter, or copy."""

    by_site: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    not_yet: ClassVar[dict[str, str]] = {
        "megatron_config": "inlay runs no Megatron; leave it unset",
        "megatron_core": "inlay runs no Megatron; leave it as it is",
        "velora_config": (
            "VeLoRA takes the gradient of A from compressed inputs, so no longer the loss's; "
            "gradient checkpointing saves their memory and keeps it exact"
        ),
        "monteclora_config": (
            "MonteCLoRA draws the factors anew at each step and adds a loss of its own; take "
            "lora_dropout against overfitting"
        ),
        "arrow_config": "Arrow routes tokens among trained LoRAs; X-LoRA does that here",
    }

    def __post_init__(self) -> None:
        """Refuse ranks, scales and switches that cannot be."""
        super().__post_init__()
        for init, cls in STARTS.items():
            field = f"{init}_config"
            given = getattr(self, field) or ({} if self.init_lora_weights == init else None)
            found = nested(field, cls, given)
            if field == "loftq_config":  # PEFT keeps this one as a mapping
                found = {} if found is None else dataclasses.asdict(found)
            object.__setattr__(self, field, found)
        for field, cls in (("use_bdlora", BdLoraConfig), ("kasa_config", KasaConfig)):
            object.__setattr__(self, field, nested(field, cls, getattr(self, field)))
        token_settings(self.trainable_token_indices)
        check_together(self)

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
        """Return the rows of tokens, what is tied to an embedding, and raw parameters."""
        taken = {*adapted, *saved}
        found = token_rows(self, model, taken)
        if self.ensure_weight_tying:
            found |= ties(self, model, adapted, saved)
        if self.target_parameters:
            from inlay.methods._parameters import parameter_sites  # which is of this one's adapter

            found |= parameter_sites(self, paths(model), {*taken, *found})
        return found

    def wanted(self, found: Mapping[str, nn.Module]) -> list[str] | str | None:
        """Return the target_modules; none where there are target_parameters alone."""
        del found
        alone = self.target_modules is None and self.target_parameters
        return [] if alone else self.target_modules

    @property
    def repeats(self) -> list[list[int]]:
        """The ranges of layers that the model has instead of its own."""
        return self.layer_replication or []

    def parameters(self, found: Mapping[str, nn.Module]) -> list[str]:
        """Return the paths of the raw parameters that are adapted."""
        return named("target_parameters", self.target_parameters or (), found)
