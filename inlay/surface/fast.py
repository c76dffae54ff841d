"""The fast paths of a run for loops of one's own: put on a model, and taken off again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.model.accelerate import by_nodes
from inlay.model.fast import fast_paths, is_fast
from inlay.model.output import base_of


def fast(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> FastPaths:
    """Let `model` compute by fast paths, until what this returns is removed or its `with` ends.

    The results, forward and backward, are those of the plain layers up to the order of sums: in any
    loop, under autocast, activation checkpointing and transformers' Trainer, in training and in
    generation. Adapters may be added, switched, merged and taken out meanwhile. Weights may be
    trained, moved and loaded; what a gradient of a gradient needs is not there (RuntimeError). A
    copy of the model (`copy.deepcopy`) has fast paths of its own, for good.

    example_inputs: arguments of a call, model(**example_inputs); a few tokens are enough. They are
    computed a few times, without gradient and dropout, to see what each part is fed. Left out,
    those that transformers has for its models. Attention blocks take part in calls without a cache
    for keys (use_cache=False, as transformers' Trainer has it).

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
    if example_inputs is not None:
        return FastPaths(model, example_inputs)
    try:
        return FastPaths(model, _own_inputs(model))
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be called with the example inputs that transformers "
            f"has for it ({error}): give some, fast(model, batch)"
        ) from error


HELD = "_fast_paths"
"""The attribute of a model that holds them: they stay on where nobody keeps what `fast` returns."""


class FastPaths:
    """What computes fast in a model, until it is removed."""

    blocks: list[nn.Module]
    """The norms, gated MLPs and the like that compute in a form of their own."""
    attention: bool
    """Whether the attention of rows without padding is ours, where the layers let it."""

    def __init__(self, model: nn.Module, call: Mapping[str, Any]) -> None:
        """Put them on a model, as model(**call) shows what its parts are fed; `fast` does."""
        self._model, self._stack = model, ExitStack()
        if "use_cache" in inspect.signature(base_of(model).forward).parameters:
            call = {"use_cache": False, **call}
        paths = fast_paths(model, lambda: model(**call))
        self.blocks, self.attention = self._stack.enter_context(paths)
        setattr(model, HELD, self)

    @property
    def layers(self) -> list[nn.Module]:
        """The adapted layers of which base and active adapter are computed together now."""
        return list[nn.Module](by_nodes(self._model))

    def remove(self) -> None:
        """Let the model compute by its plain layers again; a second time does nothing."""
        self._stack.close()
        self.blocks, self.attention = [], False
        vars(self._model).pop(HELD, None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave nothing of this in a copy of the model, which has its own parts."""
        return type(None), ()

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
