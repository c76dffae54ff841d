"""A folder is enough: the base that its settings name is loaded, and the adapter into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForPreTraining

import inlay
from inlay import LoraConfig, UserError, get_peft_model

IDS = torch.arange(5, 15)[None]
HEADS = {
    "SEQ_CLS": inlay.AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": inlay.AutoPeftModelForTokenClassification,
    "QUESTION_ANS": inlay.AutoPeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": inlay.AutoPeftModelForFeatureExtraction,
    "CAUSAL_LM": inlay.AutoPeftModelForCausalLM,
    None: inlay.AutoPeftModel,
}


@pytest.mark.parametrize("task", HEADS)
def test_a_folder_loads_with_its_base_and_its_head(task: str | None, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    model = BertForPreTraining(BertConfig(num_attention_heads=2, is_decoder=True, **small))
    model.save_pretrained(tmp_path / "base")
    base, _ = inlay.load_base(tmp_path / "base", task_type=task)
    config = LoraConfig(r=4, target_modules=["query"], task_type=task, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = HEADS[task].from_pretrained(tmp_path / "adapter")
    assert type(again) is type(model)
    torch.testing.assert_close(again(IDS)[0], model(IDS)[0], rtol=0, atol=0)
    assert isinstance(inlay.PeftConfig.from_pretrained(tmp_path / "adapter"), LoraConfig)


def test_dtype_and_device_may_be_said_as_transformers_does(tmp_path: Path) -> None:
    base, _ = inlay.load_base()
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path)
    load = inlay.AutoPeftModelForCausalLM.from_pretrained
    for given in ({"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}):
        model = load(tmp_path, torch_dtype=torch.bfloat16, **given)
        assert model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="several devices, which is not there yet"):
        load(tmp_path, device_map={"model.layers.0": 0, "model.layers.1": 1})


def test_the_base_is_packed_as_it_is_loaded_or_was_already(tmp_path: Path) -> None:
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model(input_ids=IDS).logits.detach()

    settings = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    base, _ = inlay.load_base(quantize="nf4", device="cpu")
    base.save_pretrained(tmp_path / "packed")
    model = get_peft_model(base, settings).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    load = inlay.AutoPeftModelForCausalLM.from_pretrained
    again = load(tmp_path / "adapter", quantize="nf4", device="cpu")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    plain = load(tmp_path / "adapter", device="cpu")
    assert not torch.allclose(logits(plain), expected, rtol=0, atol=1e-2)

    saved, _ = inlay.load_base(tmp_path / "packed", device="cpu")
    over = get_peft_model(saved, settings).eval()
    over.load_state_dict(model.state_dict())
    over.save_pretrained(tmp_path / "over")
    for given in ({}, {"quantize": "nf4"}):
        found = load(tmp_path / "over", device="cpu", **given)
        torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="quantized already, as nf4"):
        load(tmp_path / "over", quantize="int8")
    with pytest.raises(UserError, match="'nf5' is not one of none, nf4"):
        load(tmp_path / "adapter", quantize="nf5")


def test_a_sequence_to_sequence_base(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    small = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 32,
    }
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    base, _ = inlay.load_base(tmp_path / "t5")
    get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM")).save_pretrained(tmp_path / "a")
    again = inlay.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "a", is_trainable=True)
    assert isinstance(again, inlay.PeftModelForSeq2SeqLM)
    assert again.get_nb_trainable_parameters()[0] > 0


def test_tokens_added_for_training_are_there_again(tiny_tokenizer: Any, tmp_path: Path) -> None:
    base, tokenizer = inlay.load_base()
    tokenizer.add_tokens(["<new>"])
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    again = inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, len(tokenizer) - 1]])
    torch.testing.assert_close(
        again.get_input_embeddings()(ids), model.get_input_embeddings()(ids), rtol=0, atol=0
    )


def test_a_folder_that_does_not_name_its_base_says_what_to_do(tiny_llama, tmp_path) -> None:
    get_peft_model(tiny_llama(), LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not name its base"):
        inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="from_pretrained"):
        inlay.AutoPeftModel()
