"""Layers that hold their weight in plain numbers: linear, conv, embedding, norm.

O output features, I input features, R rank, k kernel size.
"""

from __future__ import annotations

import math
from typing import TypeGuard, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from inlay.core.base import Layer, store
from inlay.core.errors import UserError
from inlay.core.raw import PLAIN
from inlay.kernels import matmul


class Linear(Layer):
    """`nn.Linear`: y = x W^T + b."""

    kind = "linear"
    module: nn.Linear

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a linear that holds its weight as [out, in] floats."""
        return isinstance(module, nn.Linear) and module.weight.dtype in PLAIN

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """The weight's shape [O, I]."""
        return self.module.out_features, self.module.in_features

    def weight(self) -> Tensor:
        """Return W [O, I]."""
        return self.module.weight

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W^T + b."""
        return F.linear(x, weight, bias)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Return x A^T."""
        return F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Return h B^T."""
        return F.linear(h, b)

    def forward_product(self, x: Tensor) -> Tensor:
        """Return x W^T + b [N, O] of x [N, I], computed in its dtype; no gradient is noted."""
        bias = self.bias()
        return matmul.linear(
            x, self.weight().to(x.dtype), None if bias is None else bias.to(x.dtype)
        )

    def backward_product(self, grad: Tensor) -> Tensor:
        """Return grad W [N, I] of grad [N, O], computed in its dtype; no gradient is noted."""
        return matmul.product(grad, self.weight().to(grad.dtype))

    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put weight [O, I] and bias [O] in place."""
        store(self.module, weight=weight, bias=bias)


class Conv1D(Linear):
    """transformers' `Conv1D` (GPT-2): a linear that stores its weight transposed, [in, out]."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` looks like transformers' Conv1D, which is not imported for it."""
        weight = getattr(module, "weight", None)
        return (
            type(module).__name__ == "Conv1D"
            and hasattr(module, "nf")
            and isinstance(weight, Tensor)
            and weight.ndim == 2
        )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """The weight's shape [O, I], transposed from what is stored."""
        i, o = self.module.weight.shape
        return o, i

    def weight(self) -> Tensor:
        """Return W [O, I], a view of the stored transpose."""
        return self.module.weight.T

    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put weight [O, I], transposed, and bias [O] in place."""
        store(self.module, weight=weight.T, bias=bias)


class Conv(Layer):
    """`nn.Conv1d`, `2d`, `3d` in one group: the weight is [O, C, *k], seen as [O, C*k1*k2...]."""

    kind = "conv"
    module: nn.Conv2d  # the 1d and 3d forms have the same members

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is a convolution, not transposed and in one group."""
        return _is_conv(module) and module.groups == 1 and module.weight.dtype in PLAIN

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """The weight's shape [O, C*k1*k2...]."""
        o, *rest = self.module.weight.shape
        return o, math.prod(rest)

    def weight(self) -> Tensor:
        """Return W [O, I] with I = C*k1*k2..., in the stored order."""
        return self.module.weight.flatten(1)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution with this weight; stride, padding and dilation are the layer's."""
        kernel = weight.reshape(-1, *self.module.weight.shape[1:])
        return cast(Tensor, self.module._conv_forward(x, kernel, bias))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Return the convolution with A [R, I]: R channels at the output's resolution."""
        return self.apply(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Return B on the channels of h, position by position."""
        channels = (
            1 - self.module.weight.ndim
        )  # counted from the end, for an input may come without a batch
        return F.linear(h.movedim(channels, -1), b).movedim(-1, channels)

    def spread(self, vector: Tensor) -> Tensor:
        """Return `vector` [O] as [O, 1, 1...], to meet channels before the places."""
        return vector.reshape(-1, *[1] * (self.module.weight.ndim - 2))

    def file_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return A's and B's shapes as PEFT's two convolutions: [r, C, *k] and [O, r, 1...]."""
        o, *rest = self.module.weight.shape
        return (r, *rest), (o, r, *[1] * (len(rest) - 1))

    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put weight [O, I], folded to [O, C, *k], and bias [O] in place."""
        store(self.module, weight=weight.reshape(self.module.weight.shape), bias=bias)


class Embedding(Layer):
    """`nn.Embedding`: column id of W [dim, vocab]; what a subclass does besides (a scale) is kept.

    The padding id gives no gradient to its column, here as in torch: a factor A that starts from
    zero stays zero there.
    """

    kind = "embedding"
    module: nn.Embedding

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is an embedding of plain floats that leaves its weight alone."""
        return _is_embedding(module) and not _odd(module) and module.weight.dtype in PLAIN

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """The weight's shape [dim, vocab]."""
        return self.module.embedding_dim, self.module.num_embeddings

    def weight(self) -> Tensor:
        """Return W [dim, vocab], a view of the stored transpose."""
        return self.module.weight.T

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the columns of `weight` for the ids x; an embedding has no bias."""
        assert bias is None
        layer = self.module
        if type(layer).forward is not nn.Embedding.forward:
            return cast(Tensor, functional_call(layer, {"weight": weight.T}, (x,)))
        return F.embedding(x, weight.T, layer.padding_idx, sparse=layer.sparse)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Return the columns of A [R, vocab] for the ids x."""
        return self.apply(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Return h B^T."""
        return F.linear(h, b)

    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put weight [dim, vocab], transposed, in place."""
        assert bias is None
        store(self.module, weight=weight.T)


class Norm(Layer):
    """A normalization with a weight vector [O]: LayerNorm, GroupNorm, and every RMSNorm."""

    kind = "norm"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return whether `module` is called a norm and holds a vector, perhaps a bias, no more."""
        names = set(dict(module.named_parameters()))
        weight = getattr(module, "weight", None)
        return (
            "norm" in type(module).__name__.lower()
            and names in ({"weight"}, {"weight", "bias"})
            and isinstance(weight, Tensor)
            and weight.ndim == 1
            and not isinstance(module, nn.modules.batchnorm._NormBase)
        )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """The weight's size [O], with 1 for the inputs it has not."""
        return len(self.weight()), 1

    def weight(self) -> Tensor:
        """Return the weight [O] as the module stores it."""
        return cast(Tensor, self.module.weight)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the module's own forward with these vectors."""
        own = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return cast(Tensor, functional_call(self.module, own, (x,)))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Refuse: a norm multiplies by a vector, so there is nothing of low rank in it."""
        raise TypeError(f"{type(self.module).__name__} is a norm: it has no matrix to factor")

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Refuse, as `down` does."""
        return self.down(h, b)

    def spread(self, vector: Tensor) -> Tensor:
        """Refuse: along which axis the features run, only the norm itself knows."""
        raise TypeError(f"{type(self.module).__name__} is a norm: use apply")

    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put weight [O] and bias [O] in place."""
        store(self.module, weight=weight, bias=bias)


class Opaque(Layer):
    """Any other module: it can be replaced or wrapped, but has no one weight to change."""

    kind = "module"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Return True: this is what remains."""
        del module
        return True

    @property
    def features(self) -> tuple[int, int]:
        """The widths (O, I) of the last and of the first matrix in the module."""
        found = [
            kind(module).shape
            for module in self.module.modules()
            for kind in (Linear, Conv1D)
            if kind.accepts(module)
        ]
        if not found:
            raise UserError(
                f"{type(self.module).__name__} holds no linear layer, so how wide it is cannot be "
                "told: leave it out of target_modules, or name the layers in it"
            )
        return found[-1][0], found[0][1]

    @property
    def reason(self) -> str:
        """Why a layer of a known kind stands here."""
        module = self.module
        if _is_conv(module) and module.groups != 1:
            # W holds only the block diagonal: a low-rank update over all channels could not merge
            return (
                f"with groups={module.groups}, an update across groups has no place in its weight"
            )
        if _is_embedding(module) and _odd(module):
            return _odd(module)
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype not in PLAIN:
            return f"its weight is packed as {weight.dtype}".replace("torch.", "")
        return ""

    def _none(self) -> TypeError:
        return TypeError(f"{type(self.module).__name__} has no single weight")

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Raise TypeError: there is no one weight."""
        raise self._none()

    def weight(self) -> Tensor:
        """Raise TypeError: there is no one weight."""
        raise self._none()

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Raise TypeError: there is no one weight."""
        raise self._none()

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Raise TypeError: there is no one weight."""
        raise self._none()

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Raise TypeError: there is no one weight."""
        raise self._none()

    def store(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raise TypeError: there is no one weight."""
        raise self._none()


def _is_conv(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _is_embedding(module: nn.Module) -> TypeGuard[nn.Embedding]:
    return isinstance(module, nn.Embedding)


def _odd(module: nn.Embedding) -> str:
    """Return what keeps an embedding from being the columns of a matrix, or ""."""
    if module.max_norm is not None:
        return f"with max_norm={module.max_norm}, it rewrites its weight as it runs"
    if module.scale_grad_by_freq:
        return "with scale_grad_by_freq, its gradient is not that of its weight"
    return ""


LAYERS: tuple[type[Layer], ...] = (Linear, Conv1D, Conv, Embedding, Norm, Opaque)
"""The views this file gives, the most particular first."""
