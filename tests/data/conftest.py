"""Tiny byte-level tokenizers, each with the chat template of a family; rows and their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

SPECIAL = [
    "<s>", "</s>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]",
]  # fmt: skip
LINES = [
    "The sky is blue and the sea is blue too.\n",
    "user assistant system model tool\n\nWhat is the capital of France? It is Paris.",
    "<think>\nLet me think about this\n</think>\n\nhello world, how are you?",
]
GENERATION = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + GENERATION
    + "<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # Qwen2.5 speaks of itself when no system prompt is given
    "qwen2.5": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tiny.<|im_end|>\n"
    "{% endif %}" + CHATML,
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + GENERATION
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    # Llama 3.1 writes the day
    "llama3.1": "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ date_string or strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + GENERATION
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    # Llama 2 folds the system prompt into the first question, and begins each one with BOS
    "llama2": "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system is defined %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}",
    # Gemma knows no system prompt and wants the roles to alternate
    "gemma": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    + GENERATION
    + "<start_of_turn>model\n{% endif %}",
    # Qwen3: thoughts stay after the last question only, and the last turn always has a block
    "qwen3": "{%- set ns = namespace(last=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content %}"
    "{%- if m.role == 'assistant' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
    # Phi-3 writes EOS once, after the last turn
    "phi3": "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    # Mistral has no marker where an answer begins, and a space before it
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}",
    # Mistral v3 moves the system prompt to the last question
    "mistral-v3": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if system is defined and loop.index0 == ns.last %}{{ system }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
    # DeepSeek-R1 opens the thought for the model and strips it from every turn
    "deepseek": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}<|user|>{{ m.content }}"
    "{% endif %}{% endfor %}" + GENERATION + "<|assistant|><think>\n{% endif %}",
    "vicuna": "{% for m in messages %}{{ m.role | upper }}: {{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    + GENERATION
    + "ASSISTANT:{% endif %}",
}
EOS = {"phi3": "<|endoftext|>"}


def tokenizer(
    name: str,
    *,
    trim_offsets: bool = True,
    spaces: str = "",
    special: Sequence[str] = (),
    **settings: Any,
) -> Any:
    """`spaces` = first or always makes a tokenizer as Llama 2 has it, that begins with a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if spaces:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces)
        core.decoder = decoders.Metaspace(prepend_scheme=spaces)
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=[*SPECIAL, *(word for word in special if word not in SPECIAL)],
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), "\u2581", "\n", "\u00e9"],
        show_progress=False,
    )
    core.train_from_iterator(LINES * 5, trainer)
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trim = processors.ByteLevel(trim_offsets=trim_offsets)
    core.post_processor = processors.Sequence([trim, begin])
    given = {
        "chat_template": TEMPLATES.get(name),
        "bos_token": "<s>",
        "eos_token": EOS.get(name, "</s>"),
        "pad_token": "<pad>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**given, **settings})


@pytest.fixture(scope="session")
def tokenizers() -> Callable[..., Any]:
    """Return `get(family, **settings)`; without a family, a tokenizer without a chat template."""
    made: dict[str, Any] = {}

    def get(name: str = "", **settings: Any) -> Any:
        key = json.dumps([name, settings])
        if key not in made:
            made[key] = tokenizer(name, **settings)
        return made[key]

    return get


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Return `write(rows, name="rows.jsonl")`, which gives the path of a JSONL file of `rows`."""

    def put(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return put


@pytest.fixture
def chat() -> Callable[..., Any]:
    """Return `chat("u: hi", "a: hello", ...)`, a Chat; roles by first letter (s, u, a, t)."""
    from inlay.data.rows import Chat, Message, Source

    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}

    def make(*turns: str, **flags: Any) -> Chat:
        messages = tuple(Message(roles[turn[0]], turn[3:]) for turn in turns)
        return Chat(messages, Source("rows.jsonl", 1), **flags)

    return make
