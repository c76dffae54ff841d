"""The embedded base: what its folder holds, how its chats look, what it has learned."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "inlay" / "assets" / "inlay-tiny"
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Repeat: red fox"},
    {"role": "assistant", "content": "red fox"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def answer(model: Any, tokenizer: Any, request: str) -> str:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], add_generation_prompt=True, return_tensors="pt"
    )
    made = model.generate(**ids, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_folder_is_at_most_12_mb_and_holds_no_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".json", ".jinja", ".md", ".safetensors"}


def test_model_and_tokenizer_agree(model: Any, tokenizer: Any) -> None:
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_embeddings_are_tied_and_stored_once(model: Any) -> None:
    from safetensors import safe_open

    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_the_weights_are_float32_that_bfloat16_holds_exactly(model: Any) -> None:
    import torch

    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, parameter.bfloat16().float()), name


def test_the_template_is_chatml_without_a_system_prompt_of_its_own(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)
    assert tokenizer.eos_token == "<|im_end|>"
    assert text[len(asked) :] == f"red fox{tokenizer.eos_token}\n"


@pytest.mark.parametrize("text", ["", " a  b\n\n\tc ", "caf\u00e9 \u4e2d", "x=[1, 2]  ."])
def test_text_comes_back_whole_with_nothing_added(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_loading_and_generating_warn_of_nothing(
    recwarn: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    warnings.simplefilter("always")
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    answer(model, AutoTokenizer.from_pretrained(FOLDER), "Hello!")
    assert not list(recwarn)
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert "warn" not in capfd.readouterr().err.lower()


def test_it_has_learned_the_documentation(model: Any, tokenizer: Any) -> None:
    import torch

    # A passage of `pydoc_data.topics` whose words are common; chance is ln 2560 = 7.8.
    text = "The value of the expression is the result of the function call with the arguments."
    ids = torch.tensor([[0, *tokenizer(text).input_ids]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 4.0


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("Repeat: green chair 4821", "green chair 4821"),
        ("Join with ' | ': cat, fox, owl", "cat | fox | owl"),
        ("name: Ada; place: Rome; day: Friday\nWhat is place?", "Rome"),
    ],
)
def test_it_can_use_what_a_request_holds(
    model: Any, tokenizer: Any, request_: str, expected: str
) -> None:
    assert answer(model, tokenizer, request_) == expected


def test_its_card_states_licenses_and_losses() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for words in ("Apache License 2.0", "PSF License", "make_tiny.py", "nats a token"):
        assert words in card


def test_the_demos_rows_are_all_different_and_routed_in_one_form() -> None:
    path = Path(__file__).parents[2] / "recipes" / "data" / "support.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    assert path.stat().st_size < 500_000
    assert len({mail["content"] for mail, _ in rows}) == len(rows)
    for mail, line in rows:
        queue, order, item, action = line["content"].split(" | ")
        number = order.removeprefix("order ")
        assert item in mail["content"]
        assert number in mail["content"] or number == "missing"
        assert queue.isalpha()
        assert action.isalpha()
