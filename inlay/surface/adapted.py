"""The level between `PeftModel` and its base: paths read `base_model.model....`, as PEFT's do."""

from __future__ import annotations

from typing import Any

from torch import nn


class Adapted(nn.Module):
    """The base with its hosts, a level below `PeftModel`: paths read `base_model.model....`."""

    def __init__(self, model: nn.Module) -> None:
        """Hold `model`."""
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return the model's attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
