"""Virtual tokens that a network computes while they are trained; a file holds what it computes.

N virtual tokens in all, W their width, D that of the network's trained inputs.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.base import Base
from inlay.core.prompted import Virtual


class Network(nn.Module):
    """Trained inputs [N, D], and layers that make virtual tokens [N, W] of them."""

    def __init__(self, inputs: nn.Parameter, *layers: nn.Module) -> None:
        """Hold the inputs and the layers."""
        super().__init__()
        self.inputs, self.layers = inputs, nn.Sequential(*layers)

    def forward(self) -> Tensor:
        """Return the virtual tokens."""
        out: Tensor = self.layers(self.inputs)
        return out


class Computed(Virtual):
    """A table [N, W] of virtual tokens, or a network that computes it.

    What is read of a file is a table, and trains as one; the network is saved beside the file, and
    is back where the adapter is loaded to be trained.
    """

    computed = ("prompt_embeddings",)
    table: nn.Parameter | None

    def size(self) -> tuple[int, int]:
        """Return N and W."""
        raise NotImplementedError

    def network(self) -> Network | None:
        """Return a new network, or None where the table is trained without one."""
        return None

    def make(self, base: Base) -> None:
        """Make the network, or else the table."""
        del base
        self.encoder = self.network()
        self.table = None if self.encoder is not None else self.parameter(*self.size())

    @torch.no_grad()
    def reset(self, base: Base) -> None:
        """Start from random virtual tokens."""
        del base
        if self.encoder is None:
            nn.init.normal_(self._held_table())
            return
        nn.init.normal_(self.encoder.inputs)
        for layer in self.encoder.modules():
            if isinstance(layer, nn.Linear | nn.LSTM):
                layer.reset_parameters()

    @property
    def prompt_embeddings(self) -> Tensor:
        """The virtual tokens [N, W], as a file holds them."""
        return self._held_table() if self.encoder is None else self.encoder()

    def virtual(self) -> Tensor:
        """Return the first V virtual tokens, which are all but in an encoder-decoder."""
        return self.prompt_embeddings[: self.count]

    def fill(self, name: str, value: Tensor) -> None:
        """Take a table in the place of the network."""
        del name
        if self.encoder is None and not self._held_table().is_meta:
            self._held_table().data.copy_(value)
            return
        own = next(itertools.chain(self.parameters(), self.buffers()))
        trains = any(p.requires_grad for p in self.parameters())
        self._device, self._dtype, self.encoder = value.device, own.dtype, None
        self.table = nn.Parameter(value.to(own.dtype), requires_grad=trains)

    def unsaved(self) -> dict[str, Tensor]:
        """Return the network's parameters."""
        return {} if self.encoder is None else self.encoder.state_dict()

    def resume(self, tensors: dict[str, Tensor]) -> None:
        """Take the network back; ValueError where it computes another table than the one here."""
        network, table = self.network(), self._held_table()
        if network is None:
            raise ValueError("its settings have no network")
        network.load_state_dict(tensors)
        with torch.no_grad():
            if not torch.allclose(network(), table, rtol=1e-3, atol=1e-4):
                raise ValueError("it computes other virtual tokens")
        self.encoder, self.table = network.requires_grad_(table.requires_grad), None

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's one key."""
        del base
        return {"prompt_embeddings": ("prompt_embeddings", self.size())}

    def _inputs(self, width: int) -> nn.Parameter:
        return self.parameter(self.size()[0], width)

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, **self._made())

    def _made(self) -> dict[str, Any]:
        return {"device": self._device, "dtype": self._dtype}

    def _held_table(self) -> nn.Parameter:
        assert self.table is not None
        return self.table
