"""The quantizer of ours that transformers reads a checkpoint with.

It puts `PackedLinear`s into a model that has no memory yet, and gives each its weight when it
comes: to be packed, or in the codes of bitsandbytes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases._packed import STATE, read
from inlay.bases.nf4 import PackedLinear
from inlay.core.errors import UserError
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
        settings = registered()(packing=self)
        if self.given:
            config.quantization_config = settings
            return {}
        return {"quantization_config": settings}


def packed_at(model: Any, name: str) -> PackedLinear | None:
    """Return the packed layer that the parameter of this name is of, if it is one."""
    module = model.get_submodule(name.rpartition(".")[0])
    return module if isinstance(module, PackedLinear) else None


@cache
def registered() -> Any:
    """Return the class of settings that leads transformers to our quantizer; both are defined here.

    In a function, because `import inlay` must not import transformers.
    """
    from transformers.core_model_loading import WeightConverter
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    pack, take = _operations()

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
            return pack(self)

        def get_weight_conversions(self) -> Any:
            return [WeightConverter([*PARTS], "weight", [take(self)])] if self.pre_quantized else []

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return Settings


@cache
def _operations() -> tuple[Any, Any]:
    """Return the classes that transformers calls with a weight to pack, and with one in codes."""
    from transformers.core_model_loading import ConversionOps

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
            if "weight" not in values:
                return {}  # it is then told as missing
            layer, weight = packed_at(model, full_layer_name), values.pop("weight")
            if layer is None and not values:
                like = model.get_parameter_or_buffer(full_layer_name)
                return {"weight": weight.to(like.dtype) if weight.is_floating_point() else weight}
            return {"weight": _kept(self.packing, full_layer_name, layer, weight, values)}

    return Pack, Take


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
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        raise UserError(
            f"{type(model).__name__} has no linear layers that can be packed "
            "(its weights are of other kinds of layer): leave quantize out"
        )


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


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value
