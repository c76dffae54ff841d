"""Examples -> one row without padding, in which they do not see each other.      T tokens in all.

In transformers 5, position_ids that begin anew keep the rows of a packed batch apart in most
architectures and every attention backend, but only if no attention mask is given and no cache is
used: an all-ones mask, or the default cache, lets each row see the ones before it, without a
message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inlay.core.errors import UserError
from inlay.data.collate import Batch
from inlay.data.encode import IGNORED, Example

STATEFUL = ("mamba", "rwkv", "jamba", "zamba", "bamba", "recurrent_gemma", "xlstm", "qwen3_next")


def pack(rows: Sequence[Example], max_tokens: int) -> Batch:
    """Return `rows` behind one another as a batch [1, T] with position_ids from 0 in each.

    The first label of each row is -100: no row predicts the next one's first token. Raises
    UserError where T is over `max_tokens`.
    """
    total = sum(len(row.input_ids) for row in rows)
    if total > max_tokens:
        raise UserError(
            f"{len(rows)} rows hold {total} tokens, more than the {max_tokens} of one packed batch"
        )
    weights = None
    if any(row.weights for row in rows):
        factors = [row.weights or [1.0] * len(row.input_ids) for row in rows]
        weights = torch.tensor([_joined(factors)])
    return Batch(
        input_ids=torch.tensor([_joined([row.input_ids for row in rows])]),
        labels=torch.tensor([_joined([[IGNORED, *row.labels[1:]] for row in rows])]),
        attention_mask=None,
        position_ids=torch.tensor([_joined([list(range(len(row.input_ids))) for row in rows])]),
        rows=tuple(str(row.source) for row in rows),
        weights=weights,
    )


def bins(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return indices of `lengths` in groups of at most `max_tokens` each, longest first (FFD).

    First-fit decreasing uses at most 11/9 of the fewest groups, plus one. A length over the limit
    is a group of its own.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fit = next((g for g, left in enumerate(room) if lengths[index] <= left), None)
        if fit is None:
            fit = len(groups)
            groups.append([])
            room.append(max_tokens)
        groups[fit].append(index)
        room[fit] -= lengths[index]
    return groups


def check_packable(model_config: Any) -> None:
    """Refuse packing for models with layers that carry a state from token to token.

    Raises UserError for state-space and linear-attention layers, which position_ids do not reset.
    That the layers left keep rows apart is tried before training (inlay.train.setup).
    """
    config = getattr(model_config, "text_config", None) or model_config
    layers = set(getattr(config, "layer_types", None) or ())
    layers |= set(getattr(config, "layers_block_type", None) or ())
    kinds = {kind for kind in layers if "attention" not in kind or "linear" in kind}
    model_type = str(getattr(config, "model_type", ""))
    kinds |= {model_type for word in STATEFUL if word in model_type}
    if kinds:
        raise UserError(
            "train.packing: the base has layers that carry a state over packed rows "
            f"({', '.join(sorted(kinds))}); set packing: false"
        )


def _joined(parts: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for part in parts for value in part]
