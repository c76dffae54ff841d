"""Bases that a recipe cannot train, and rows that a base cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlay.core.errors import UserError
from inlay.model.load import embedded, load_tokenizer, most_tokens


def save(model, folder):
    model.save_pretrained(folder)
    load_tokenizer(embedded()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def gpt2(chats):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2560, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    return save(GPT2LMHeadModel(config), chats.parent / "gpt2")


def test_rows_longer_than_the_table_of_positions_are_dropped_and_told(start, gpt2):
    long = [{"role": "user", "content": "x " * 99}, {"role": "assistant", "content": "y"}]
    with Path("chats.jsonl").open("a") as file:
        file.write(json.dumps({"messages": long}) + "\n")
    run, told = start(base_model=gpt2, evaluate={"answers": 0})
    facts = next(event for event in told.events if event["event"] == "facts")
    assert "longest row: 32 tokens, as the base has positions for" in facts["data"]
    last = json.loads((run.folder / "ledger.jsonl").read_text().splitlines()[-1])
    assert last["outcome"] == "dropped"
    assert "> 32 tokens" in last["reason"]


def test_rotary_positions_have_no_table_that_ends(tiny_llama):
    assert most_tokens(tiny_llama()) is None


def test_an_encoder_with_a_decoder_is_refused(start, chats):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=2560, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    base = save(T5ForConditionalGeneration(config), chats.parent / "t5")
    with pytest.raises(UserError, match=r"T5ForConditionalGeneration.*causal language models"):
        start(base_model=base)
    assert not (chats.parent / "run").exists()


def test_a_tokenizer_of_another_base_is_refused(start, chats, tiny_llama):
    base = save(tiny_llama(vocab_size=100), chats.parent / "small")
    with pytest.raises(UserError, match=r"makes token \d+ .* embeddings for 100 tokens only"):
        start(base_model=base)
