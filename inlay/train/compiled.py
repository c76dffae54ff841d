"""The repeated layers of a model by torch.compile, for as long as it trains (`train.compile`).

One layer is compiled, and serves for all of the same kind. Its lengths are symbols, so that a batch
of another length is no other program. In a layer the compiler takes the place of `train.fast`'s
nodes, which it cannot look into; what is outside of the layers, and the attention of packed rows,
stay as they are.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from inlay.core.adapter import Adapter
from inlay.core.base import PackedModule
from inlay.core.errors import UserError
from inlay.model.attention import PREFIX, packed_attention
from inlay.train.precision import device_of

# fallback_random: dropout draws what it draws without a compiler
HOW: dict[str, Any] = {"dynamic": True, "options": {"fallback_random": True}}
"""What torch.compile is told."""
INSTEAD = "set train.compile: false"


@contextmanager
def compiled(model: nn.Module, *, by_rows: bool) -> Iterator[None]:
    """Let the repeated layers of `model` be compiled for a `with` block, at their first calls.

    That is once for the first layer, whose input needs no gradient, and once for all others.

    by_rows: attention takes packed rows as they are. Afterwards the layers are as they were, and
    what this process compiled is let go. Raises UserError where they cannot be compiled, before the
    block or from within it.
    """
    layers = require_compilable(model)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # torch's tracer looks at it, of tensors of its own
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        if by_rows and stack.enter_context(packed_attention(model)):
            stack.enter_context(_opaque_attention())
        try:
            for layer in layers:
                layer.compile(**HOW)
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"train.compile: torch could not compile a layer of {type(model).__name__} "
                f"({str(error).strip().partition(chr(10))[0]}); {INSTEAD}"
            ) from error
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
            # programs are kept by the code they are of, at most 8, and hold the model's weights:
            # another run over layers of the same class would find them in its way
            torch._dynamo.reset()


def require_compilable(model: nn.Module) -> list[nn.Module]:
    """Return the layers of `model` that are compiled; UserError where that cannot be."""
    if device_of(model).type == "cpu":
        wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(wanted) is None:
            raise UserError(
                f"train.compile: there is no C++ compiler {wanted!r}, which torch.compile needs on "
                f"a CPU; install one, name it in the environment variable CXX, or {INSTEAD}"
            )
    packed = next((m for m in model.modules() if isinstance(m, PackedModule)), None)
    if packed is not None:
        raise UserError(
            f"train.compile: the base has packed layers ({type(packed).__name__}), which "
            f"torch.compile cannot look into; {INSTEAD}, or leave quantize out"
        )
    layers = repeated(model)
    if not layers:
        raise UserError(
            f"train.compile: {type(model).__name__} has no list of repeated layers; {INSTEAD}"
        )
    return layers


def repeated(model: nn.Module) -> list[nn.Module]:
    """Return the layers that `model` has in lists; not those of lists in layers, or of adapters."""
    inner = {
        child
        for module in model.modules()
        if isinstance(module, nn.ModuleList | Adapter)
        for child in module.modules()
        if child is not module
    }
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and m not in inner]
    return [layer for found in lists if len(found) > 1 for layer in found]


@contextmanager
def _opaque_attention() -> Iterator[None]:
    """Let the compiler leave the attention of packed rows alone: it goes through C, and by rows."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = [name for name in ALL_ATTENTION_FUNCTIONS if name.startswith(PREFIX)]
    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in names}
    for name, attend in before.items():
        AttentionInterface.register(name, torch.compiler.disable(attend))
    try:
        yield
    finally:
        for name, attend in before.items():
            AttentionInterface.register(name, attend)
