"""PEFT's classes that load an adapter and the base that its folder names, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from inlay.checkpoint import folder as files
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError
from inlay.model.load import load_base, load_tokenizer
from inlay.surface.peft_model import PeftModel
from inlay.surface.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)


class AutoPeftModel:
    """Loads base and adapter for the task that the adapter's settings name."""

    model: ClassVar[type[PeftModel]] = PeftModel
    task: ClassVar[str | None] = None

    def __init__(self) -> None:
        """Refuse: there is only `from_pretrained`."""
        raise TypeError(
            f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(folder)"
        )

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        *,
        revision: str | None = None,
        quantize: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        check_base: bool = True,
    ) -> PeftModel:
        """Return the base that the adapter's settings name, with the adapter of the folder.

        quantize, dtype (once torch_dtype), device, trust_remote_code: of the base, as in
        `load_base`; a base that is packed on the disk needs no quantize.
        device_map: transformers' way to say the device; one for all. A tokenizer in the folder
        with more tokens than the base has makes the embeddings grow, as they had when the adapter
        was trained.
        """
        folder = files.fetch(model_id, revision)
        settings = config or files.read_config(folder)
        name = settings.base_model_name_or_path
        if not name:
            raise UserError(
                f"{folder / files.CONFIG} does not name its base (base_model_name_or_path): load "
                "the base and use "
                "PeftModel.from_pretrained(base, folder)"
            )
        task = cls.task or settings.task_type
        base, _ = load_base(
            name,
            quantize,
            dtype=dtype if dtype is not None else torch_dtype,
            device=device if device is not None else _one_device(device_map),
            task_type=task,
            revision=settings.revision,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = load_tokenizer(folder)
        if tokenizer is not None and len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer))
        kind = cls.model
        return kind.from_pretrained(
            base, folder, adapter_name, is_trainable, settings, check_base=check_base
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` for causal language models."""

    model, task = PeftModelForCausalLM, "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for sequence-to-sequence models."""

    model, task = PeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for classification of whole sequences."""

    model, task = PeftModelForSequenceClassification, "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for classification of tokens."""

    model, task = PeftModelForTokenClassification, "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for extractive question answering."""

    model, task = PeftModelForQuestionAnswering, "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for embeddings."""

    model, task = PeftModelForFeatureExtraction, "FEATURE_EXTRACTION"


def _one_device(device_map: Any) -> torch.device | str | None:
    """Return the device that a device_map means; UserError where it means several."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None or device_map == "auto":
        return None
    if isinstance(device_map, int):
        return f"cuda:{device_map}"
    if isinstance(device_map, str | torch.device) and not str(device_map).startswith("balanced"):
        return device_map
    raise UserError(
        f"device_map={device_map!r:.60} spreads the base over several devices, which is not there "
        "yet; give one device, such as cuda:0, or auto"
    )
