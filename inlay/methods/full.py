"""Full fine-tuning, the baseline: W itself trains; nothing is set into the model, and what is saved is a plain model."""

from __future__ import annotations

import dataclasses

from inlay.core.adapter import Method
from inlay.core.config import PeftType
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullConfig(TargetedConfig):
    """Settings of full fine-tuning: with target_modules, only those modules train; without, the whole model does."""

    method = PeftType.FULL


METHOD = Method(FullConfig, None)
