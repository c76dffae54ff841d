"""LoRA: W + s B A, with s = alpha / r, or alpha / sqrt(r).   A [R, I], B [O, R].

Hu et al., arXiv:2106.09685; the square root is rsLoRA's, arXiv:2312.03732.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Adapter, Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Rank, Scale
from inlay.core.targeted import TargetedConfig
from inlay.methods._starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, nested

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
    """PEFT's field for training single token embeddings."""
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
    """PEFT's switch for QA-LoRA."""
    qalora_group_size: int = 16
    """PEFT's field for QA-LoRA."""
    monteclora_config: dict[str, Any] | None = None
    """PEFT's field for MonteCLoRA."""
    layer_replication: list[tuple[int, int]] | None = None
    """PEFT's field for repeating layers."""
    lora_bias: bool = False
    """PEFT's switch for a bias in B."""
    target_parameters: list[str] | None = None
    """PEFT's field for raw parameters (mixture-of-experts weights)."""
    use_bdlora: dict[str, Any] | None = None
    """PEFT's field for block-diagonal LoRA."""
    arrow_config: dict[str, Any] | None = None
    """PEFT's field for Arrow routing."""
    kasa_config: dict[str, Any] | None = None
    """PEFT's field for KaSA."""
    ensure_weight_tying: bool = False
    """PEFT's switch for tied adapters on tied embeddings."""

    by_site: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    not_yet: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            "megatron_config",
            "megatron_core",
            "trainable_token_indices",
            "velora_config",
            "alora_invocation_tokens",
            "use_qalora",
            "monteclora_config",
            "layer_replication",
            "lora_bias",
            "target_parameters",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
            "ensure_weight_tying",
        ),
        "inlay has LoRA, rsLoRA and DoRA so far; leave this field at its default",
    )

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
        if self.use_dora and self.start is not None:
            raise UserError(
                f"use_dora goes with the plain starts, not with init_lora_weights="
                f"{self.init_lora_weights!r}: leave one of them out"
            )
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


class Lora(Delta):
    """The update s B A of one layer; where it has a start B_0 A_0 of the base's, s (B A - B_0 A_0).

    Subtracting the start is the same as taking it off the base, which then need not change.
    """

    config: LoraConfig
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self, config: LoraConfig, base: Base, *, device: torch.device | None = None
    ) -> None:
        """Make A [R, I] and B [O, R]."""
        super().__init__(config, base, device=device)
        out_features, in_features = base.shape
        self.lora_A = self.parameter(config.r, in_features)
        self.lora_B = self.parameter(out_features, config.r)
        if config.init_lora_weights == "mica":
            self.frozen = ("lora_B",)
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def reset(self, base: Base) -> None:
        """Make one factor random and the other zero: an untrained update changes nothing.

        On an embedding it is A, the side of the ids, that is zero, so that a token's first step is
        its own.
        """
        super().reset(base)
        init, (a, b) = self.config.init_lora_weights, (self.lora_A, self.lora_B)
        if base.kind == "embedding":
            nn.init.normal_(b)
            nn.init.zeros_(a) if init else nn.init.normal_(a)
            return
        if init == "gaussian":
            nn.init.normal_(a, std=1 / self.config.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b) if init else nn.init.kaiming_uniform_(b, a=math.sqrt(5))

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return s B A [O, I], less the start."""
        product = self.lora_B.to(dtype) @ self.lora_A.to(dtype)
        if self.start_A is not None and self.start_B is not None:
            product = product - self.start_B.to(dtype) @ self.start_A.to(dtype)
        return self.config.scaling * product

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return s B [O, R] and A [R, I]; with a start, [s B, -s B_0] and [A; A_0]."""
        b, a = self.lora_B.to(dtype), self.lora_A.to(dtype)
        if self.start_A is not None and self.start_B is not None:
            b = torch.cat([b, -self.start_B.to(dtype)], dim=1)
            a = torch.cat([a, self.start_A.to(dtype)])
        return self.config.scaling * b, a

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return s B (A x), never the product of the two; less the start's, undropped."""
        begun = None
        if x.is_floating_point():
            x = x.to(self.lora_A.dtype)
            if self.start_A is not None and self.start_B is not None:
                begun = base.up(base.down(x, self.start_A), self.start_B)
            if self.config.lora_dropout:  # at 0 torch would still draw a mask and keep it
                x = F.dropout(x, self.config.lora_dropout, self.training)
        # scaled last, in PEFT's order: the same bits for the same adapter
        out = base.up(base.down(x, self.lora_A), self.lora_B)
        return (out if begun is None else out - begun) * self.config.scaling

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names; a convolution's factors are convolutions in the file."""
        found = super().keys(base)
        del found["lora_A"], found["lora_B"]
        names = ("lora_embedding_A", "lora_embedding_B") if base.kind == "embedding" else NAMES
        for key, name, shape in zip(
            names, ("lora_A", "lora_B"), base.file_shapes(self.config.r), strict=True
        ):
            found[key] = (name, shape)
        return found


NAMES = ("lora_A.weight", "lora_B.weight")


def _chosen(config: LoraConfig) -> type[Adapter]:
    """Return what the configuration makes of LoRA."""
    if config.init_lora_weights == "loftq":
        from inlay.methods._loftq import LoftQ

        return LoftQ
    if not config.use_dora:
        return Lora
    from inlay.methods._dora import Dora  # which holds a Lora, so its file needs this one

    return Dora


METHOD = Method(LoraConfig, Lora, _chosen)
