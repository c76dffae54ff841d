"""The settings in LoRA's own, as PEFT names them: of starts from more than a weight, of blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from inlay.core import limits
from inlay.core.errors import UserError, nearest
from inlay.core.limits import Rank, Scale


@dataclasses.dataclass(frozen=True)
class EvaConfig:
    """EVA: A from the layer's inputs, and more rank where these vary in more directions."""

    rho: Scale = 2.0
    """A layer gets up to rho * r ranks, of all layers' sum as it was; 1 = r each."""
    tau: Scale = 0.99
    """Cosine between one batch's directions and the next's from which on they are settled."""
    use_label_mask: bool = True
    """Look only at the positions that train."""
    label_mask_value: int = -100
    """The label of positions that do not."""
    whiten: bool = False
    """Divide each direction by the root of its singular value."""
    adjust_scaling_factors: bool = True
    """Change lora_alpha with the rank, so that the scale stays."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        limits.check(self)
        if self.rho < 1:
            raise UserError(f"eva_config: rho={self.rho!r} must be at least 1")
        if not 0 <= self.tau <= 1:
            raise UserError(f"eva_config: tau={self.tau!r} must be from 0 to 1")


@dataclasses.dataclass(frozen=True)
class CordaConfig:
    """CorDA: the parts of the weight that the data's inputs use most (ipm), or least (kpm)."""

    cache_file: str | None = None
    """Where the factors found are kept, and read again (safetensors)."""
    covariance_file: str | None = None
    """Where the covariances are kept, which serve every rank (safetensors)."""
    corda_method: Literal["ipm", "kpm"] = "ipm"
    """ipm: learn the task faster. kpm: keep the knowledge that the data asks for."""
    verbose: bool = False
    """Print each layer's name once its factors are found."""
    use_float16_for_covariance: bool = False
    """Hold the covariances in half the memory."""
    prune_temporary_fields: bool = True
    """PEFT's; nothing is left in the model either way."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        limits.check(self)


@dataclasses.dataclass(frozen=True)
class LoraGAConfig:
    """LoRA-GA: directions in which full fine-tuning's first step would go."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """Which of the 2r largest singular vectors A and B get: the odd and the even ones, the second
    and the first half, the first and the second, or any."""
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """How long they are: as the width asks for, as the weight's, by 1 / scale, or 1."""
    stable_gamma: Scale = 16
    """With stable, each factor is O^(1/4) / sqrt(this) long."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        limits.check(self)
        if self.stable_gamma <= 0:
            raise UserError(f"lora_ga_config: stable_gamma={self.stable_gamma!r} must be above 0")


@dataclasses.dataclass(frozen=True)
class LoftQConfig:
    """LoftQ: the weight quantized, and factors that make up for what this lost."""

    loftq_bits: Literal[4, 8] = 4
    """4: NormalFloat in blocks of 64. 8: whole numbers, one scale a row."""
    loftq_iter: int = 1
    """How often the two are found in turn."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        limits.check(self)
        if type(self.loftq_iter) is not int or not 1 <= self.loftq_iter <= 100:
            raise UserError(
                f"loftq_config: loftq_iter={self.loftq_iter!r} must be a whole number from 1 to 100"
            )


@dataclasses.dataclass(frozen=True)
class KasaConfig:
    """KaSA: how much training holds the update to the form of singular values and vectors."""

    beta: Scale = 1e-4
    """Weight in the loss of the squares of d."""
    gamma: Scale = 1e-3
    """Weight in the loss of A and B being far from orthogonal."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        limits.check(self)
        if min(self.beta, self.gamma) < 0:
            raise UserError(f"kasa_config: beta={self.beta} and gamma={self.gamma} are at least 0")


@dataclasses.dataclass(frozen=True)
class BdLoraConfig:
    """BD-LoRA: which factors are block-diagonal, so that each of as many devices needs one block.

    A module counts by any of these strings in its path, as in PEFT.
    """

    target_modules_bd_a: list[str] | None = None
    """Modules whose A is block-diagonal: those that a server cuts by their outputs."""
    target_modules_bd_b: list[str] | None = None
    """Modules whose B is block-diagonal: those that a server cuts by their inputs."""
    nblocks: Rank = 1
    """How many blocks there are; they divide r, and a layer's width."""
    match_strict: bool = True
    """Refuse a module that is in neither list; else its factors stay whole."""

    def __post_init__(self) -> None:
        """Refuse a list that is none, and a name in both."""
        limits.check(self)
        lists = [getattr(self, field) or [] for field in BD_LISTS]
        named = all(isinstance(x, list) and all(isinstance(n, str) for n in x) for x in lists)
        if not named or set(lists[0]) & set(lists[1]):
            raise UserError(
                f"use_bdlora: target_modules_bd_a={lists[0]} and target_modules_bd_b={lists[1]} "
                "must be two lists without a name in common"
            )


BD_LISTS = ("target_modules_bd_a", "target_modules_bd_b")


def nested(field: str, cls: type[Any], value: Any) -> Any:
    """Return a block of settings given as `cls`, PEFT's class of it, a mapping, or nothing.

    UserError for a name that it does not have.
    """
    if value is None or isinstance(value, cls):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, dict):
        raise UserError(f"{field}={value!r:.200} must be a mapping of its settings")
    known = [f.name for f in dataclasses.fields(cls)]
    for name in value:
        if name not in known:
            raise UserError(
                f"{field} has no {name!r}, but {', '.join(known)}.{nearest(str(name), known)}"
            )
    return cls(**value)
