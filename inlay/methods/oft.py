"""OFT: W R^T, R = diag(R_1 ... R_D), each R_i an orthogonal block [b, b] (arXiv:2306.07280).

Qiu et al.  I = D b inputs.  A block is said by the numbers above the diagonal of a skew matrix Q,
[D, b (b - 1) / 2]: R_i = (1 - Q) (1 + Q)^-1, or the sum of powers 1 + 2 Q + 2 Q^2 ... + Q^n, which
turns the other way round (Qiu et al., arXiv:2506.19847); PEFT's files mean these two.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Count, Dropout, Scale, Whole
from inlay.core.targeted import TargetedConfig
from inlay.methods._cayley import cayley, powers, skew, within
from inlay.methods._turned import Turned, dropped


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFTConfig(TargetedConfig):
    """OFT's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.OFT

    r: Count = 0
    """Number of blocks D, in place of oft_block_size; must divide every adapted layer's inputs."""
    oft_block_size: Count = 32
    """Inputs b that a block turns; must divide every adapted layer's inputs. 0 where r is given."""
    module_dropout: Dropout = 0.0
    """Share of the blocks that are left out, another one at each step of training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "oft_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: no turn. False: random, for tests."""
    coft: bool = False
    """Keep every block near the identity: the norm of its Q is at most eps / sqrt(D)."""
    eps: Scale = 6e-5
    """How far coft lets the blocks go."""
    block_share: bool = False
    """One block for all, which is D times fewer parameters."""
    use_cayley_neumann: bool = True
    """Take a sum of powers of Q for the inverse: quicker, nearly orthogonal where Q is small."""
    num_cayley_neumann_terms: Annotated[int, Whole(most=1000)] = 5
    """Terms of that sum; three count as four, as in PEFT."""

    def __post_init__(self) -> None:
        """Refuse blocks of two sizes or of none."""
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            raise UserError(
                f"r={self.r} and oft_block_size={self.oft_block_size}: give one of the two, and 0 "
                "for the other, for their product is a layer's inputs"
            )
        if not self.eps > 0:
            raise UserError(f"eps={self.eps!r} must be above 0")


class Oft(Turned):
    """The turned inputs of one layer; of an embedding, which has ids for inputs, the outputs."""

    on = frozenset({"linear", "conv", "embedding"})
    config: OFTConfig

    def make(self, base: Base) -> None:
        """Make the numbers of Q; where a size does not divide the layer, the nearest that does."""
        config, self._ids = self.config, base.kind == "embedding"
        size = base.shape[0 if self._ids else 1]
        given = config.r or config.oft_block_size
        near = _divisor(size, given)
        if near != given:  # as in PEFT, whose files mean that; but there nobody is told
            name = "r" if config.r else "oft_block_size"
            side = "values" if self._ids else "inputs"
            warnings.warn(
                f"{name}={given} does not divide the {size} {side} of a layer: {near} is taken",
                stacklevel=2,
            )
        self._size = size // near if config.r else near
        blocks = 1 if config.block_share else size // self._size
        self.oft_R = self.parameter(blocks, self._size * (self._size - 1) // 2)

    def reset(self, base: Base) -> None:
        """Start from no turn."""
        super().reset(base)
        nn.init.normal_(self.oft_R, std=0.0 if self.config.init_weights else 0.1)

    def turn(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Return x R for x [..., I], block by block; with `back`, x R^T."""
        config, q = self.config, skew(self.oft_R, self._size)
        if config.coft:
            q = within(q, config.eps / len(q) ** 0.5)
        blocks = (
            powers(q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(-q)
        )
        if self.training and config.module_dropout and not config.block_share:
            blocks = dropped(blocks, config.module_dropout)
        pieces = x.reshape(*x.shape[:-1], -1, self._size)
        blocks = (blocks.mT if back else blocks).to(x.dtype).expand(pieces.shape[-2], -1, -1)
        return torch.einsum("...dk,dkc->...dc", pieces, blocks).flatten(-2)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W R^T, of an embedding R^T W, and the trained bias."""
        if self._ids:
            return self.turn(weight.T).T, bias
        return super().reweight(weight, bias)

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer makes of the turned input; an embedding's output is turned."""
        if not self._ids:
            return super().forward(base, x, *args, **kwargs)
        below = base(x, *args, **kwargs)
        return self.turn(below.to(self.dtype)).to(below.dtype)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's name: the numbers are the weight of a module."""
        found = super().keys(base)
        found[f"oft_{'embedding_' * self._ids}R.weight"] = found.pop("oft_R")
        return found


def _divisor(size: int, near: int) -> int:
    """Return the divisor of `size` nearest to `near`, the lower one of two."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - near))


METHOD = Method(OFTConfig, Oft)
