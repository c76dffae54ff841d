"""Prompt tuning: [P; E(x)] in place of E(x).   P [V, D] trained, E(x) [T, D] the embeddings of x.

Lester et al., arXiv:2104.08691. A file holds P as `prompt_embeddings`; of an encoder-decoder it has
2 V rows, as in PEFT, of which the first V are used.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.prompted import PromptConfig, Virtual, check_width, word_embeddings


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptConfig):
    """Prompt tuning's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.PROMPT_TUNING

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    """Where P starts: normal, the embeddings of random tokens, or those of a text."""
    prompt_tuning_init_text: str | None = None
    """The text to start from, repeated or cut to the number of virtual tokens."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer that the text is read with: a folder or hub id."""
    tokenizer_kwargs: dict[str, Any] | None = None
    """More arguments of the tokenizer."""

    def __post_init__(self) -> None:
        """Check the start; UserError names what it lacks."""
        super().__post_init__()
        start = self.prompt_tuning_init
        for field in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if start == "TEXT" and not getattr(self, field):
                raise UserError(f"prompt_tuning_init='TEXT' needs {field}")
        if self.tokenizer_kwargs and start != "TEXT":
            raise UserError("tokenizer_kwargs go with prompt_tuning_init='TEXT' alone")


class PromptTuning(Virtual):
    """P, before the embeddings of every row."""

    config: PromptTuningConfig

    def make(self, base: Base) -> None:
        """Make P."""
        config = self.config
        told = config.num_virtual_tokens, config.num_transformer_submodules, config.token_dim
        count, twice, width = (n or 0 for n in told)  # `filled` has filled them in
        check_width(base.module, width)
        self.prompt = self.parameter(count * twice, width)

    @torch.no_grad()
    def reset(self, base: Base) -> None:
        """Start P as the configuration says."""
        if self.config.prompt_tuning_init not in ("SAMPLE_VOCAB", "TEXT"):
            nn.init.normal_(self.prompt)
            return
        embed = word_embeddings(base.module)
        ids = torch.tensor(self._start(embed.weight.shape[0]), device=embed.weight.device)
        self.prompt.copy_(embed(ids))

    def _start(self, vocabulary: int) -> list[int]:
        count = len(self.prompt)
        if self.config.prompt_tuning_init == "SAMPLE_VOCAB":
            return torch.randint(vocabulary, (count,)).tolist()
        from transformers import AutoTokenizer

        given = dict(self.config.tokenizer_kwargs or {})
        if given.pop("trust_remote_code", False):
            raise UserError("tokenizer_kwargs: code of a tokenizer's own is not run")
        text = self.config.prompt_tuning_init_text
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.config.tokenizer_name_or_path, **given)
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer_name_or_path={self.config.tokenizer_name_or_path!r} cannot be read: "
                f"{str(error).splitlines()[0]}"
            ) from error
        ids: list[int] = tokenizer(text)["input_ids"]
        if not ids or max(ids) >= vocabulary:
            raise UserError(
                f"prompt_tuning_init_text={text!r:.80} gives no tokens of this model; its "
                f"vocabulary has {vocabulary}"
            )
        return (ids * (count // len(ids) + 1))[:count]

    def virtual(self) -> Tensor:
        """Return P's first V rows, which are all but in an encoder-decoder."""
        return self.prompt[: self.config.num_virtual_tokens]

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's one key."""
        del base
        return {"prompt_embeddings": ("prompt", tuple(self.prompt.shape))}


METHOD = Method(PromptTuningConfig, PromptTuning)
