"""Attention of packed rows inside a model, through transformers' own interfaces.

A model asks its configuration which attention to use, and by the same name what makes a mask. Ours
makes no mask of T x T values but says once a batch, for all layers, where rows begin (`Packed`); it
finds that out by asking the mask's own definition about the ends of what each token sees. What it
does not recognize, and layers that want more than scores and a softmax, get the mask and the
attention that the model had.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from inlay.kernels import attention as kernel
from inlay.kernels.attention import Rotation, Rows

PREFIX = "inlay_packed_"
REPLACED = ("sdpa", "eager")
"""What ours takes the place of: any other was chosen for reasons of its own."""
UNTOUCHED = ("gpt2",)
"""Architectures that hand a mask on as it is, and do not say so by supporting flex_attention."""
HARMLESS = (
    *("position_ids", "cache_position", "sliding_window", "use_cache", "num_items_in_batch"),
    *("output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
)
"""What a layer may be told beside its scores: the mask says how far each token sees."""


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[bool]:
    """Let the attention of `model` take packed rows as they are, for a `with` block.

    Yields whether any of it does. A batch [B, T] without padding takes part; where it has no
    attention mask at all, its rows are told by position_ids that begin anew. The others compute as
    before, and so do layers with dropout on their weights, sinks, biases, or attention to another
    sequence.
    """
    before = [(config, config._attn_implementation) for config in _configurations(model)]
    for config, implementation in before:
        _register(implementation)
        # in this form it is not set on the configurations within it
        config._attn_implementation = {"": PREFIX + implementation}
    try:
        yield bool(before)
    finally:
        for config, implementation in before:
            # and not where another was set over it meanwhile
            if config._attn_implementation == PREFIX + implementation:
                config._attn_implementation = {"": implementation}


class Packed:
    """What stands for a mask: rows behind one another, and how many tokens back each token sees."""

    def __init__(self, rows: Rows, window: int | None, make: Callable[[], Any]) -> None:
        """make: returns the mask that this stands for, as the model's own attention wants it."""
        self.rows, self.window = rows, window
        self._make: Callable[[], Any] | None = make
        self._mask: Any = None
        self._turning: tuple[Tensor, Rotation] | None = None

    def mask(self) -> Any:
        """Return the mask that this stands for, made once."""
        if self._make is not None:
            self._mask, self._make = self._make(), None
        return self._mask

    def hear(self, made: tuple[Tensor, Tensor, Tensor], told: dict[str, Any]) -> None:
        """Take note of the q, k and v of these rows, and of what attention is told beside them."""

    def rotation(self, given: Rotation) -> Rotation:
        """Return the cosines and sines [1 or B, T, D] of all B T tokens, made once for layers."""
        if self._turning is None or self._turning[0] is not given[0]:
            tokens = self.rows.bounds[-1]
            cos, sin = (
                t.float().expand(tokens // t.shape[1], -1, -1).reshape(tokens, -1) for t in given
            )
            self._turning = given[0], (cos, sin)
        return self._turning[1]


def recognized(
    mask_function: Callable[..., Tensor],
    shape: tuple[int, int],
    device: torch.device | str,
    window: int | None = None,
) -> Rows | None:
    """Return the rows of a batch of `shape` [B, T] in which each token sees its own up to itself.

    mask_function: (batch, head, query, key), indices of one shape -> whether the query sees the
    key. window: how many tokens back it sees at most, itself among them. None where both ends of
    what each token sees are not those.
    """
    batch = torch.arange(shape[0], device=device).repeat_interleave(shape[1])
    query = torch.arange(shape[1], device=device).repeat(shape[0])
    head = torch.zeros_like(query)

    def sees(back: Tensor) -> Tensor:
        key = query - back
        inside = (key >= 0) & (key < shape[1])
        seen = mask_function(batch, head, query, key.clamp(0, shape[1] - 1))
        return torch.as_tensor(seen, device=device).expand_as(query) & inside

    index = torch.arange(len(query), device=device)
    begins = ~sees(torch.ones_like(query))
    place = index - torch.where(begins, index, 0).cummax(0).values  # in its row
    far = place if window is None else place.clamp(max=window - 1)
    right = sees(head) & sees(far) & ~sees(far + 1) & ~sees(head - 1)
    if not bool(right.all()):
        return None
    starts = [*begins.nonzero()[:, 0].tolist(), len(query)]
    return Rows.of([b - a for a, b in pairwise(starts)], device)


def only_scores(told: Mapping[str, Any]) -> bool:
    """Return whether attention that is told this makes scores and a softmax, and no more.

    That is without dropout on its weights, sinks and biases, and causal as its mask is.
    """
    more = {
        n: v for n, v in told.items() if n not in ("scaling", "softcap", "dropout", "is_causal")
    }
    asked = [n for n, v in more.items() if v is not None and v is not False]
    plain = not told.get("dropout") and told.get("is_causal") is not False
    return plain and all(name in HARMLESS for name in asked)


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype that autocast computes attention in, where it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _configurations(model: nn.Module) -> list[Any]:
    """Return the configurations of the parts of `model` whose attention can be replaced."""
    found: dict[int, Any] = {}
    for part in model.modules():
        config = getattr(part, "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        if implementation not in REPLACED or not getattr(part, "_supports_attention_backend", 0):
            continue
        # a mask that is no tensor goes through models that can do with that of flex_attention
        blind = getattr(part, "_supports_flex_attn", False)
        if blind or getattr(config, "model_type", None) in UNTOUCHED:
            found[id(config)] = config
    return list(found.values())


def _register(implementation: str) -> None:
    """Add our forms of an implementation to transformers' tables, under names of our own."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PREFIX + implementation, _attention_over(implementation))
    AttentionMaskInterface.register(PREFIX + implementation, _mask_over(implementation))


def _mask_over(implementation: str) -> Callable[..., Any]:
    """Return a function that makes a mask, or tells that it is one of packed rows."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    plain = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def make(**told: Any) -> Any:
        if torch.compiler.is_compiling():  # all of the model: it can look into the model's own
            return plain(**told)
        tokens = told.get("q_length", 0)  # earlier releases tell another thing
        padding = told.get("attention_mask")
        custom = told.get("use_vmap") or not (padding is None or bool(padding.all()))
        square = tokens > 0 and told.get("kv_length") == tokens
        moved = [told.get(name, 0) for name in ("q_offset", "kv_offset")]
        if custom or not square or not all(isinstance(n, int) and n == 0 for n in moved):
            return plain(**told)
        shape = (told["batch_size"], tokens)
        window = told.get("local_size")
        rows = recognized(told["mask_function"], shape, told.get("device", "cpu"), window)
        if rows is None:
            return plain(**told)
        return Packed(rows, window, lambda: plain(**told))

    return make


def _attention_over(implementation: str) -> Callable[..., Any]:
    """Return an attention function that hands what is not of packed rows to `implementation`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **told: Any
    ) -> Any:
        if isinstance(mask, Packed):
            mask.hear((query, key, value), told)
            out = _packed(query, key, value, mask, **told)
            if out is not None:
                return out, None
            mask = mask.mask()
        # that of the file which defines the layer is where transformers finds "eager" too
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        plain = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own)
        return plain(module, query, key, value, mask, **told)

    return attend


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Packed,
    scaling: float | None = None,
    softcap: float | None = None,
    **told: Any,
) -> Tensor | None:
    """Return the output [B, T, heads, D] of q, k, v [B, heads, T, D]; None where it is another's.

    As scaled_dot_product_attention does, this computes in autocast's dtype.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = in_autocast(query, key, value)
    alike = query.dtype == key.dtype == value.dtype and key.shape == value.shape
    length = query.shape[0] * query.shape[2]
    if (
        scale <= 0
        or not only_scores(told)
        or not alike
        or query.shape[-1] != key.shape[-1]
        or query.shape[1] % key.shape[1]
        or not length == mask.rows.bounds[-1] == key.shape[0] * key.shape[2]
    ):
        return None
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out = kernel.attention(q, k, v, mask.rows, scale=scale, window=mask.window, cap=softcap)
    return out.unflatten(0, (query.shape[0], query.shape[2]))
