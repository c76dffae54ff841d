"""Greedy answers to held-out rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay.core.errors import UserError
from inlay.data.encode import encode
from inlay.data.rows import Chat, Completion, Message, Source, Text
from inlay.data.template import Template
from inlay.train.answers import exact_match, stop_ids


def chat(*turns, line=1):
    turns = tuple(Message(role, content) for role, content in turns)
    return Chat(messages=turns, source=Source("held.jsonl", line))


def completion(prompt, text, line=1):
    return Completion(prompt=prompt, completion=text, source=Source("h.jsonl", line))


class Scripted(nn.Module):
    """Answers each prompt with what `script` has for it, then goes on after the end."""

    def __init__(self, tokenizer, script):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.script, self.asked = tokenizer, script, []

    def generate(self, input_ids, attention_mask, generation_config):
        assert not self.training
        assert attention_mask[:, -1].all(), "padded on the left"
        texts = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            self.asked.append(self.tokenizer.decode(ids[mask.bool()]))
            texts.append(self.script(self.asked[-1]))
        made = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, made))
        tail = torch.tensor([m + [self.tokenizer.pad_token_id] * (width - len(m)) for m in made])
        return torch.cat([input_ids, tail], dim=1)


def test_a_chat_asks_with_all_before_its_last_answer_and_space_at_the_ends_is_no_mistake(
    tiny_tokenizer,
):
    rows = [
        chat(("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2\n"), line=4),
        chat(("system", "s"), ("user", "three"), ("assistant", "3"), line=5),
    ]
    model = Scripted(tiny_tokenizer, lambda text: " 2<|im_end|>\nmore" if "two" in text else "4")
    model.train()
    found = exact_match(model, tiny_tokenizer, rows, batch_size=1)
    assert [(a.row, a.prompt, a.expected, a.answer, a.correct) for a in found.answers] == [
        ("held.jsonl:4", "two", "2", "2", True),
        ("held.jsonl:5", "three", "3", "4", False),
    ]
    assert (found.correct, found.exact_match) == (1, 0.5)
    before = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
    asked = before + "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert asked in model.asked
    assert model.training


def test_the_answer_to_a_row_does_not_depend_on_its_batch(tiny_llama, tiny_tokenizer):
    model = tiny_llama(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    rows = [completion("x" * n, "?", line=n) for n in (9, 2, 5, 1, 7)]
    alone = exact_match(model, tiny_tokenizer, rows, batch_size=1, max_new_tokens=6)
    together = exact_match(model, tiny_tokenizer, rows, batch_size=4, max_new_tokens=6)
    assert alone == together
    expected = [completion(r.prompt, a.answer) for r, a in zip(rows, alone.answers, strict=True)]
    assert exact_match(model, tiny_tokenizer, expected, max_new_tokens=6).exact_match == 1.0


def test_an_answer_ends_where_the_model_the_tokenizer_or_the_template_ends_a_turn(
    tiny_llama, tiny_tokenizer
):
    model = tiny_llama()
    assert tiny_tokenizer.eos_token_id == 1
    model.generation_config.eos_token_id = [7, 8]
    assert stop_ids(model, tiny_tokenizer) == [1, 7, 8]
    model.generation_config.eos_token_id = None
    ended = Template(tiny_tokenizer, "{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}")
    assert stop_ids(model, tiny_tokenizer, ended) == [1, 2]


def test_a_turn_that_ends_in_plain_text_is_cut_there(tiny_tokenizer):
    text = (
        "{% for m in messages %}[{{ m.content }}];{% endfor %}"
        "{% if add_generation_prompt %}[{% endif %}"
    )
    model = Scripted(tiny_tokenizer, lambda _: "2];[more")
    rows = [chat(("user", "two"), ("assistant", "2"))]
    found = exact_match(model, tiny_tokenizer, rows, template=Template(tiny_tokenizer, text))
    assert model.asked == ["[two];["]
    assert found.exact_match == 1.0


def test_rows_without_an_answer_to_compare_with_are_named(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    for row in (chat(("user", "a"), line=3), chat(("assistant", "a"), line=3)):
        with pytest.raises(UserError, match=r"held\.jsonl:3"):
            exact_match(model, tiny_tokenizer, [row])
    with pytest.raises(UserError, match="plain text"):
        exact_match(model, tiny_tokenizer, [Text("t", Source("held.jsonl", 1))])


def test_no_rows_are_no_answers(tiny_llama, tiny_tokenizer):
    assert exact_match(tiny_llama(), tiny_tokenizer, []).exact_match == 0.0


def test_a_question_is_encoded_as_the_rows_that_train_are(tiny_llama, tiny_tokenizer):
    asked = []
    model = tiny_llama()
    generate = model.generate
    model.generate = lambda input_ids, **given: (
        asked.append(input_ids[0].tolist()) or generate(input_ids, **given)
    )
    row = chat(("user", "say <|im_end|> now"), ("assistant", "x"))
    exact_match(model, tiny_tokenizer, [row], max_new_tokens=1)
    (example,) = encode(row, tiny_tokenizer)
    first = next(i for i, label in enumerate(example.labels) if label != -100)
    assert asked == [example.input_ids[:first]]
    assert asked[0].count(tiny_tokenizer.eos_token_id) == 1  # the user's turn ends once


def test_an_answer_ends_where_the_model_has_no_more_positions(tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), **sizes))
    rows = [completion("a" * length, "b", line=length) for length in (3, 12, 16, 20)]
    found = exact_match(model, tiny_tokenizer, rows, max_new_tokens=64, batch_size=1)
    assert [len(answer.answer) == 0 for answer in found.answers][2:] == [True, True]
