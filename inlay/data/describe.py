"""What was inferred from the data, as the lines that a run prints before its first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inlay.data.ledger import reasons
from inlay.data.rows import Chat, Completion, Labeled, Row

if TYPE_CHECKING:
    from inlay.data.dataset import Prepared


def describe(prepared: Prepared) -> list[str]:
    """Return one line a fact: format, rows, template, mask, lengths, shares and warnings."""
    lines = [f"format: {prepared.format}", _rows(prepared)]
    lines += [f"dropped: {count} rows, {reason}" for reason, count in reasons(prepared.entries)]
    lines += _template(prepared)
    lines += _labels(prepared)
    if prepared.train[0].label is not None:
        lines.append("trained: the label of each row")
    elif prepared.config.train_on == "all":
        lines.append("trained: all tokens")
    elif prepared.template:
        lines.append("trained: the assistant's turns, each with the token that ends it")
    else:
        lines.append("trained: completions and texts, with EOS")
    lengths = sorted(len(example.input_ids) for example in prepared.train)
    trained = sum(example.trained for example in prepared.train)
    share = f"; {trained} of {sum(lengths)} trained ({trained / sum(lengths):.0%})"
    lines.append(
        f"tokens: median {quantile(lengths, 0.5)}, p95 {quantile(lengths, 0.95)}, "
        f"max {lengths[-1]}" + (share if prepared.train[0].label is None else "")
    )
    return lines + _contents(prepared)


def quantile(ordered: Sequence[int], share: float) -> int:
    """Return the smallest value with at least `share` of the ordered values at or below it."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _rows(prepared: Prepared) -> str:
    outcomes = [entry.outcome for entry in prepared.entries]
    counts = ", ".join(
        f"{outcomes.count(kind)} {kind}" for kind in ("kept", "cut", "split", "dropped")
    )
    return (
        f"rows: {len(outcomes)} ({counts}) -> {len(prepared.train)} training and "
        f"{len(prepared.eval)} evaluation examples"
    )


def _template(prepared: Prepared) -> list[str]:
    template = prepared.template
    if template is None:
        return []
    stop, eos = template.stop.strip(), template.tokenizer.eos_token
    lines = [f"chat template: {template.origin}; a turn ends in {stop!r}"]
    if not stop:
        lines[0] = (
            f"chat template: {template.origin}; WARNING: nothing ends a turn, so that the model "
            "does not learn to stop"
        )
    elif template.stop_id is None:
        lines.append(
            f"WARNING: {stop!r} is no single token of this tokenizer; generation needs it as a "
            "stop string"
        )
    elif stop != eos:
        lines.append(f"note: generation has to stop at {stop!r}; the tokenizer's EOS is {eos!r}")
    if template.surplus:
        lines.append(f"note: generation is given {template.surplus!r}, which the rows do not hold")
    if template.default_system:
        lines.append(f"system prompt written by the template: {template.default_system!r}")
    if template.dates:
        lines.append(
            f"note: the template writes today's date ({template.dates[0]!r}), so that a run on "
            "another day differs; data.chat_template_kwargs may set it"
        )
    if any(entry.reason.startswith("the template rewrites") for entry in prepared.entries):
        lines.append("the template rewrites earlier turns: one example for each trained turn")
    return lines


def _labels(prepared: Prepared) -> list[str]:
    """Return the line of the classes, the commonest of the training rows first."""
    counts = Counter(row.label for row in prepared.train_rows if isinstance(row, Labeled))
    if not counts:
        return []
    shown = [f"{name} {count / counts.total():.0%}" for name, count in counts.most_common(12)]
    more = f" and {len(counts) - 12} more" if len(counts) > 12 else ""
    return [f"labels: {len(counts)} ({', '.join(shown)}{more})"]


def _contents(prepared: Prepared) -> list[str]:
    rows = [*prepared.train_rows, *prepared.eval_rows]
    lines = []
    thinking = sum(map(_thinks, rows))
    if thinking:
        lines.append(f"reasoning: in {thinking} of {len(rows)} rows ({thinking / len(rows):.0%})")
    if prepared.neutralized:
        lines.append(f"special tokens in messages made plain text: {prepared.neutralized}")
    if prepared.specials:
        lines.append(f"special tokens in texts, left as they are: {prepared.specials}")
    if any(isinstance(row, Chat) and row.tools for row in rows):
        lines.append("tools: yes")
    return lines


def _thinks(row: Row) -> bool:
    """Return whether the row holds reasoning: a field of its own, or a <think> block."""
    if isinstance(row, Chat):
        return any(turn.reasoning or "</think>" in turn.content for turn in row.messages)
    return "</think>" in (row.completion if isinstance(row, Completion) else row.text)
