"""X-LoRA's classifier: h [T, D] -> s [T, L, N], the weights of N LoRAs in L layers for each token.

h are the last hidden states of a first run of the model; a ReLU and dropout stand between layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapter import Shared
from inlay.core.errors import UserError
from inlay.core.selection import Selection

PREFIX = "internal_xlora_classifier"
"""What PEFT calls it in its files."""


class Classifier(Shared):
    """The network from hidden states to weights, and the first run that it reads."""

    def __init__(self, config: Any, sites: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make it, as PyTorch starts linear layers."""
        super().__init__()
        self.config = config
        width, out = config.hidden_size or 1, len(config.adapters)
        if config.layerwise_scalings:
            out *= sites
        layers: list[nn.Module] = []
        for _ in range(config.xlora_depth - 1):
            layers += [nn.Linear(width, config.xlora_size, device=device, dtype=dtype), nn.ReLU()]
            if config.xlora_dropout_p:
                layers.append(nn.Dropout(config.xlora_dropout_p))
            width = config.xlora_size
        self.layers = nn.Sequential(*layers, nn.Linear(width, out, device=device, dtype=dtype))

    @property
    def key(self) -> str:
        """What the weights are called in a call's `said`: no other mixture's name."""
        return f"weights {id(self)}"

    def ahead(
        self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], selection: Selection
    ) -> dict[str, Tensor]:
        """Return the weights [B, T, L or 1, N] of a call, after a run of the model for them."""
        if kwargs.get("past_key_values") is not None:
            raise UserError(
                "X-LoRA reads the whole text twice and keeps no cache: generate(use_cache=False)"
            )
        told = {key: value for key, value in kwargs.items() if key != "labels"}
        told |= {"output_hidden_states": True, "return_dict": True}
        if hasattr(model.config, "use_cache"):
            told["use_cache"] = False
        alike = self.config.scaling_pass_value
        with torch.no_grad():
            if alike:
                real = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
                same = torch.full((*real.shape[:2], 1, len(self.config.adapters)), alike)
                with selection.using(said={self.key: self._chosen(same.to(real.device))}):
                    hidden = model(*args, **told).hidden_states[-1]
            else:
                hidden = model(*args, **told).hidden_states[-1]
        out = self.layers(hidden.to(next(self.parameters()).dtype))
        weights = out.view(*out.shape[:2], -1, len(self.config.adapters))
        if self.config.enable_softmax:
            weights = (weights / self.config.softmax_temperature).softmax(-1)
        return {self.key: self._chosen(weights)}

    def _chosen(self, weights: Tensor) -> Tensor:
        """Return the weights, zero but for the largest where only these are mixed."""
        if self.config.top_k_lora is not None:
            largest = weights.topk(self.config.top_k_lora, -1).indices
            weights = weights * torch.zeros_like(weights).scatter_(-1, largest, 1)
        if self.config.enable_softmax_topk:
            none = weights == 0
            weights = weights.masked_fill(none, -torch.inf).softmax(-1).masked_fill(none, 0)
        return weights

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names."""
        return {f"{PREFIX}.{n}": (n, tuple(p.shape)) for n, p in self.named_parameters()}
