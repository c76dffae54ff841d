"""Greedy answers to held-out rows, and which of them are exactly the expected ones.

A chat row asks with everything before its last assistant message and expects that message; a
prompt/completion row asks with the prompt. Rows are answered in batches, padded on the left, and an
answer ends at the first token that ends a turn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inlay.data.chats import question
from inlay.data.rows import Chat, Completion
from inlay.data.template import RenderError, Template
from inlay.data.tokens import Tokens
from inlay.model.fast import inference
from inlay.model.load import most_tokens
from inlay.train.precision import autocast, device_of


@dataclass(frozen=True)
class Answer:
    """One row's question and what came of it; `expected` and `answer` without space at the ends."""

    row: str
    prompt: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Whether the answer is the expected one, character by character."""
        return self.answer == self.expected


@dataclass(frozen=True)
class Answers:
    """The answers in the order of their rows."""

    answers: tuple[Answer, ...]

    @property
    def correct(self) -> int:
        """How many are correct."""
        return sum(answer.correct for answer in self.answers)

    @property
    def exact_match(self) -> float:
        """The part that is correct, 0 to 1; 0 where there are no rows."""
        return self.correct / len(self.answers) if self.answers else 0.0


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Any],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    precision: torch.dtype = torch.float32,
    template: Template | None = None,
) -> Answers:
    """Return the model's greedy answer to each of `rows` (Chat or Completion), beside the expected.

    Chats are rendered by `template` (left out = the tokenizer's). For the base beside the adapter
    call it once more within `model.disable_adapter()`. An answer ends where the model has no more
    positions. Raises UserError for a row that has no answer to compare with.
    """
    if template is None and any(isinstance(row, Chat) for row in rows):
        template = Template(tokenizer)
    tokens = Tokens(tokenizer) if template else None
    questions = [_question(row, tokenizer, template, tokens) for row in rows]
    stops = stop_ids(model, tokenizer, template)
    # a template may end a turn with text that is no token of its own
    end = template.stop if template and template.stop_id is None else ""
    # like lengths together: the least padding; the order of rows is put back below
    order = sorted(range(len(rows)), key=lambda i: len(questions[i].ids))
    found: dict[int, str] = {}
    with inference(model), torch.no_grad(), autocast(precision, device_of(model)):
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            prompts = [questions[i].ids for i in chosen]
            room = (most_tokens(model) or sys.maxsize) - max(map(len, prompts))
            fitting = min(max_new_tokens, room)
            if fitting < 1:
                found.update(dict.fromkeys(chosen, ""))
                continue
            texts = _generate(model, tokenizer, prompts, stops, fitting)
            cut = [text.partition(end)[0] if end else text for text in texts]
            found.update(zip(chosen, cut, strict=True))
    return Answers(
        tuple(
            Answer(asked.row, asked.shown, asked.expected.strip(), found[i].strip())
            for i, asked in enumerate(questions)
        )
    )


def stop_ids(model: nn.Module, tokenizer: Any, template: Template | None = None) -> list[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's, the chat template's."""
    config = getattr(model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    found = set(given if isinstance(given, list) else [given])
    found |= {tokenizer.eos_token_id, template.stop_id if template else None}
    return sorted(found - {None})


@dataclass(frozen=True)
class _Question:
    row: str
    shown: str
    ids: list[int]
    expected: str


def _question(
    row: Any, tokenizer: Any, template: Template | None, tokens: Tokens | None
) -> _Question:
    where = str(row.source)
    if isinstance(row, Completion):
        ids = tokenizer(row.prompt)["input_ids"]
        # some tokenizers end every text with the token that ends an answer
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        return _Question(where, row.prompt, ids or [tokenizer.eos_token_id], row.completion)
    if not isinstance(row, Chat):
        raise row.source.error("exact match needs chats or completions, not plain text")
    last = max((i for i, m in enumerate(row.messages) if m.role == "assistant"), default=0)
    if last == 0:
        raise row.source.error("no assistant message follows a question to compare with")
    assert template is not None
    assert tokens is not None
    try:
        ids = question(row.messages[:last], template, tokens, row.tools)
    except RenderError as error:
        raise row.source.error(f"the chat template refuses the question: {error}") from error
    return _Question(where, row.messages[last - 1].content, ids, row.messages[last].content)


def _generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stops: Iterable[int],
    max_new_tokens: int,
) -> list[str]:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    width = max(map(len, prompts))
    device = device_of(model)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    made = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)  # type: ignore[operator]
    texts = []
    for row in made[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in set(stops)), len(row))
        texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return texts
