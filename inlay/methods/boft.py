"""BOFT: diag(s) W M^T, M = B_m ... B_1, each B blocks [b, b] on shuffled inputs (arXiv:2311.06243).

Liu et al.  A block is (1 - A) (1 + A)^-1, A the skew part of R [m, D, b, b], I = D b; s is [O].
B_1 turns inputs that stand beside each other; the blocks of B_i join two halves of blocks that
stand 2^(i-2) apart, as the butterflies of a fast Fourier transform: M mixes b 2^(m-1) inputs.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Count, Dropout, Whole
from inlay.core.targeted import TargetedConfig
from inlay.methods._cayley import cayley
from inlay.methods._turned import Turned, dropped


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFTConfig(TargetedConfig):
    """BOFT's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.BOFT

    boft_block_size: Count = 4
    """Inputs b of a block; must divide every adapted layer's inputs. 0 where D is given."""
    boft_block_num: Count = 0
    """Number of blocks D instead; 0 where boft_block_size is given."""
    boft_n_butterfly_factor: Annotated[int, Whole(most=32)] = 1
    """Number of factors m; with one, BOFT is OFT with a scale. More need blocks of even size, and
    b 2^(m-1) must divide the inputs."""
    boft_dropout: Dropout = 0.0
    """Share of one factor's blocks that is left out, another one at each step of training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "boft_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: no turn, and scale 1. False: random, for tests."""

    def __post_init__(self) -> None:
        """Refuse blocks of two sizes or of none."""
        super().__post_init__()
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise UserError(
                f"boft_block_size={self.boft_block_size} and boft_block_num={self.boft_block_num}: "
                "give one of the two, and 0 for the other, for their product is a layer's inputs"
            )


class Boft(Turned):
    """The turned inputs and scaled outputs of one layer."""

    on = frozenset({"linear", "conv"})
    config: BOFTConfig

    def make(self, base: Base) -> None:
        """Make R and s; UserError where the blocks do not fit the layer."""
        config, (outputs, inputs) = self.config, base.shape
        given, m = config.boft_block_size or config.boft_block_num, config.boft_n_butterfly_factor
        size = inputs // given if config.boft_block_num else given
        if inputs % given or (m > 1 and (size % 2 or inputs % (size * 2 ** (m - 1)))):
            name = "boft_block_num" if config.boft_block_num else "boft_block_size"
            raise UserError(
                f"{name}={given} with boft_n_butterfly_factor={m} does not fit a layer of {inputs} "
                f"inputs: these must be a multiple of the block's size times 2^{m - 1}"
                f"{', and that size even' * (m > 1)}; try a divisor of {inputs}, or fewer factors"
            )
        self.boft_R = self.parameter(m, inputs // size, size, size)
        self.boft_s = self.parameter(*((1, outputs) if base.kind == "conv" else (outputs, 1)))

    def reset(self, base: Base) -> None:
        """Start from no turn, and scale 1."""
        super().reset(base)
        random = 0.0 if self.config.init_weights else 0.1
        nn.init.normal_(self.boft_R, std=random)
        nn.init.normal_(self.boft_s, mean=1.0, std=random)

    def _blocks(self) -> list[Tensor]:
        """Return the rotations [D, b, b] of each factor, in training without some of one."""
        r, share = self.boft_R, self.config.boft_dropout
        # solving has no kernel for half precision
        wide = r.to(torch.promote_types(r.dtype, torch.float32))
        blocks = list(cayley((wide.mT - wide) / 2))
        if self.training and share:
            one = int(torch.randint(len(blocks), ()))
            blocks[one] = dropped(blocks[one], share)
        return blocks

    def turn(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Return x M for x [..., I], the last factor first; with `back`, x M^T."""
        factors = list(enumerate(self._blocks()))
        for i, blocks in factors if back else reversed(factors):
            blocks = (blocks.mT if back else blocks).to(x.dtype)
            pieces = _shuffled(x, blocks.shape[-1], 2**i).reshape(*x.shape[:-1], *blocks.shape[:2])
            turned = torch.einsum("...dk,dkc->...dc", pieces, blocks)
            x = _shuffled(turned.flatten(-2), blocks.shape[-1], 2**i, back=True)
        return x

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return diag(s) W M^T, and the trained bias."""
        turned, own = super().reweight(weight, bias)
        return self.boft_s.reshape(-1, 1).to(weight.dtype) * turned, own

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer makes of the turned input, scaled but for the bias."""
        below = super().forward(base, x, *args, **kwargs)
        if base.kind != "linear":  # scaled with its weight
            return below
        s, bias = self.boft_s.flatten(), self.rebias(base)
        scaled = s * below if bias is None else s * (below - bias) + bias
        return scaled.to(below.dtype)


def _shuffled(x: Tensor, size: int, apart: int, *, back: bool = False) -> Tensor:
    """Return x [..., I] with the halves beside each other that are to form a block of `size`.

    Of every 2 `apart` halves in a row, the i-th of the first half of them goes with the i-th of the
    second; with `back`, undone.
    """
    if apart == 1:  # a block's own halves, so that its size need not be even
        return x
    cut = (apart, 2) if back else (2, apart)
    return x.reshape(*x.shape[:-1], -1, *cut, size // 2).transpose(-3, -2).flatten(-4)


METHOD = Method(BOFTConfig, Boft)
