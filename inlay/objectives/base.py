"""What an objective is: sums, divided by the count of the whole optimizer step.

Law 2: however a step's rows are cut into micro-batches and ranks, `loss` adds up to the same number
and gradient:

    norm = sum of counts(batch) over every micro-batch of every rank of the step
    sum of loss(policy, batch, norm) over the same = the step's loss
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from inlay.data.collate import Batch

Row = TypeVar("Row", contravariant=True)


class Objective(Protocol[Row]):
    """One way to train; stateless, so that a run can be resumed at any step."""

    row: type
    """What it eats before encoding, such as inlay.data.rows.Chat."""

    task: str
    """The task_type whose models it trains: CAUSAL_LM, SEQ_CLS."""

    means: tuple[str, ...]
    """The names of `counts`, known before any batch: ranks without rows add up the same ones."""

    def size(self, row: Row) -> int:
        """Return the tokens of `row`; rows of like size go into one micro-batch."""

    def collate(self, rows: Sequence[Row], tokenizer: Any) -> Batch:
        """Return one batch of `rows`, in that order."""

    def prepare(self, policy: nn.Module, batch: Batch) -> Batch:
        """Add what needs no gradient: reference log-probabilities, rollouts, rewards."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return what `loss` is a mean over, each a scalar, such as {"tokens": trained ones}."""

    def loss(self, policy: nn.Module, batch: Batch, norm: dict[str, Tensor]) -> Tensor:
        """Return this micro-batch's share of the step's loss; `norm` is `counts` of the whole step.

        Where nothing is trained it is a 0 that still hangs on the graph, so that every rank can run
        backward.
        """
