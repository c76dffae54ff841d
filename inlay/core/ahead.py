"""What has to be found out before a call of the whole model, said to its adapters during the call.

A method whose layers wait for it (a mixture that reads the text first) has it in what its sites
share: `Shared.ahead`. Here it is asked at each call in which its adapter computes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.core.adapter import Shared
from inlay.core.selection import Selection


class Ahead:
    """The hooks on a model that ask `shared` first, while the adapter `name` is chosen."""

    def __init__(self, model: nn.Module, name: str, shared: Shared, selection: Selection) -> None:
        """Set the hooks."""
        self._name, self._shared, self._selection = name, shared, selection
        self._open: list[Any] = []
        self._asking = False
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open.append(None)
        chosen = self._selection
        names = chosen.active if chosen.rows is None else chosen.rows
        if self._asking or chosen.merged or self._name not in names:
            return
        self._asking = True  # what is asked may call the model itself
        try:
            said = self._shared.ahead(model, args, kwargs, chosen)
        finally:
            self._asking = False
        during = chosen.using(said=said)
        during.__enter__()
        self._open[-1] = during

    def _after(self, *_: Any) -> None:
        # torch calls this after an error too, also where another hook failed before ours ran
        during = self._open.pop() if self._open else None
        if during is not None:
            during.__exit__(None, None, None)
