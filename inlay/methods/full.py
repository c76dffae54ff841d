"""Full fine-tuning, the baseline: W itself trains, and what is saved is a plain model."""

from __future__ import annotations

import dataclasses

from inlay.core.adapter import Method
from inlay.core.config import PeftType
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullConfig(TargetedConfig):
    """Settings of full fine-tuning: the target_modules train, or without any the whole model."""

    method = PeftType.FULL


METHOD = Method(FullConfig, None)
