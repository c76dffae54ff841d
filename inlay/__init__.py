"""inlay: parameter-efficient fine-tuning; a small trained part set into a large frozen one.

The public names are PEFT's where PEFT has one. Each is imported when it is first touched, so that
`import inlay` and `inlay --help` cost neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.core.config import PeftType, TaskType
    from inlay.core.errors import UserError
    from inlay.methods._starts import (
        BdLoraConfig,
        CordaConfig,
        EvaConfig,
        KasaConfig,
        LoftQConfig,
        LoraGAConfig,
    )
    from inlay.methods.adalora import AdaLoraConfig
    from inlay.methods.adamss import AdamssConfig
    from inlay.methods.adaption_prompt import AdaptionPromptConfig
    from inlay.methods.beft import BeftConfig
    from inlay.methods.bitfit import BitfitConfig
    from inlay.methods.boft import BOFTConfig
    from inlay.methods.bottleneck import BottleneckConfig
    from inlay.methods.c3a import C3AConfig
    from inlay.methods.cartridge import CartridgeConfig
    from inlay.methods.cpt import CPTConfig
    from inlay.methods.deft import DeftConfig
    from inlay.methods.delora import DeloraConfig
    from inlay.methods.fourierft import FourierFTConfig
    from inlay.methods.frod import FrodConfig
    from inlay.methods.glora import GloraConfig
    from inlay.methods.gralora import GraloraConfig
    from inlay.methods.hira import HiraConfig
    from inlay.methods.hra import HRAConfig
    from inlay.methods.ia3 import IA3Config
    from inlay.methods.lily import LilyConfig
    from inlay.methods.ln_tuning import LNTuningConfig
    from inlay.methods.loha import LoHaConfig
    from inlay.methods.lokr import LoKrConfig
    from inlay.methods.lora import LoraConfig
    from inlay.methods.miss import MissConfig
    from inlay.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
    from inlay.methods.oft import OFTConfig
    from inlay.methods.osf import OSFConfig
    from inlay.methods.p_tuning import PromptEncoderConfig
    from inlay.methods.peanut import PeanutConfig
    from inlay.methods.poly import PolyConfig
    from inlay.methods.prefix_tuning import PrefixTuningConfig
    from inlay.methods.prompt_tuning import PromptTuningConfig
    from inlay.methods.psoft import PsoftConfig
    from inlay.methods.pvera import PveraConfig
    from inlay.methods.randlora import RandLoraConfig
    from inlay.methods.road import RoadConfig
    from inlay.methods.shira import ShiraConfig
    from inlay.methods.supertuning import SupertuningConfig
    from inlay.methods.tinylora import TinyLoraConfig
    from inlay.methods.trainable_tokens import TrainableTokensConfig
    from inlay.methods.unilora import UniLoraConfig
    from inlay.methods.vblora import VBLoRAConfig
    from inlay.methods.vera import VeraConfig
    from inlay.methods.waveft import WaveFTConfig
    from inlay.methods.xlora import XLoraConfig
    from inlay.model.load import load_base
    from inlay.run import Run, train
    from inlay.surface.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from inlay.surface.config import PeftConfig, get_peft_config
    from inlay.surface.functions import (
        convert_to_lora,
        extract_lora,
        get_peft_model_state_dict,
        hotswap_adapter,
        inject_adapter_in_model,
        prepare_model_for_compiled_hotswap,
        save_as_lora,
        set_peft_model_state_dict,
    )
    from inlay.surface.loftq import replace_lora_weights_loftq
    from inlay.surface.past import (
        compose_cartridge_adapters,
        initialize_kv_prefix_from_past_key_values,
        initialize_kv_prefix_from_text,
    )
    from inlay.surface.peft_model import PeftModel
    from inlay.surface.prepare import prepare_model_for_kbit_training
    from inlay.surface.starts import (
        get_eva_state_dict,
        initialize_lora_eva_weights,
        preprocess_corda,
        preprocess_loraga,
    )
    from inlay.surface.tasks import (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from inlay.train.makers import (
        create_lorafa_optimizer,
        create_loraplus_optimizer,
        create_riemannian_optimizer,
    )

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig",
    "AdamssConfig",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BdLoraConfig",
    "BeftConfig",
    "BitfitConfig",
    "BottleneckConfig",
    "C3AConfig",
    "CPTConfig",
    "CartridgeConfig",
    "CordaConfig",
    "DeftConfig",
    "DeloraConfig",
    "EvaConfig",
    "FourierFTConfig",
    "FrodConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "KasaConfig",
    "LNTuningConfig",
    "LilyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "OFTConfig",
    "OSFConfig",
    "PeanutConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PolyConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "PsoftConfig",
    "PveraConfig",
    "RandLoraConfig",
    "RoadConfig",
    "Run",
    "ShiraConfig",
    "SupertuningConfig",
    "TaskType",
    "TinyLoraConfig",
    "TrainableTokensConfig",
    "UniLoraConfig",
    "UserError",
    "VBLoRAConfig",
    "VeraConfig",
    "WaveFTConfig",
    "XLoraConfig",
    "__version__",
    "compose_cartridge_adapters",
    "convert_to_lora",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "extract_lora",
    "get_eva_state_dict",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_base",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_peft_model_state_dict",
    "train",
]

_MODULES = {
    "inlay.methods._starts": [
        "BdLoraConfig",
        "CordaConfig",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraGAConfig",
    ],
    "inlay.surface.starts": [
        "get_eva_state_dict",
        "initialize_lora_eva_weights",
        "preprocess_corda",
        "preprocess_loraga",
    ],
    "inlay.surface.loftq": ["replace_lora_weights_loftq"],
    "inlay.train.makers": [
        "create_lorafa_optimizer",
        "create_loraplus_optimizer",
        "create_riemannian_optimizer",
    ],
    "inlay.core.config": ["PeftType", "TaskType"],
    "inlay.core.errors": ["UserError"],
    "inlay.methods.adamss": ["AdamssConfig"],
    "inlay.methods.bottleneck": ["BottleneckConfig"],
    "inlay.methods.adaption_prompt": ["AdaptionPromptConfig"],
    "inlay.methods.adalora": ["AdaLoraConfig"],
    "inlay.methods.beft": ["BeftConfig"],
    "inlay.methods.bitfit": ["BitfitConfig"],
    "inlay.methods.c3a": ["C3AConfig"],
    "inlay.methods.cartridge": ["CartridgeConfig"],
    "inlay.methods.cpt": ["CPTConfig"],
    "inlay.methods.deft": ["DeftConfig"],
    "inlay.methods.delora": ["DeloraConfig"],
    "inlay.methods.frod": ["FrodConfig"],
    "inlay.methods.glora": ["GloraConfig"],
    "inlay.methods.gralora": ["GraloraConfig"],
    "inlay.methods.hira": ["HiraConfig"],
    "inlay.methods.hra": ["HRAConfig"],
    "inlay.methods.oft": ["OFTConfig"],
    "inlay.methods.fourierft": ["FourierFTConfig"],
    "inlay.methods.waveft": ["WaveFTConfig"],
    "inlay.methods.boft": ["BOFTConfig"],
    "inlay.methods.ia3": ["IA3Config"],
    "inlay.methods.lily": ["LilyConfig"],
    "inlay.methods.ln_tuning": ["LNTuningConfig"],
    "inlay.methods.loha": ["LoHaConfig"],
    "inlay.methods.lokr": ["LoKrConfig"],
    "inlay.methods.lora": ["LoraConfig"],
    "inlay.methods.miss": ["MissConfig"],
    "inlay.methods.osf": ["OSFConfig"],
    "inlay.methods.peanut": ["PeanutConfig"],
    "inlay.methods.psoft": ["PsoftConfig"],
    "inlay.methods.road": ["RoadConfig"],
    "inlay.methods.poly": ["PolyConfig"],
    "inlay.methods.multitask_prompt_tuning": ["MultitaskPromptTuningConfig"],
    "inlay.methods.p_tuning": ["PromptEncoderConfig"],
    "inlay.methods.prefix_tuning": ["PrefixTuningConfig"],
    "inlay.methods.prompt_tuning": ["PromptTuningConfig"],
    "inlay.methods.shira": ["ShiraConfig"],
    "inlay.methods.supertuning": ["SupertuningConfig"],
    "inlay.methods.pvera": ["PveraConfig"],
    "inlay.methods.randlora": ["RandLoraConfig"],
    "inlay.methods.tinylora": ["TinyLoraConfig"],
    "inlay.methods.unilora": ["UniLoraConfig"],
    "inlay.methods.vblora": ["VBLoRAConfig"],
    "inlay.methods.vera": ["VeraConfig"],
    "inlay.methods.xlora": ["XLoraConfig"],
    "inlay.methods.trainable_tokens": ["TrainableTokensConfig"],
    "inlay.model.load": ["load_base"],
    "inlay.run": ["Run"],
    "inlay.surface.auto": [name for name in __all__ if name.startswith("AutoPeftModel")],
    "inlay.surface.config": ["PeftConfig", "get_peft_config"],
    "inlay.surface.functions": [
        "convert_to_lora",
        "extract_lora",
        "hotswap_adapter",
        "prepare_model_for_compiled_hotswap",
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "save_as_lora",
        "set_peft_model_state_dict",
    ],
    "inlay.surface.past": [
        "compose_cartridge_adapters",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
    ],
    "inlay.surface.peft_model": ["PeftModel"],
    "inlay.surface.prepare": ["prepare_model_for_kbit_training"],
    "inlay.surface.tasks": [
        "get_peft_model",
        *(name for name in __all__ if name.startswith("PeftModelFor")),
    ],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Return the public name, importing its module; AttributeError for any other."""
    if name == "train":
        return importlib.import_module("inlay.train")
    if name not in _HOME:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted(__all__)


class _Train(ModuleType):
    """The subpackage `inlay.train`, which is also a function: `inlay.train(config)` -> `Run`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Start the run that `inlay.run.train` starts; the same arguments."""
        return importlib.import_module("inlay.run").train(*args, **kwargs)


class _Package(ModuleType):
    """`inlay`, whose subpackage `train` and function `train` share a name and so are one object."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Let the subpackage be called when the import system binds it here."""
        if name == "train" and isinstance(value, ModuleType):
            value.__class__ = _Train
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
