"""inlay: parameter-efficient fine-tuning; a small trained part set into a large frozen one.

The public names are PEFT's where PEFT has one. Each is imported when it is first touched, so that
`import inlay` and `inlay --help` cost neither torch nor transformers. `__init__.pyi` says the
same to type checkers and editors, which cannot read a table.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "inlay.core.config": ["PeftType", "TaskType"],
    "inlay.core.errors": ["UserError"],
    "inlay.methods._starts": [
        "BdLoraConfig",
        "CordaConfig",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraGAConfig",
    ],
    "inlay.methods.adalora": ["AdaLoraConfig"],
    "inlay.methods.adamss": ["AdamssConfig"],
    "inlay.methods.adaption_prompt": ["AdaptionPromptConfig"],
    "inlay.methods.beft": ["BeftConfig"],
    "inlay.methods.bitfit": ["BitfitConfig"],
    "inlay.methods.boft": ["BOFTConfig"],
    "inlay.methods.bottleneck": ["BottleneckConfig"],
    "inlay.methods.c3a": ["C3AConfig"],
    "inlay.methods.cartridge": ["CartridgeConfig"],
    "inlay.methods.cpt": ["CPTConfig"],
    "inlay.methods.deft": ["DeftConfig"],
    "inlay.methods.delora": ["DeloraConfig"],
    "inlay.methods.fourierft": ["FourierFTConfig"],
    "inlay.methods.frod": ["FrodConfig"],
    "inlay.methods.glora": ["GloraConfig"],
    "inlay.methods.gralora": ["GraloraConfig"],
    "inlay.methods.hira": ["HiraConfig"],
    "inlay.methods.hra": ["HRAConfig"],
    "inlay.methods.ia3": ["IA3Config"],
    "inlay.methods.lily": ["LilyConfig"],
    "inlay.methods.ln_tuning": ["LNTuningConfig"],
    "inlay.methods.loha": ["LoHaConfig"],
    "inlay.methods.lokr": ["LoKrConfig"],
    "inlay.methods.lora": ["LoraConfig"],
    "inlay.methods.miss": ["MissConfig"],
    "inlay.methods.multitask_prompt_tuning": ["MultitaskPromptTuningConfig"],
    "inlay.methods.oft": ["OFTConfig"],
    "inlay.methods.osf": ["OSFConfig"],
    "inlay.methods.p_tuning": ["PromptEncoderConfig"],
    "inlay.methods.peanut": ["PeanutConfig"],
    "inlay.methods.poly": ["PolyConfig"],
    "inlay.methods.prefix_tuning": ["PrefixTuningConfig"],
    "inlay.methods.prompt_tuning": ["PromptTuningConfig"],
    "inlay.methods.psoft": ["PsoftConfig"],
    "inlay.methods.pvera": ["PveraConfig"],
    "inlay.methods.randlora": ["RandLoraConfig"],
    "inlay.methods.road": ["RoadConfig"],
    "inlay.methods.shira": ["ShiraConfig"],
    "inlay.methods.supertuning": ["SupertuningConfig"],
    "inlay.methods.tinylora": ["TinyLoraConfig"],
    "inlay.methods.trainable_tokens": ["TrainableTokensConfig"],
    "inlay.methods.unilora": ["UniLoraConfig"],
    "inlay.methods.vblora": ["VBLoRAConfig"],
    "inlay.methods.vera": ["VeraConfig"],
    "inlay.methods.waveft": ["WaveFTConfig"],
    "inlay.methods.xlora": ["XLoraConfig"],
    "inlay.model.load": ["load_base"],
    "inlay.objectives.tokens": ["causal_lm_loss"],
    "inlay.run": ["Run"],
    "inlay.surface.auto": [
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ],
    "inlay.surface.config": ["PeftConfig", "get_peft_config"],
    "inlay.surface.fast": ["fast"],
    "inlay.surface.functions": [
        "convert_to_lora",
        "extract_lora",
        "get_peft_model_state_dict",
        "hotswap_adapter",
        "inject_adapter_in_model",
        "prepare_model_for_compiled_hotswap",
        "save_as_lora",
        "set_peft_model_state_dict",
    ],
    "inlay.surface.loftq": ["replace_lora_weights_loftq"],
    "inlay.surface.past": [
        "compose_cartridge_adapters",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
    ],
    "inlay.surface.peft_model": ["PeftModel"],
    "inlay.surface.prepare": ["prepare_model_for_kbit_training"],
    "inlay.surface.starts": [
        "get_eva_state_dict",
        "initialize_lora_eva_weights",
        "preprocess_corda",
        "preprocess_loraga",
    ],
    "inlay.surface.tasks": [
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "get_peft_model",
    ],
    "inlay.train.makers": [
        "create_lorafa_optimizer",
        "create_loraplus_optimizer",
        "create_riemannian_optimizer",
    ],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted([*_HOME, "__version__", "train"])


def __getattr__(name: str) -> Any:
    """Return the public name, importing its module; AttributeError for any other."""
    if name == "train":
        return importlib.import_module("inlay.train")
    if name not in _HOME:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    if name.endswith("Config"):  # it hands them how they are written and read
        importlib.import_module("inlay.surface.config")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return __all__


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
