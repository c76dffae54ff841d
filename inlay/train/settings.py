"""The settings of a training run, each stated once; recipe and command line derive from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from inlay.core.errors import UserError

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]
Optimizer = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lorafa", "riemannian"
]
SCHEDULES, PRECISIONS = get_args(Schedule), get_args(Precision)
OPTIMIZERS = get_args(Optimizer)
PAGED = "paged_"
"""Begins the name of an optimizer whose moments lie elsewhere than those of the one without it."""
POSITIVE = (
    *("num_epochs", "max_steps", "micro_batch_size", "gradient_accumulation_steps"),
    *("eval_batch_size", "eval_steps", "save_steps", "save_total_limit", "logging_steps"),
    "early_stopping_patience",
)
NOT_NEGATIVE = ("warmup_steps", "weight_decay", "max_grad_norm", "early_stopping_threshold", "seed")
# what a resumed run may have otherwise: how long it goes on, what it measures and writes
MAY_CHANGE = (
    *("num_epochs", "max_steps", "eval_batch_size", "eval_steps", "save_steps"),
    *("save_total_limit", "logging_steps", "restore_best"),
    *("early_stopping_patience", "early_stopping_threshold"),
    "offload_activations",
    "packing",  # what came of it must be the same, and stands beside these
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: steps, optimizer, precision, and what to write when."""

    num_epochs: float = 1.0
    """Passes over the training rows; a fraction ends within one."""

    max_steps: int | None = None
    """Optimizer steps, in place of num_epochs."""

    micro_batch_size: int = 4
    """Rows to a forward pass on one device; fewer take less memory, with the same result."""

    gradient_accumulation_steps: int = 4
    """Micro-batches to one optimizer step: a step sees micro_batch_size * this * devices rows."""

    eval_batch_size: int | None = None
    """Rows to a forward pass of an evaluation; left out = micro_batch_size."""

    packing: bool | None = None
    """Join each micro-batch into one row without padding; changes the speed, not the result. Left
    out = where `fast`, and the model is seen to keep the rows apart, also in what its attention
    costs; else rows are padded."""

    fast: bool = True
    """Compute by fused paths, the same up to rounding; false = by the plain ones alone."""

    compile: bool = False
    """Compile the repeated layers by torch.compile, in place of the fused paths within them. The
    first steps take up to a minute more; it pays in bfloat16 and on long runs, if at all: measure
    (docs/speed.md)."""

    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""

    lr_scheduler: Schedule = "cosine"
    """After the warmup: half a cosine or a straight line down to 0, or the peak throughout."""

    warmup_ratio: float = 0.03
    """Part of all steps over which the learning rate rises from 0 in a straight line."""

    warmup_steps: int | None = None
    """Steps of the warmup, in place of warmup_ratio."""

    optimizer: Optimizer = "adamw"
    """adamw, or adamw_8bit: its two moments in 8 bits, a quarter of their memory, for slower steps;
    or, before either name, paged_: the moments lie in the host's memory, and two pages of them at a
    time on the GPU, with the same result; or lorafa: of each LoRA only B trains, along AdamW's step
    that comes nearest to full fine-tuning's, and A stays as it began, which takes less memory; or
    riemannian: AdamW along the gradients of the product B A, however its length is shared out."""

    loraplus_lr_ratio: float | None = None
    """LoRA+: the learning rate of a LoRA's B is this many times that of its A; left out = 1."""

    loraplus_lr_embedding: float = 1e-6
    """LoRA+: the learning rate of adapters on embeddings, in place of learning_rate."""

    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only: never on biases, norms, or other vectors."""

    adam_beta1: float = 0.9
    """Decay of AdamW's running mean of the gradient."""

    adam_beta2: float = 0.999
    """Decay of AdamW's running mean of the squared gradient."""

    adam_epsilon: float = 1e-8
    """Added to AdamW's denominator."""

    max_grad_norm: float = 1.0
    """A step's gradient is scaled down to this 2-norm where it is larger; 0 = never."""

    precision: Precision = "auto"
    """Of the forward and backward arithmetic; the trained weights stay as they are.

    auto = bfloat16 where the model holds bfloat16 weights or the device multiplies it natively
    (CUDA compute 8.0 and up, CPUs with AMX or AVX512-BF16); for the same numbers on every machine
    say float32."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, not keep them: slower, much less memory."""

    offload_activations: bool = False
    """Keep what checkpointed layers are fed in the host's memory until the backward pass; on a CUDA
    device, with gradient_checkpointing."""

    eval_steps: int | None = None
    """Steps between evaluations; left out = after each epoch. There is always one at the end."""

    early_stopping_patience: int | None = None
    """Evaluations in a row without a lower loss after which the run ends; left out = never."""

    early_stopping_threshold: float = 0.0
    """By how much the evaluation loss must fall to count as lower."""

    restore_best: bool = False
    """End with the weights of the lowest evaluation loss instead of the last ones."""

    save_steps: int | None = 100
    """Steps between checkpoints; left out = only at the end (and when the run is told to stop)."""

    save_total_limit: int = 2
    """Checkpoints kept; the newest that verifies and the best one are never removed."""

    logging_steps: int = 1
    """Steps between lines of events.jsonl; a line holds the mean over them."""

    seed: int = 42
    """Of the order of rows and of dropout; both depend on it and the step alone, so that a resumed
    run equals a whole one."""

    def validate(self) -> None:
        """Raise UserError for the first value that cannot be: what it is, what it may be."""
        for name in POSITIVE:
            self._require(name, lambda value: value > 0, "above 0")
        for name in ("learning_rate", "adam_epsilon"):
            self._require(name, lambda value: 0 < value < math.inf, "above 0 and finite")
        for name in NOT_NEGATIVE:
            self._require(name, lambda value: value >= 0, "0 or more")
        self._require("warmup_ratio", lambda value: 0 <= value <= 1, "between 0 and 1")
        for name in ("adam_beta1", "adam_beta2"):
            self._require(name, lambda value: 0 <= value < 1, "at least 0 and below 1")
        for name in ("loraplus_lr_ratio", "loraplus_lr_embedding"):
            self._require(name, lambda value: 0 < value < math.inf, "above 0 and finite")
        self._require("optimizer", OPTIMIZERS.__contains__, "one of " + ", ".join(OPTIMIZERS))
        if self.optimizer == "lorafa" and self.loraplus_lr_ratio is not None:
            raise UserError(
                f"train.loraplus_lr_ratio is {self.loraplus_lr_ratio!r}, but with optimizer lorafa "
                "there is no A to be slower than: set learning_rate alone"
            )
        if self.compile and self.gradient_checkpointing:
            raise UserError(
                "train.compile and gradient_checkpointing are both set, but torch.compile cannot "
                "look into checkpointed layers: leave one of them out"
            )
        if self.offload_activations and not self.gradient_checkpointing:
            raise UserError(
                "train.offload_activations is true, but without checkpoints most of what is kept "
                "is needed at once: set train.gradient_checkpointing: true as well"
            )
        self._require("lr_scheduler", SCHEDULES.__contains__, "one of " + ", ".join(SCHEDULES))
        self._require("precision", PRECISIONS.__contains__, "one of " + ", ".join(PRECISIONS))

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the run it goes on with.

        Where the optimizer's moments lie is none of them.
        """
        found = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in MAY_CHANGE
        }
        return found | {"optimizer": self.optimizer.removeprefix(PAGED)}

    def _require(self, name: str, holds: Callable[[Any], bool], what: str) -> None:
        value = getattr(self, name)
        # NaN holds nothing, and is refused with the rest
        if value is not None and not holds(value):
            raise UserError(f"train.{name} is {value!r}; it must be {what}")
