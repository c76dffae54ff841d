"""What a model scores on held-out rows: loss, perplexity, and answers that are exactly right."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from inlay.config.schema import EvaluateConfig, RunConfig
from inlay.data.rows import Chat, Completion, Row
from inlay.data.split import limited
from inlay.data.template import Template
from inlay.train.answers import exact_match
from inlay.train.evaluate import Score, evaluate_loss
from inlay.train.predict import macro_f1, predict


def measure_loss(
    model: Any,
    tokenizer: Any,
    objective: Any,
    examples: Sequence[Any],
    batch_size: int,
    precision: Any,
) -> dict[str, Any]:
    """Return {"loss", "perplexity", "tokens"} over `examples`; empty where there are none.

    Of a classifier the loss alone.
    """
    if not examples:
        return {}
    score = evaluate_loss(
        model, tokenizer, objective, examples, batch_size=batch_size, precision=precision
    )
    return told(score, objective)


def told(score: Score, objective: Any) -> dict[str, Any]:
    """Return a score as JSON has it; what is not finite is null."""
    found = {"loss": score.loss}
    if objective.task != "SEQ_CLS":  # there the loss is one of rows
        found |= {"perplexity": score.perplexity, "tokens": score.tokens}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def measure_labels(
    model: Any,
    tokenizer: Any,
    objective: Any,
    examples: Sequence[Any],
    batch_size: int,
    precision: Any,
) -> dict[str, Any]:
    """Return {"accuracy", "macro_f1", "correct", "labeled"} over `examples`; empty without any."""
    if not examples:
        return {}
    found = predict(model, tokenizer, objective, examples, batch_size=batch_size, dtype=precision)
    labels = [str(example.label) for example in examples]
    correct = sum(map(operator.eq, found, labels))
    return {
        "accuracy": correct / len(labels),
        "macro_f1": macro_f1(found, labels),
        "correct": correct,
        "labeled": len(labels),
    }


def measure_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    config: EvaluateConfig,
    precision: Any,
    template: Template | None,
) -> dict[str, Any]:
    """Return {"exact_match", "correct", "answered", "answers"}; empty where no row asks."""
    asked = answerable(rows, config.answers)
    if not asked:
        return {}
    found = exact_match(
        model,
        tokenizer,
        asked,
        max_new_tokens=config.max_new_tokens,
        precision=precision,
        template=template,
    )
    return {
        "exact_match": found.exact_match,
        "correct": found.correct,
        "answered": len(asked),
        "answers": [asdict(answer) for answer in found.answers],
    }


def measure(
    model: Any,
    tokenizer: Any,
    objective: Any,
    examples: Sequence[Any],
    rows: Sequence[Row],
    config: RunConfig,
    precision: Any,
    template: Template | None,
) -> dict[str, Any]:
    """Return the loss over `examples`, with answers to `rows` or, of a classifier, its labels."""
    size = config.train.eval_batch_size or config.train.micro_batch_size
    given = (model, tokenizer, objective, examples, size, precision)
    if objective.task == "SEQ_CLS":
        return measure_loss(*given) | measure_labels(*given)
    answers = measure_answers(model, tokenizer, rows, config.evaluate, precision, template)
    return measure_loss(*given) | answers


def answerable(rows: Sequence[Row], limit: int) -> list[Row]:
    """Return at most `limit` of the rows that ask something, chosen by content."""
    asked = [row for row in rows if _asks(row)]
    return [asked[i] for i in sorted(limited(asked, limit))]


def _asks(row: Row) -> bool:
    if isinstance(row, Chat):
        last = max((i for i, m in enumerate(row.messages) if m.role == "assistant"), default=0)
        return last > 0 and bool(row.messages[last].content)
    return isinstance(row, Completion)
