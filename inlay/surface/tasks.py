"""PEFT's classes of adapted models by task, and `get_peft_model`, which chooses one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from inlay.checkpoint.adapter import with_parts
from inlay.core.config import AdapterConfig
from inlay.surface.config import targeted_config
from inlay.surface.peft_model import PeftModel, follow_base
from inlay.surface.signature import DECODER, SPANS, TEXT, forward_of


class PeftModelForCausalLM(PeftModel):
    """`PeftModel` for task_type CAUSAL_LM."""

    forward = forward_of(*TEXT, "labels")


class PeftModelForSeq2SeqLM(PeftModel):
    """`PeftModel` for task_type SEQ_2_SEQ_LM."""

    forward = forward_of(*TEXT, *DECODER, "labels")


class PeftModelForSequenceClassification(PeftModel):
    """`PeftModel` for task_type SEQ_CLS: the classification head is trained and saved too."""

    forward = forward_of(*TEXT, "labels")


class PeftModelForTokenClassification(PeftModel):
    """`PeftModel` for task_type TOKEN_CLS: the classification head is trained and saved too."""

    forward = forward_of(*TEXT, "labels")


class PeftModelForQuestionAnswering(PeftModel):
    """`PeftModel` for task_type QUESTION_ANS: the span head is trained and saved too."""

    forward = forward_of(*TEXT, *SPANS)


class PeftModelForFeatureExtraction(PeftModel):
    """`PeftModel` for task_type FEATURE_EXTRACTION."""

    forward = forward_of(*TEXT)


CLASSES: dict[str, type[PeftModel]] = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig | Mapping[str, Any],
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
) -> PeftModel:
    """Return `model`, changed in place, with a fresh adapter set into it, ready to be trained.

    autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision; false =
    the base's dtype. revision: of the base on the hub, noted in the adapter's files.
    """
    config = targeted_config(peft_config)
    if revision is not None:
        config = config.replace(revision=revision)
    adapted = CLASSES.get(config.task_type or "", PeftModel)(model)
    with with_parts(adapted.roster, adapter_name, config):
        adapted.roster.add(adapter_name, config)
    if not autocast_adapter_dtype:
        follow_base(adapted.roster, adapter_name)
    return adapted
