"""The names that `inlay` offers, frozen: a change here is a change for every user."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import inlay

PUBLIC = {
    "LoraGAConfig",
    "LoftQConfig",
    "EvaConfig",
    "CordaConfig",
    "replace_lora_weights_loftq",
    "preprocess_loraga",
    "preprocess_corda",
    "initialize_lora_eva_weights",
    "get_eva_state_dict",
    "LoHaConfig",
    "LoKrConfig",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "create_lorafa_optimizer",
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BdLoraConfig",
    "BeftConfig",
    "BottleneckConfig",
    "BitfitConfig",
    "C3AConfig",
    "CartridgeConfig",
    "compose_cartridge_adapters",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "CPTConfig",
    "DeftConfig",
    "DeloraConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "OFTConfig",
    "FourierFTConfig",
    "WaveFTConfig",
    "BOFTConfig",
    "HiraConfig",
    "IA3Config",
    "KasaConfig",
    "LNTuningConfig",
    "LilyConfig",
    "LoraConfig",
    "MissConfig",
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
    "MultitaskPromptTuningConfig",
    "PromptTuningConfig",
    "PsoftConfig",
    "RoadConfig",
    "Run",
    "ShiraConfig",
    "SupertuningConfig",
    "PveraConfig",
    "RandLoraConfig",
    "VeraConfig",
    "FrodConfig",
    "AdamssConfig",
    "VBLoRAConfig",
    "XLoraConfig",
    "TinyLoraConfig",
    "UniLoraConfig",
    "TaskType",
    "TrainableTokensConfig",
    "UserError",
    "__version__",
    "causal_lm_loss",
    "convert_to_lora",
    "extract_lora",
    "fast",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inject_adapter_in_model",
    "load_base",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "save_as_lora",
    "set_peft_model_state_dict",
    "train",
}


def test_the_public_names_are_these() -> None:
    assert set(inlay.__all__) == PUBLIC
    assert set(dir(inlay)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(inlay, name) is not None


def test_the_stub_takes_every_name_from_where_it_is_imported() -> None:
    stub = Path(inlay.__file__).with_suffix(".pyi")
    told = {
        alias.asname: (node.module, alias.name)
        for node in ast.parse(stub.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    home = {**inlay._HOME, "train": "inlay.run"}
    assert told == {name: (module, name) for name, module in home.items()}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'"):
        inlay.LoraConfg  # noqa: B018


def test_train_is_the_function_and_the_subpackage() -> None:
    importlib.import_module("inlay.train.loop")
    assert callable(inlay.train)
    assert inlay.train.loop is sys.modules["inlay.train.loop"]


@pytest.mark.parametrize("heavy", ["torch", "transformers", "datasets", "pydantic", "matplotlib"])
def test_importing_inlay_imports_nothing_heavy(heavy: str) -> None:
    code = f"import sys, inlay; dir(inlay); sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_help_of_the_command_line_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from inlay.cli import main\n"
        "sys.argv = ['inlay', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"
