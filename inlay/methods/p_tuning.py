"""P-tuning: [f(P); E(x)] in place of E(x), f a small network over trained vectors P [N, D].

Liu et al., arXiv:2103.10385.  N virtual tokens, D the width of the embeddings E(x), M hidden. f is
an MLP, W_3 relu(W_2 relu(W_1 P)), or an LSTM over P both ways with W_2 relu(W_1 .) on top. A file
holds f(P) alone; of an encoder-decoder N = 2 V rows, as in PEFT, of which the first V are used.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal, Self

from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Rank
from inlay.core.prompted import PromptConfig, check_width
from inlay.methods._computed import Computed, Network

DEPTH = 2
"""Layers of the LSTM unless told; of the MLP there are always as many hidden ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(PromptConfig):
    """P-tuning's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.P_TUNING

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """What computes the virtual tokens while they are trained."""
    encoder_hidden_size: Rank | None = None
    """Width of the network's hidden layers; unset = token_dim."""
    encoder_num_layers: Rank = DEPTH
    """Layers of the LSTM; the MLP has no other number of hidden layers than two."""
    encoder_dropout: Dropout = 0.0
    """Probability of zeroing what goes from one layer of the LSTM to the next, in training."""

    def __post_init__(self) -> None:
        """Refuse settings of an LSTM that an MLP would not heed."""
        super().__post_init__()
        idle = self.encoder_num_layers != DEPTH or self.encoder_dropout
        # of a trained adapter there is no network left to heed them
        if self.encoder_reparameterization_type == "MLP" and idle and not self.inference_mode:
            raise UserError(
                f"encoder_num_layers={self.encoder_num_layers} and encoder_dropout="
                f"{self.encoder_dropout} are the LSTM's: leave them out, or say "
                "encoder_reparameterization_type: LSTM"
            )

    def filled(self, model: Any) -> Self:
        """Return the configuration with what is unset taken from the model's."""
        whole = super().filled(model)
        return whole.replace(encoder_hidden_size=whole.encoder_hidden_size or whole.token_dim)


class PTuning(Computed):
    """The virtual tokens, before the embeddings of every row."""

    config: PromptEncoderConfig

    def size(self) -> tuple[int, int]:
        """Return N and D."""
        config = self.config
        return self.count * (config.num_transformer_submodules or 1), config.token_dim or 1

    def make(self, base: Base) -> None:
        """Make P and the network; UserError where the width is not the embeddings'."""
        check_width(base.module, self.size()[1])
        super().make(base)

    def network(self) -> Network:
        """Return the MLP or the LSTM."""
        config, width = self.config, self.size()[1]
        hidden = config.encoder_hidden_size or width
        if config.encoder_reparameterization_type == "MLP":
            sizes = [width, hidden, hidden, width]
            layers: list[nn.Module] = []
        else:
            depth = config.encoder_num_layers
            lstm = nn.LSTM(
                width,
                hidden,
                depth,
                bidirectional=True,
                dropout=config.encoder_dropout if depth > 1 else 0.0,
                **self._made(),
            )
            sizes, layers = [2 * hidden, 2 * hidden, width], [BothWays(lstm)]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [self._linear(inputs, outputs), nn.ReLU()]
        return Network(self._inputs(width), *layers[:-1])


class BothWays(nn.Module):
    """An LSTM's outputs [N, 2 M] of one sequence [N, D], without its states."""

    def __init__(self, lstm: nn.LSTM) -> None:
        """Hold the LSTM."""
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        out: Tensor = self.lstm(x)[0]
        return out


METHOD = Method(PromptEncoderConfig, PTuning)
