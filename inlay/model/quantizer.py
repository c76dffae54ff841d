"""The quantizer of ours that transformers reads a checkpoint with.

It puts `PackedLinear`s into a model that has no memory yet, and gives each its weight when it
comes: to be packed, or in the codes of bitsandbytes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import re
import sys
from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases._experts import PARTS, PackedExperts, pack_parameters, under
from inlay.bases._packed import PackedTensor, read
from inlay.bases.nf4 import PackedLinear
from inlay.core.errors import UserError
from inlay.model.defaults import HEADS

NAME = "inlay"
"""What our quantizer is called in transformers' registry."""


@dataclasses.dataclass
class Packing:
    """How the linear layers of a base are packed, and its experts.

    given: whether the checkpoint holds codes already. failed: the first error met in a weight,
    which transformers only reports as text. read: weights that were read to be put together, whose
    pages are let go of when that is packed.
    """

    kind: str = "nf4"
    double: bool = True
    given: bool = False
    skip: list[str] | None = None
    device: torch.device | None = None
    failed: Exception | None = None
    read: list[Tensor] = dataclasses.field(default_factory=list)

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


def packed_at(model: Any, name: str) -> PackedTensor | None:
    """Return what has the codes of the parameter of this name, if it is a packed one."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, PackedExperts):
        return module.stack(last)
    return module if isinstance(module, PackedLinear) and last == "weight" else None


@cache
def registered() -> Any:
    """Return the class of settings that leads transformers to our quantizer; both are defined here.

    In a function, because `import inlay` must not import transformers.
    """
    from transformers.core_model_loading import WeightConverter
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.base import HfQuantizer

    pack, take, note = _operations()

    @register_quantizer(NAME)
    class Quantizer(HfQuantizer):
        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: Any = None, **_: Any
        ) -> None:
            packing, self.dtype = self.quantization_config.packing, model.dtype
            if packing.given:
                _check_stacked(checkpoint_files)
            heads = sorted({name for names in HEADS.values() for name in names})
            skip = self.get_modules_to_not_convert(model, packing.skip, model._keep_in_fp32_modules)
            self.stacks = _make_room(model, skip if packing.given else [*skip, *heads], packing)

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return packed_at(model, param_name) is not None

        def get_quantize_ops(self) -> Any:
            return pack(self)

        def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
            if self.pre_quantized:
                return [*weight_conversions, *self.get_weight_conversions()]
            return [
                _noting(each, note(self)) if _makes(each, self.stacks) else each
                for each in weight_conversions
            ]

        def get_weight_conversions(self) -> Any:
            if not self.pre_quantized:
                return []
            # a layer's last: its keys may stand in those of a stack
            names = [*sorted(self.stacks), "weight"]
            return [WeightConverter(_keys(name), name, [take(self, name)]) for name in names]

        def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
            # plain numbers that come into the place of codes do not get these' dtype
            dtype = dtype if dtype is None or dtype.is_floating_point else self.dtype
            return super().get_new_dtype(converter, param, dtype)

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return _settings()


@cache
def _settings() -> Any:
    """Return the class of settings that is registered under our name."""
    from transformers.quantizers.auto import register_quantization_config
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(NAME)
    class Settings(QuantizationConfigMixin):
        def __init__(self, packing: Packing) -> None:
            self.quant_method, self.packing = NAME, packing

        def get(self, key: str, default: Any = None) -> Any:
            return getattr(self, key, default)

    return Settings


@cache
def _operations() -> tuple[Any, Any, Any]:
    """Return the classes that transformers calls with a weight to pack, one in codes, and parts."""
    from transformers.core_model_loading import ConversionOps

    class Operation(ConversionOps):
        inlay = True

        def __init__(self, hf_quantizer: Any, name: str = "weight") -> None:
            # under this name transformers looks, to leave the dtype of what it reads to us
            self.hf_quantizer = hf_quantizer
            self.packing: Packing = hf_quantizer.quantization_config.packing
            self.name = name

    class Pack(Operation):
        def convert(self, input_dict: Any, *_: Any, model: Any = None, **given: Any) -> Any:
            done: dict[str, Tensor] = {}
            for name, value in input_dict.items():
                done |= _kept(self.packing, model, name, name, _first(value), {}, **given)
            return done

    class Take(Operation):
        def convert(
            self, input_dict: Any, *_: Any, model: Any, full_layer_name: str, **given: Any
        ) -> Any:
            parts = dict(zip(_keys(self.name), PARTS, strict=True))
            values = {parts[key]: _first(value) for key, value in input_dict.items()}
            if "weight" not in values:
                return {}  # it is then told as missing
            layer, weight = packed_at(model, full_layer_name), values.pop("weight")
            alone = not values and weight.is_floating_point()
            if not values and (layer is None or (alone and not isinstance(layer, PackedLinear))):
                like = model.get_submodule(full_layer_name.rpartition(".")[0])
                like = getattr(like, full_layer_name.rpartition(".")[2])
                return {self.name: weight.to(like.dtype) if alone else weight}
            return _kept(self.packing, model, full_layer_name, self.name, weight, values, **given)

    class Note(Operation):
        def convert(self, input_dict: Any, *_: Any, **__: Any) -> Any:
            self.packing.read += [t for value in input_dict.values() for t in _tensors(value)]
            return input_dict

    return Pack, Take, Note


def _keys(name: str) -> list[str]:
    """Return the patterns, one for each of `PARTS`, that keys of a weight match: `.a.b`, a stack's.

    A name without a dot is that of the weight of any layer.
    """
    if "." not in name:
        return [*PARTS]
    path, _, last = name.rpartition(".")
    return [f"{path}.{under(last, part)}$".replace(".", r"\.") for part in PARTS]


def _make_room(model: Any, skip: list[str], packing: Packing) -> set[str]:
    """Make room for codes in a model; return the ends of the names of its packed stacks."""
    _replace(model, skip, packing)
    stacks = _pack_experts(model, skip, packing)
    if not any(isinstance(module, PackedTensor) for module in model.modules()):
        raise UserError(
            f"{type(model).__name__} has no linear layers that can be packed "
            "(its weights are of other kinds of layer): leave quantize out"
        )
    return stacks


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


def _pack_experts(model: Any, skip: list[str], packing: Packing) -> set[str]:
    """Give the model's experts room for codes in place of stacks of matrices.

    Returns the ends of their names: `.experts.down_proj`.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    found: set[str] = set()
    for path, module in list(model.named_modules()):
        if "experts" not in type(module).__name__.lower() or isinstance(module, PackedTensor):
            continue
        names = [
            name
            for name, p in module._parameters.items()
            if p is not None and p.ndim == 3 and should_convert_module(f"{path}.{name}", skip)
        ]
        if not names:
            continue
        pack_parameters(module, names, packing.kind, double=packing.double)
        module._is_hf_initialized = True  # as for layers
        found.update(f".{path.rpartition('.')[2]}.{name}" for name in names)
    return found


def _check_stacked(files: Any) -> None:
    """Raise UserError where checkpoint files hold a mixture's experts one by one in codes."""
    from safetensors import safe_open

    for file in files or ():
        with safe_open(file, framework="pt") as held:
            keys = list(held.keys())
        if any(re.search(r"\.experts\.\d+\..*\.(absmax|SCB)$", key) for key in keys):
            raise UserError(
                "the checkpoint holds a mixture's experts one by one in codes, as transformers "
                "before 5 wrote them, and they are stacks now: take the 16-bit model that it was "
                "made from, with quantize: nf4 to pack it"
            )


def _makes(conversion: Any, stacks: Collection[str]) -> bool:
    """Return whether a conversion puts one of the stacks together."""
    return hasattr(conversion, "operations") and any(
        f".{target}".endswith(tuple(stacks)) for target in conversion.target_patterns
    )


def _noting(conversion: Any, note: Any) -> Any:
    """Return the conversion with an operation of ours before its own."""
    return conversion.copy(
        conversion._original_source_patterns,
        conversion._original_target_patterns,
        operations=[note, *conversion.operations],
    )


def _kept(
    packing: Packing,
    model: Any,
    name: str,
    key: str,
    weight: Tensor,
    parts: dict[str, Any],
    *,
    missing_keys: set[str] | None = None,
    **_: Any,
) -> dict[str, Tensor]:
    """Give what is at `name` its weight, plain or in codes; return the codes of a layer by `key`.

    Those of a stack are no parameter and no buffer of the module that transformers finds there.
    """
    layer = packed_at(model, name)
    try:
        if layer is None:
            raise UserError("packed in the checkpoint, though its configuration does not say so")
        if packing.given:
            layer.take(read(weight.to(packing.device), parts))
        elif weight.shape != layer.shape:
            raise UserError(f"{list(weight.shape)} in the checkpoint, which is not the model's")
        else:
            layer.pack(weight.to(packing.device))
            for each in (weight, *packing.read):
                _let_go(each)
    except (ValueError, AssertionError) as error:
        packing.failed = packing.failed or UserError(f"{name}: {error}")
        raise
    finally:
        packing.read.clear()
    if isinstance(layer, PackedLinear):
        return {key: layer.weight}
    if missing_keys is not None:
        missing_keys.discard(name)
    return {}


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


def _tensors(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list) else [value]
