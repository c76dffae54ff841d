"""Load a base with its linear layers and experts in codes, packed one by one as they are read.

transformers reads the shards: it knows how a checkpoint's names become a model's. What it is given
here is a quantizer of our own, as its registry takes them, that puts `PackedLinear`s into the model
while that has no memory yet, makes room for codes in its experts, and packs each weight when it
comes. A checkpoint that bitsandbytes packed is read by the same way, without bitsandbytes; what is
loaded says in its configuration what bitsandbytes would, so that a folder written from it loads
there too, but for a mixture's experts, which transformers leaves in 16 bits there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from inlay.bases._experts import PackedExperts
from inlay.bases._packed import PackedTensor
from inlay.bases.nf4 import PackedLinear
from inlay.core.base import PackedModule
from inlay.core.errors import UserError, nearest
from inlay.kernels import codec
from inlay.model.quantizer import Packing, packed_at


def wanted(name: str, config: Any, quantize: str | None, device: torch.device) -> Packing | None:
    """Return how the base of this configuration is to be packed; None: not at all.

    UserError for a kind that is not known, and for a checkpoint that is quantized otherwise.
    """
    kind = None if quantize in (None, "none") else str(quantize)
    if kind is not None and kind not in codec.KINDS:
        known = ("none", *codec.KINDS)
        raise UserError(
            f"quantize={quantize!r} is not one of {', '.join(known)}.{nearest(kind, known)}"
        )
    told = _told(config)
    if told is None:
        return None if kind is None else Packing(kind, device=device)
    scheme = str(told.get("quant_method") or "an unnamed scheme")
    four, eight = told.get("load_in_4bit"), told.get("load_in_8bit")
    if not (scheme.endswith("bitsandbytes") and (four or eight)):
        raise UserError(
            f"base_model {name!r} is quantized already, by {scheme}, which adapters cannot be set "
            f"over here: take the 16-bit model that it was made from, with quantize: nf4 to pack it"
        )
    found = codec.INT8 if eight else str(told.get("bnb_4bit_quant_type", "fp4"))
    if kind not in (None, found):
        raise UserError(
            f"base_model {name!r} is quantized already, as {found}; leave quantize={quantize!r} "
            f"out, or take the 16-bit model that it was made from"
        )
    double, skip = bool(told.get("bnb_4bit_use_double_quant")), told.get("llm_int8_skip_modules")
    return Packing(found, double, given=True, skip=skip, device=device)


@contextmanager
def reported(name: str, packing: Packing | None) -> Iterator[None]:
    """Raise what was wrong with a weight as itself, in place of transformers' report of it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if packing is not None:  # what is missing or failed is an error of ours, not a table
        logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        if packing is None or packing.failed is None:
            raise
        raise UserError(f"base_model {name!r}: {packing.failed}") from error
    finally:
        logging.set_verbosity(before)
    if packing is not None and packing.failed is not None:
        raise UserError(f"base_model {name!r}: {packing.failed}")


def finish(model: nn.Module) -> None:
    """Leave of transformers' quantizer nothing in the model but what its configuration says."""
    owner: Any = model
    owner.hf_quantizer.remove_quantization_config(model)
    # how stacks are put together goes as well: a file of ours has their codes whole
    others = [c for c in getattr(model, "_weight_conversions", None) or [] if not _is_ours(c)]
    owner._weight_conversions = others
    for module in list(model.modules()):
        if isinstance(module, PackedExperts):
            module.settle()
    describe(model)


def new_ones_plain(model: Any, missing: Collection[str]) -> None:
    """Put plain layers, drawn as the model draws its own, where packed ones had nothing to pack.

    missing: the names that the checkpoint has no values for: a task's new head.
    """
    for key in missing:
        packed = packed_at(model, key)
        path = key.rpartition(".")[0]
        if not isinstance(packed, PackedLinear):
            continue
        drawn = nn.Linear(
            packed.in_features,
            packed.out_features,
            packed.bias is not None,
            device="cpu",
            dtype=packed.compute_dtype,
        )
        model._init_weights(drawn)
        above, _, name = path.rpartition(".")
        model.get_submodule(above)._modules[name] = drawn
    describe(model)


def describe(model: nn.Module) -> None:
    """Say in the model's configuration how its layers are packed, as bitsandbytes does."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    packed = [m for m in model.modules() if isinstance(m, PackedTensor)]
    if not packed:
        # a dictionary is what `describe` wrote; a model that transformers packed has an object
        if isinstance(getattr(config, "quantization_config", None), dict):
            del config.quantization_config
            owner: Any = model
            owner._weight_conversions = None  # the model's own, which take stacks apart again
        return
    first = packed[0]
    skipped = [path for path, m in linears.items() if not isinstance(m, PackedLinear)]
    if first.kind == codec.INT8:
        config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_skip_modules": skipped,
        }
        return
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.kind,
        "bnb_4bit_use_double_quant": first.nested_absmax is not None,
        "bnb_4bit_compute_dtype": str(first.compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def refuse_training(model: nn.Module, name: str) -> None:
    """Raise UserError where the weights that the method `name` trains are packed."""
    if count(model)[0]:
        raise UserError(
            f"full fine-tuning {name!r} trains the base's own weights, which packed cannot "
            "move: load the base without quantize, or train an adapter"
        )


def unpack(model: nn.Module) -> int:
    """Put a plain layer in the place of every packed one; return how many there were."""
    count = 0
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, PackedModule):
                module._modules[name] = child.unpacked()
                count += 1
    if count:
        describe(model)
    return count


def count(model: nn.Module) -> tuple[int, int]:
    """Return how many layers of the model are packed, and how many values they hold."""
    found = [m for m in model.modules() if isinstance(m, PackedModule)]
    return len(found), sum(m.numel for m in found)


def _told(config: Any) -> Mapping[str, Any] | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    told = getattr(config, "quantization_config", None)
    told = getattr(text, "quantization_config", None) if told is None else told
    return told if told is None or isinstance(told, Mapping) else told.to_dict()


def _is_ours(conversion: Any) -> bool:
    return any(getattr(op, "inlay", False) for op in getattr(conversion, "operations", ()))
