"""Load a base with its linear layers in 4-bit codes, packed one by one as they are read.

transformers reads the shards: it knows how a checkpoint's names become a model's. What it is given
here is a quantizer of our own, as its registry takes them, that puts `PackedLinear`s into the model
while that has no memory yet, and packs each weight when it comes. A checkpoint that bitsandbytes
packed is read by the same way, without bitsandbytes; what is loaded says in its configuration what
bitsandbytes would, so that a folder written from it loads there too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases.nf4 import STATE, PackedLinear, read
from inlay.core.base import PackedModule
from inlay.core.errors import UserError, nearest
from inlay.kernels import codec
from inlay.model.defaults import HEADS

NAME = "inlay"
"""What our quantizer is called in transformers' registry."""
PARTS = (
    *("weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax"),
    *(f"{STATE}{kind}" for kind in codec.TABLES),
    *("SCB", "weight_format", "weight"),
)
"""The keys of one packed weight in a checkpoint; the one that all end in comes last."""


@dataclasses.dataclass
class Packing:
    """How the linear layers of a base are packed.

    given: whether the checkpoint holds codes already. failed: the first error met in a weight,
    which transformers only reports as text.
    """

    kind: str = "nf4"
    double: bool = True
    given: bool = False
    skip: list[str] | None = None
    device: torch.device | None = None
    failed: Exception | None = None

    def __deepcopy__(self, memo: Any) -> Packing:
        """Return this one: transformers copies what it is given, and tells the copy what failed."""
        return self

    def given_to(self, config: Any) -> dict[str, Any]:
        """Return what `from_pretrained` takes to pack a base of this configuration."""
        settings = _registered()(packing=self)
        if self.given:
            config.quantization_config = settings
            return {}
        return {"quantization_config": settings}


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
    ours = [c for c in getattr(model, "_weight_conversions", None) or [] if not _is_ours(c)]
    owner._weight_conversions = ours
    describe(model)


def new_ones_plain(model: Any, missing: Collection[str]) -> None:
    """Put plain layers, drawn as the model draws its own, where packed ones had nothing to pack.

    missing: the names that the checkpoint has no values for: a task's new head.
    """
    for key in missing:
        packed = packed_at(model, key)
        path, _, last = key.rpartition(".")
        if packed is None or last != "weight":
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
    packed = [m for m in linears.values() if isinstance(m, PackedLinear)]
    if not packed:
        # a dictionary is what `describe` wrote; a model that transformers packed has an object
        if isinstance(getattr(config, "quantization_config", None), dict):
            del config.quantization_config
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


def _replace(model: Any, skip: list[str], packing: Packing) -> None:
    """Put packed layers without memory into the place of the plain ones that are to be packed."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    for path, module in list(model.named_modules()):
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if not plain or not should_convert_module(path, skip):
            continue
        above, _, name = path.rpartition(".")
        made = PackedLinear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            kind=packing.kind,
            double=packing.double,
            dtype=module.weight.dtype,
            device="meta",
        )
        # or transformers would draw at random what a checkpoint lacks, of which codes are no case
        made._is_hf_initialized = True  # type: ignore[assignment]
        model.get_submodule(above)._modules[name] = made
    if not count(model)[0]:
        raise UserError(
            f"{type(model).__name__} has no linear layers that can be packed "
            "(its weights are of other kinds of layer): leave quantize out"
        )


def packed_at(model: Any, name: str) -> PackedLinear | None:
    """Return the packed layer that the parameter of this name is of, if it is one."""
    module = model.get_submodule(name.rpartition(".")[0])
    return module if isinstance(module, PackedLinear) else None


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _let_go(weight: Tensor) -> None:
    """Tell the system that the pages of a weight that was read are not needed in memory now.

    They are pages of a shard that is mapped while anything of it is in use; without this the whole
    16-bit checkpoint would stay resident, though on no one's account. Nothing is lost: what is
    asked for again is read again.
    """
    if not sys.platform.startswith("linux") or weight.device.type != "cpu":
        return
    if not _is_of_a_file(weight.data_ptr()):
        return  # a copy that was cast, which goes with the last of its names
    page = mmap.PAGESIZE
    first = -(-weight.data_ptr() // page) * page
    size = (weight.data_ptr() + weight.nbytes) // page * page - first
    if size > 0:
        pageout = 21  # MADV_PAGEOUT; an older kernel refuses, and all is as before
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), pageout)


def _is_of_a_file(address: int) -> bool:
    try:
        with open("/proc/self/maps") as lines:
            for line in lines:
                span, _, _, _, inode, *_ = line.split(maxsplit=5)
                first, end = (int(part, 16) for part in span.split("-"))
                if first <= address < end:
                    return inode != "0"
    except (OSError, ValueError):  # there is no such file where the system is another
        pass
    return False


@cache
def _registered() -> Any:
    """Return the class of settings that leads transformers to our quantizer; both are defined here.

    In a function, because `import inlay` must not import transformers.
    """
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Operation(ConversionOps):
        inlay = True

        def __init__(self, hf_quantizer: Any) -> None:
            # under this name transformers looks, to leave the dtype of what it reads to us
            self.hf_quantizer = hf_quantizer
            self.packing: Packing = hf_quantizer.quantization_config.packing

    class Pack(Operation):
        def convert(self, input_dict: Any, *_: Any, model: Any = None, **__: Any) -> Any:
            done = {}
            for name, value in input_dict.items():
                layer = packed_at(model, name)
                assert layer is not None
                done[name] = _kept(self.packing, name, layer, _first(value), {})
            return done

    class Take(Operation):
        def convert(
            self, input_dict: Any, *_: Any, model: Any = None, full_layer_name: str = "", **__: Any
        ) -> Any:
            values = {key: _first(value) for key, value in input_dict.items()}
            layer, weight = packed_at(model, full_layer_name), values.pop("weight")
            if layer is None and not values:
                like = model.get_parameter_or_buffer(full_layer_name)
                return {"weight": weight.to(like.dtype) if weight.is_floating_point() else weight}
            return {"weight": _kept(self.packing, full_layer_name, layer, weight, values)}

    @register_quantization_config(NAME)
    class Settings(QuantizationConfigMixin):
        def __init__(self, packing: Packing) -> None:
            self.quant_method, self.packing = NAME, packing

        def get(self, key: str, default: Any = None) -> Any:
            return getattr(self, key, default)

    @register_quantizer(NAME)
    class Quantizer(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            packing = self.quantization_config.packing
            heads = sorted({name for names in HEADS.values() for name in names})
            skip = self.get_modules_to_not_convert(model, packing.skip, model._keep_in_fp32_modules)
            _replace(model, skip if packing.given else [*skip, *heads], packing)

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return param_name.endswith(".weight") and packed_at(model, param_name) is not None

        def get_quantize_ops(self) -> Any:
            return Pack(self)

        def get_weight_conversions(self) -> Any:
            return [WeightConverter([*PARTS], "weight", [Take(self)])] if self.pre_quantized else []

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return Settings


def _kept(
    packing: Packing, name: str, layer: PackedLinear | None, weight: Tensor, parts: dict[str, Any]
) -> Tensor:
    """Give `layer` its weight, plain or in codes, and return the codes."""
    try:
        if layer is None:
            raise UserError("packed in the checkpoint, though its configuration does not say so")
        if packing.given:
            layer.take(read(weight.to(packing.device), parts))
        elif weight.shape != (layer.out_features, layer.in_features):
            raise UserError(f"{list(weight.shape)} in the checkpoint, which is not the model's")
        else:
            layer.pack(weight.to(packing.device))
            _let_go(weight)
    except (ValueError, AssertionError) as error:
        packing.failed = packing.failed or UserError(f"{name}: {error}")
        raise
    return layer.weight
