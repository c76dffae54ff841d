"""What LoRA's settings cannot be together."""

from __future__ import annotations

import re
from typing import Any

from inlay.core.errors import UserError

INITS = re.compile(
    r"gaussian|pissa|pissa_niter_\d{1,2}|olora|orthogonal|mica|loftq|eva|corda|lora_ga"
)
VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "kasa_config",
)
"""Fields that choose another update than s B A: one of them at most."""
INPUTS = ("lora_dropout", "bias", "fan_in_fan_out")
"""Fields that say how a layer is called, which a raw parameter is not."""


def check_together(config: Any) -> None:
    """Raise UserError where the settings `config` cannot be, or exclude one another."""
    init = config.init_lora_weights
    if not isinstance(init, bool) and not INITS.fullmatch(str(init)):
        raise UserError(
            f"init_lora_weights={init!r} is not one of true, false, gaussian, pissa, "
            "pissa_niter_4, olora, orthogonal, mica, loftq, eva, corda, lora_ga"
        )
    chosen = [field for field in VARIANTS if getattr(config, field)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} do not go together: leave out all but one")
    if chosen and config.start is not None:
        raise UserError(
            f"{chosen[0]} goes with the plain starts, not with init_lora_weights={init!r}: leave "
            "one of them out"
        )
    if chosen and config.ensure_weight_tying:
        raise UserError(f"ensure_weight_tying goes with a plain LoRA, not with {chosen[0]}")
    if config.alora_invocation_tokens is not None:
        if not config.alora_invocation_tokens:
            raise UserError("alora_invocation_tokens is empty: name a token, or leave it out")
        if config.bias != "none":
            raise UserError(
                f"bias={config.bias!r} trains what alora_invocation_tokens leaves to the base: "
                "leave one of them out"
            )
    ranges = config.layer_replication or []
    if any(len(r) != 2 or not all(type(n) is int for n in r) for r in ranges):
        raise UserError(
            f"layer_replication={str(ranges)[:200]} must be pairs of a first layer and an end"
        )
    if config.target_parameters:
        apart = [*chosen, *(f for f in INPUTS if getattr(config, f) not in (0, "none"))]
        apart += ["init_lora_weights"] if config.start is not None else []
        if apart:
            raise UserError(
                f"target_parameters goes with a plain LoRA alone, not with {', '.join(apart)}"
            )
    if "_niter_" in str(init) and config.bias != "none":
        raise UserError(
            f"bias={config.bias!r} has no place in the files of init_lora_weights={init!r}: take "
            "'pissa' itself"
        )
