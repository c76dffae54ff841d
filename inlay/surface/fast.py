"""The fast paths of a run for loops of one's own: put on a model, and taken off again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.model.accelerate import by_nodes
from inlay.model.fast import fast_paths, is_fast


def fast(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> FastPaths:
    """Let `model` compute by fast paths, until what this returns is removed or its `with` ends.

    The results, forward and backward, are those of the plain layers up to the order of sums: in any
    loop, under autocast, activation checkpointing and transformers' Trainer, in training and in
    generation. Adapters may be added, switched, merged and taken out meanwhile. Weights may be
    trained, moved and loaded; what a gradient of a gradient needs is not there (RuntimeError).

    example_inputs: arguments of a call, model(**example_inputs); a few tokens are enough. They are
    computed a few times, without gradient and dropout, to see what each part is fed. Left out, those
    that transformers has for its models. Attention blocks take part that are called without a cache
    for keys here and in training (use_cache=False).

    UserError: a model that has fast paths already; example inputs that are not given by name; none,
    where the model cannot be called with transformers' own.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"fast() takes a model, not a {type(model).__name__}")
    if is_fast(model):
        raise UserError(
            "the model computes by fast paths already: remove() those first, or go on with them"
        )
    if example_inputs is not None and not isinstance(example_inputs, Mapping):
        raise UserError(
            f"example_inputs is a {type(example_inputs).__name__}: give the arguments of a call by "
            'name, such as {"input_ids": ids}'
        )
    stack = ExitStack()
    if example_inputs is not None:
        found = stack.enter_context(fast_paths(model, lambda: model(**example_inputs)))
        return FastPaths(model, stack, *found)
    own = _own_inputs(model)
    try:
        found = stack.enter_context(fast_paths(model, lambda: model(**own)))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be called with the example inputs that transformers "
            f"has for it ({error}): give some, fast(model, batch)"
        ) from error
    return FastPaths(model, stack, *found)


class FastPaths:
    """What computes fast in a model, until it is removed."""

    def __init__(
        self, model: nn.Module, stack: ExitStack, blocks: list[nn.Module], attention: bool
    ) -> None:
        """Say what `stack` takes off again; `fast` does."""
        self._model, self._stack = model, stack
        self.blocks = blocks
        """The norms, gated MLPs and the like that compute in a form of their own."""
        self.attention = attention
        """Whether the attention of rows without padding is ours, where the layers let it."""

    @property
    def layers(self) -> list[nn.Module]:
        """The adapted layers of which base and active adapter are computed together now."""
        return list[nn.Module](by_nodes(self._model))

    def remove(self) -> None:
        """Let the model compute by its plain layers again; a second time does nothing."""
        self._stack.close()
        self.blocks, self.attention = [], False

    def __enter__(self) -> FastPaths:
        """Return this."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove them."""
        self.remove()

    def __repr__(self) -> str:
        """Return how much of the model is fast."""
        adapted = sum(isinstance(module, Inlaid) for module in self._model.modules())
        return (
            f"FastPaths({len(self.layers)} of {adapted} adapted layers, {len(self.blocks)} blocks, "
            f"attention: {self.attention})"
        )


def _own_inputs(model: nn.Module) -> dict[str, Any]:
    """Return transformers' example inputs for `model`, where that takes its inputs."""
    own = getattr(model, "dummy_inputs", None)
    if not isinstance(own, Mapping):
        raise UserError(
            f"{type(model).__name__} has no example inputs of its own: give some, "
            "fast(model, batch), such as a batch of the training"
        )
    device = next((p.device for p in model.parameters()), None)
    return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in own.items()}
