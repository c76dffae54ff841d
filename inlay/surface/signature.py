"""The names of a model's inputs, for callers that read a signature before they call.

transformers' Trainer drops the columns that `forward` does not name, and takes for labels those
names that have "label" in them. `PeftModel` hands on whatever it is given, so its classes say here
what the models of their task take.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
OTHER = ("pixel_values", "pixel_mask", "input_features", "input_values")
SPANS = ("start_positions", "end_positions")


def forward_of(*inputs: str) -> Callable[..., Any]:
    """Return a `forward` for a subclass of `PeftModel`, whose signature names `inputs`."""

    def forward(
        self: Any, *args: Any, adapter_names: Any = None, task_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Return what the model returns, with the active adapters, or each row with its own."""
        with self.routed(adapter_names, task_ids):
            return self.base_model.penalized(self.base_model(*args, **kwargs))

    kinds = inspect.Parameter
    named = [kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=None) for name in inputs]
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kinds("self", kinds.POSITIONAL_OR_KEYWORD),
            *named,
            kinds("adapter_names", kinds.KEYWORD_ONLY, default=None),
            kinds("task_ids", kinds.KEYWORD_ONLY, default=None),
            kinds("kwargs", kinds.VAR_KEYWORD),
        ]
    )
    return forward


def takes_anything(model: Any) -> bool:
    """Return whether the model's own `forward` takes arguments that it does not name."""
    kinds = (p.kind for p in inspect.signature(model.forward).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds
