"""Multitask prompt tuning: [P * (U_k V_k); E(x)] in place of E(x), of an input x of task k.

Wang et al., arXiv:2303.02861.  P [N, D] is all tasks' own, U_k [N, R] and V_k [R, D] one task's,
multiplied entry by entry; N virtual tokens, D the width of the embeddings E(x).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Count, Rank
from inlay.core.selection import task_numbers
from inlay.methods.prompt_tuning import PromptTuning, PromptTuningConfig

SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
"""The starts that take a trained adapter's tensors."""
TENSORS = "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.MULTITASK_PROMPT_TUNING

    prompt_tuning_init: Literal[
        "RANDOM",
        "TEXT",
        "AVERAGE_SOURCE_TASKS",
        "EXACT_SOURCE_TASK",
        "ONLY_SOURCE_SHARED",
    ] = "RANDOM"  # type: ignore[assignment]
    """Where it starts: at random, P from a text, or from a trained adapter of many tasks: P with
    the mean of its tasks, with one of them, or alone."""
    prompt_tuning_init_state_dict_path: str | None = None
    """The adapter to start from: its folder, or its safetensors file."""
    prompt_tuning_init_task: Count = 0
    """The number of its task that EXACT_SOURCE_TASK takes."""
    num_ranks: Rank = 1
    """R, the rank of what a task multiplies P with."""
    num_tasks: Rank = 1
    """How many tasks there are; a call says that of each row as `task_ids`."""

    def __post_init__(self) -> None:
        """Check the start; UserError names what it lacks."""
        super().__post_init__()
        if self.prompt_tuning_init in SOURCES and not self.prompt_tuning_init_state_dict_path:
            raise UserError(
                f"prompt_tuning_init={self.prompt_tuning_init!r} needs "
                "prompt_tuning_init_state_dict_path"
            )

    def sizes(self, model: Any) -> dict[str, int]:
        """Return the model's sizes; the virtual tokens of an encoder-decoder are the encoder's."""
        return super().sizes(model) | {"num_transformer_submodules": 1}

    def filled(self, model: Any) -> Self:
        """Return the configuration with what is unset taken from the model's."""
        whole = super().filled(model)
        if whole.num_transformer_submodules != 1:
            raise UserError(
                f"num_transformer_submodules={whole.num_transformer_submodules}: virtual tokens "
                "before a decoder's input too are not supported, for PEFT generates without them: "
                "say num_transformer_submodules: 1"
            )
        return whole


class MultitaskPromptTuning(PromptTuning):
    """P, and what each task multiplies it with."""

    config: MultitaskPromptTuningConfig

    def make(self, base: Base) -> None:
        """Make P, U and V."""
        super().make(base)
        (count, width), tasks, ranks = (
            self.prompt.shape,
            self.config.num_tasks,
            self.config.num_ranks,
        )
        self.prefix_task_cols = self.parameter(tasks, count, ranks)
        self.prefix_task_rows = self.parameter(tasks, ranks, width)

    @torch.no_grad()
    def reset(self, base: Base) -> None:
        """Start as the configuration says; all tasks from the one that a source gives."""
        start = self.config.prompt_tuning_init
        super().reset(base)
        for factors in (self.prefix_task_cols, self.prefix_task_rows):
            nn.init.normal_(factors, std=0.02)
        if start not in SOURCES:
            return
        source = self._source()
        self._take("prompt", source["prompt_embeddings"])
        for name in ("prefix_task_cols", "prefix_task_rows"):
            if start == "AVERAGE_SOURCE_TASKS":
                self._take(name, source[name].mean(0, keepdim=True))
            elif start == "EXACT_SOURCE_TASK":
                task = self.config.prompt_tuning_init_task
                if task >= len(source[name]):
                    raise UserError(
                        f"prompt_tuning_init_task={task}, but "
                        f"{self.config.prompt_tuning_init_state_dict_path} has "
                        f"{len(source[name])} tasks, counted from 0"
                    )
                self._take(name, source[name][task : task + 1])

    def _take(self, name: str, value: Tensor) -> None:
        own = self.get_parameter(name)
        if value.shape[-2:] != own.shape[-2:]:
            raise UserError(
                f"{self.config.prompt_tuning_init_state_dict_path}: {name} of a task is "
                f"{list(value.shape[-2:])} there and {list(own.shape[-2:])} here: take its "
                "num_virtual_tokens and num_ranks, and its base"
            )
        own.copy_(value)

    def _source(self) -> dict[str, Tensor]:
        """Return the tensors to start from; UserError where they cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(str(self.config.prompt_tuning_init_state_dict_path)).expanduser()
        path = path / TENSORS if path.is_dir() else path
        try:
            found: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"prompt_tuning_init_state_dict_path={str(path)!r} is no safetensors file of an "
                f"adapter ({str(error).splitlines()[0]}); a pickle is not opened, for it runs code"
            ) from None
        missing = {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"} - found.keys()
        if missing:
            raise UserError(f"{path} has no {', '.join(sorted(missing))}: it is of another method")
        return found

    def rows(self, real: Tensor) -> Tensor:
        """Return P times what each row's task says, [B, N, D]."""
        tasks = task_numbers(self.selection, real, self.config.num_tasks, "num_tasks")
        own: Tensor = self.prompt * (self.prefix_task_cols @ self.prefix_task_rows)
        return own[tasks]

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's three keys."""
        found = super().keys(base)
        for name in ("prefix_task_cols", "prefix_task_rows"):
            found[name] = (name, tuple(self.get_parameter(name).shape))
        return found


METHOD = Method(MultitaskPromptTuningConfig, MultitaskPromptTuning)
