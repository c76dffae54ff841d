"""From the `data:` block to examples: read, choose, encode, account for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.core.errors import UserError
from inlay.data.describe import describe
from inlay.data.encode import Encoded, Encoder, Example
from inlay.data.ledger import Entry, reasons, write_ledger
from inlay.data.read import read_rows
from inlay.data.rows import Chat, Row
from inlay.data.settings import DataConfig
from inlay.data.split import held_out, limited
from inlay.data.template import Template

ADVICE = {
    "longer than max_length": "Raise data.max_length, or choose another data.overlong.",
    "no turn is trained": "Unmask an assistant turn, or set data.train_on: all.",
    "also in data.eval_path": "Evaluate on other rows than those that train.",
}


@dataclass(frozen=True)
class Prepared:
    """What a run trains on, and what was inferred on the way."""

    config: DataConfig
    train: list[Example]
    eval: list[Example]
    train_rows: list[Row]
    """The rows behind `train`, dropped ones left out."""
    eval_rows: list[Row]
    """The rows behind `eval`, dropped ones left out."""
    format: str
    template: Template | None
    """The chat template; None where no row is a conversation."""
    stop_token_ids: list[int]
    """The tokens at which generation has to stop: what ends a turn, and EOS."""
    entries: list[Entry]
    """The ledger."""
    neutralized: int
    """Special tokens inside messages that were made plain text."""
    specials: int
    """Special tokens inside completions and texts, left as they are."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the template, to be saved with what was trained on it."""
        return self.template.text if self.template else None

    def describe(self) -> list[str]:
        """Return the lines that are printed before step 0."""
        return describe(self)


def prepare(config: DataConfig, tokenizer: Any, ledger_path: str | Path | None = None) -> Prepared:
    """Return the examples of `config`, and write what became of every row to `ledger_path`.

    Raises UserError for a row that cannot be read or rendered, and where no row is left to train or
    to evaluate; the ledger is written in that case too.
    """
    rows, format = _read(config.paths, config)
    other = _read(config.eval_paths, config)[0] if config.eval_paths else []
    encoder = Encoder(tokenizer, config)
    sides = _sides(rows, other, config)
    encoded = [
        encoder.encode(row) if side in ("train", "eval") else Encoded((), "dropped", side)
        for row, side in zip([*rows, *other], sides, strict=True)
    ]
    entries = [
        Entry.of(row, side, done)
        for row, side, done in zip([*rows, *other], sides, encoded, strict=True)
    ]
    if ledger_path is not None:
        write_ledger(Path(ledger_path), entries)

    def taken(wanted: str) -> tuple[list[Example], list[Row]]:
        examples: list[Example] = []
        kept: list[Row] = []
        for row, entry, done in zip([*rows, *other], entries, encoded, strict=True):
            if entry.split == wanted:
                examples += done.examples
                kept.append(row)
        return examples, kept

    (train, train_rows), (held, eval_rows) = taken("train"), taken("eval")
    _check_left(
        train, [entry for entry, side in zip(entries, sides, strict=True) if side != "eval"]
    )
    if "eval" in sides and not held:
        _check_left(held, [e for e, side in zip(entries, sides, strict=True) if side == "eval"])
    has_chats = any(isinstance(row, Chat) for row in [*train_rows, *eval_rows])
    template = encoder.template if has_chats else None
    stops = (template.stop_id if template else None, tokenizer.eos_token_id)
    return Prepared(
        config=config,
        train=train,
        eval=held,
        train_rows=train_rows,
        eval_rows=eval_rows,
        format=format,
        template=template,
        stop_token_ids=list(dict.fromkeys(index for index in stops if index is not None)),
        entries=entries,
        neutralized=sum(done.neutralized for done in encoded),
        specials=sum(done.specials for done in encoded),
    )


def _read(paths: Sequence[str], config: DataConfig) -> tuple[list[Row], str]:
    return read_rows(
        paths, config.format, name=config.name, split=config.split, revision=config.revision
    )


def _sides(rows: Sequence[Row], other: Sequence[Row], config: DataConfig) -> list[str]:
    """Return for each row train, eval, or the reason why it is neither."""
    taken = limited(rows, config.limit)
    evaluated = {row.id for row in other}
    held = held_out([rows[i] for i in sorted(taken)], config.eval_fraction)
    sides = []
    for i, row in enumerate(rows):
        if i not in taken:
            sides.append("over data.limit")
        elif row.id in evaluated:
            sides.append("also in data.eval_path")
        else:
            sides.append("eval" if row.id in held else "train")
    return sides + ["eval"] * len(other)


def _check_left(examples: Sequence[Example], entries: Sequence[Entry]) -> None:
    if examples:
        return
    reason, count = reasons(entries)[0]
    first = next(entry for entry in entries if entry.reason.startswith(reason))
    raise UserError(
        f"none of the {len(entries)} rows is left: {count} dropped because {first.reason!r}, the "
        f"first at {first.file}:{first.line}. {ADVICE.get(reason, 'Correct the rows.')}"
    )
