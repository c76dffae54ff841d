"""The heads of every task type: trained in full, saved with the adapter, and read by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from tests.methods.bases import SMALL, build, llama, randomize, t5

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
FILE = "adapter_model.safetensors"


def encoder(task: str) -> Any:
    import transformers

    return getattr(transformers, f"Bert{task}")(transformers.BertConfig(**SMALL, num_labels=2))


def decoder(task: str) -> Any:
    import transformers

    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    return getattr(transformers, f"Llama{task}")(config)


CASES: dict[str, tuple[str, Any, list[str], list[str]]] = {
    # task, base, targets, the heads that train with it
    "CAUSAL_LM": ("CAUSAL_LM", llama, ["q_proj"], []),
    "SEQ_2_SEQ_LM": ("SEQ_2_SEQ_LM", t5, ["q"], []),
    "SEQ_CLS": ("SEQ_CLS", lambda: encoder("ForSequenceClassification"), ["query"], ["classifier"]),
    "SEQ_CLS decoder": (
        "SEQ_CLS",
        lambda: decoder("ForSequenceClassification"),
        ["q_proj"],
        ["score"],
    ),
    "TOKEN_CLS": (
        "TOKEN_CLS",
        lambda: encoder("ForTokenClassification"),
        ["query"],
        ["classifier"],
    ),
    "QUESTION_ANS": (
        "QUESTION_ANS",
        lambda: encoder("ForQuestionAnswering"),
        ["query"],
        ["qa_outputs"],
    ),
    "FEATURE_EXTRACTION": ("FEATURE_EXTRACTION", lambda: encoder("Model"), ["query"], []),
}


@torch.no_grad()
def outputs(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(3, 23).reshape(2, 10)
    given = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    out = model(input_ids=ids, **given)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [out[name] for name in names if name in out]


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
@pytest.mark.parametrize("case", CASES)
def test_a_head_goes_both_ways_with_its_adapter(case: str, method: str, tmp_path: Path) -> None:
    task, make, targets, heads = CASES[case]
    settings = {"task_type": task, "target_modules": targets}
    if method == "IA3Config":
        settings["feedforward_modules"] = []
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build(make), getattr(peft, method)(**settings))
    fresh = inlay.get_peft_model(build(make), getattr(inlay, method)(**settings))
    assert type(fresh).__name__ == type(theirs).__name__
    assert fresh.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    randomize(theirs, 0.5 if method == "IA3Config" else 0.2)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs)
    assert not all(
        torch.allclose(one, two, atol=1e-4)
        for one, two in zip(expected, outputs(build(make)), strict=True)
    )
    ours = inlay.PeftModel.from_pretrained(build(make), tmp_path / "theirs")
    torch.testing.assert_close(outputs(ours), expected, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    saved, before = (load_file(tmp_path / who / FILE) for who in ("ours", "theirs"))
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[key], before[key]) for key in saved)
    for head in heads:
        assert f"base_model.model.{head}.weight" in saved
    back = peft.PeftModel.from_pretrained(build(make), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(back), expected, rtol=0, atol=1e-5)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(outputs(merged), expected, rtol=0, atol=1e-5)


def test_a_row_of_a_classifier_has_the_head_of_its_own_adapter() -> None:
    _, make, targets, _ = CASES["SEQ_CLS"]
    config = inlay.LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=2)
    model = inlay.get_peft_model(build(make), config, "one")
    model.add_adapter("two", config)
    ids = torch.arange(3, 33).reshape(3, 10)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        randomize(model, 0.2 if name == "one" else 0.4)
    model.eval()
    with torch.no_grad():
        for name in ("one", "two"):
            model.set_adapter(name)
            alone[name] = model(input_ids=ids).logits
        with model.disable_adapter():
            alone["__base__"] = model(input_ids=ids).logits
        rows = ["two", "__base__", "one"]
        mixed = model(input_ids=ids, adapter_names=rows).logits
    assert not torch.allclose(alone["one"], alone["two"], atol=1e-3)
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=0, atol=1e-6)
