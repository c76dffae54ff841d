"""A layer whose weight is an embedding's too: it is adapted by the embedding's adapter.

The embedding's W is [dim, vocab]; a head has its transpose, another embedding W itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from inlay.core.adapter import Adapter, Delta, Reweight
from inlay.core.base import Base
from inlay.core.errors import UserError


class Tied(Reweight):
    """What an adapter of another site means for the same weight here; it has nothing of its own.

    PEFT's files may hold the other's factors once more under this site: they are written, and must
    be the same where they are read.
    """

    on = frozenset({"embedding", "linear"})
    computed: ClassVar[tuple[str, ...]] = ("lent_0", "lent_1")
    keeps_bias = True
    _source: tuple[Reweight, ...] = ()  # in a tuple, which registers nothing

    def make(self, base: Base) -> None:
        """Note which way round the weight is here."""
        self._turned = base.kind == "linear"
        self._told: dict[str, Tensor] = {}

    def follow(self, other: Adapter) -> None:
        """Take the embedding's adapter to compute with."""
        assert isinstance(other, Reweight)
        self._source = (other,)
        self.carries = other.carries  # type: ignore[misc]

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight as the other adapter changes it, and the bias."""
        if not self._turned:
            return self._source[0].reweight(weight, None)[0], bias
        return self._source[0].reweight(weight.T, None)[0].T, bias

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return base(x) and A^T B^T x where the other's update is B A, or as the weight says."""
        (source,) = self._source
        thin = source.factors(source.dtype) if isinstance(source, Delta) else None
        if thin is None or not isinstance(source, Delta):
            return super().forward(base, x, *args, **kwargs)
        below, (b, a) = base(x, *args, **kwargs), (thin[0].T, thin[1].T)
        down, up = (b, a) if self._turned else (a.T, b.T)
        return (below + base.up(base.down(source.dropped(x), down), up)).to(below.dtype)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names of what the other lends."""
        del base
        lent = self._source[0].lent() if self._turned else {}
        return {key: (f"lent_{i}", tuple(t.shape)) for i, (key, t) in enumerate(lent.items())}

    @property
    def lent_0(self) -> Tensor:
        """The first tensor that the other lends."""
        return next(iter(self._source[0].lent().values()))

    @property
    def lent_1(self) -> Tensor:
        """The second one."""
        return list(self._source[0].lent().values())[1]

    def fill(self, name: str, value: Tensor) -> None:
        """Keep what a file says until the other's tensors are in their places."""
        self._told[name] = value

    def complete(self, base: Base) -> None:
        """Raise UserError where a file said something else than the other's own tensors."""
        told, self._told = self._told, {}
        for name, value in told.items():
            own = getattr(self, name)
            if not value.to(own.device, own.dtype).equal(own):
                raise UserError(
                    f"{base.path!r} is tied to the embedding, but the file has other tensors for "
                    "it: set ensure_weight_tying to false in its adapter_config.json"
                )
