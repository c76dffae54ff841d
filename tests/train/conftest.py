"""A toy language model, its rows and its objective: the loop in milliseconds a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from inlay.objectives.tokens import IGNORED, count_tokens, token_loss


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    labels: list[int]
    row_id: str


@dataclass(frozen=True)
class Padded:
    input_ids: torch.Tensor
    labels: torch.Tensor
    rows: tuple[str, ...]

    def to(self, device: Any) -> Padded:
        return replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device))

    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids}


class ToyLM(nn.Module):
    """Logits from the mean of the tokens so far; a frozen base and a low-rank trained part."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.a, self.b = nn.Linear(8, 4, bias=False), nn.Linear(4, 8)
        self.dropout = nn.Dropout(dropout)
        self.embed.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> Any:
        x = self.embed(input_ids)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return SimpleNamespace(logits=self.head(x + self.b(self.a(self.dropout(x)))))


class ToyObjective:
    row = Row
    means = ("tokens",)

    def size(self, row: Row) -> int:
        return len(row.input_ids)

    def collate(self, rows: Any, tokenizer: Any) -> Padded:
        width = max(map(self.size, rows))
        ids = [row.input_ids + [0] * (width - len(row.input_ids)) for row in rows]
        labels = [row.labels + [IGNORED] * (width - len(row.labels)) for row in rows]
        names = tuple(row.row_id for row in rows)
        return Padded(torch.tensor(ids), torch.tensor(labels), names)

    def prepare(self, policy: nn.Module, batch: Padded) -> Padded:
        return batch

    def counts(self, batch: Any) -> dict[str, torch.Tensor]:
        return count_tokens(batch)

    def loss(self, policy: nn.Module, batch: Any, norm: dict[str, torch.Tensor]) -> torch.Tensor:
        return token_loss(policy, batch, norm)


def make_rows(count: int, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(2, 9, (), generator=generator))
        ids = torch.randint(0, 16, (length,), generator=generator).tolist()
        masked = int(torch.randint(0, length, (), generator=generator))
        rows.append(Row(ids, [IGNORED] * masked + ids[masked:], f"toy.jsonl:{i + 1}"))
    return rows


@pytest.fixture
def toy() -> SimpleNamespace:
    """Return .model(dropout=0.0), .rows(count, seed=0), .Row and .objective."""

    def model(dropout: float = 0.0) -> ToyLM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ToyLM(dropout)

    return SimpleNamespace(model=model, rows=make_rows, Row=Row, objective=ToyObjective())
