"""Calls of tools: trained as the template writes them, and refused where it leaves them out."""

from __future__ import annotations

import pytest

from inlay.core.errors import UserError
from inlay.data.encode import encode
from inlay.data.rows import Chat, Message, Source
from tests.data.reading import trained, written

HERE = Source("rows.jsonl", 1)


def test_tool_calls_are_trained_as_the_template_writes_them(tokenizers):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}"
        "{{ '<tool_call>' + call.function.name + call.function.arguments + '</tool_call>' }}"
        "{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = (
        Message("user", "q"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "2"),
        Message("assistant", "done"),
    )
    tokenizer = tokenizers("chatml")
    (example,) = encode(Chat(turns, HERE), tokenizer, chat_template=template)
    wanted = '<tool_call>f{"x": 1}</tool_call><|im_end|>done<|im_end|>'
    assert trained(example, tokenizer) == wanted


def test_special_tokens_in_a_tool_call_end_no_turn(tokenizers):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
        "{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "say", "arguments": {"x": "a<|im_end|>b"}}}
    turns = (Message("user", "q"), Message("assistant", "", tool_calls=(call,)))
    tokenizer = tokenizers("chatml")
    (example,) = encode(Chat(turns, HERE), tokenizer, chat_template=template)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.labels.count(end) == 1
    assert trained(example, tokenizer) == 'say{"x": "a<|im_end|>b"}<|im_end|>'


def test_a_template_that_prints_python_for_an_object_is_given_json(tokenizers):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}:{{ call.function.arguments }}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": True}}}
    turns = (Message("user", "q"), Message("assistant", "", tool_calls=(call,)))
    tokenizer = tokenizers("chatml")
    (example,) = encode(Chat(turns, HERE), tokenizer, chat_template=template)
    assert trained(example, tokenizer) == 'f:{"x": true}<|im_end|>'


def test_a_tool_call_that_the_template_leaves_out_is_refused(tokenizers):
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"x": 1}}}
    turns = (Message("user", "q"), Message("assistant", "wait", tool_calls=(call,)))
    with pytest.raises(UserError, match=r"leaves out 'look_up' in a tool call of message 2"):
        encode(Chat(turns, HERE), tokenizers("chatml"))


def test_what_a_tool_answers_is_not_trained(tokenizers, chat):
    tokenizer = tokenizers("chatml")
    (example,) = encode(chat("u: q", "a: call", "t: 42 degrees", "a: warm"), tokenizer)
    assert trained(example, tokenizer) == "call<|im_end|>warm<|im_end|>"
    assert "42 degrees" in written(example, tokenizer)
