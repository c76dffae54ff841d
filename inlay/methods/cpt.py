"""Context-aware prompt tuning: [E(c) + D; E(x)] in place of E(x), each row |D_t| <= e_t.

Blau et al., arXiv:2410.17222.  c [V] the tokens of a context of solved examples, E(c) [V, W] their
embeddings, D [V, W] trained. Each token has a type: 1, 2, 3 and 4 modulo 4 are the template before
an input, the input, the template before a label, and the label, which does not move (e = 0); e of
the others is epsilon * sqrt(W / 2048), with one epsilon for inputs and one for templates. The loss
is also over the context's labels; with "decay" those of an example count less the more examples
come after it.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Scale, Whole
from inlay.core.prompted import PromptConfig, Virtual, check_width, word_embeddings
from inlay.methods._labels import INPUT, LABEL, weighted, widened

Token = Annotated[int, Whole(least=0, most=2**31 - 1)]
"""A token's number, or a type."""
WIDTH = 2048
"""The width of the embeddings for which epsilon is told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CPTConfig(PromptConfig):
    """CPT's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.CPT

    task_type: str | None = "CAUSAL_LM"
    """What the model is for: a decoder's text, and nothing else."""
    cpt_token_ids: list[Token] | None = None
    """The context's tokens; unset = one token 0."""
    cpt_mask: list[Literal[1]] | None = None
    """PEFT's mask of the context, which it does not heed: ones, or unset."""
    cpt_tokens_type_mask: list[Token] | None = None
    """Each token's type: 1, 2, 3, 4 in the first example, 5 to 8 in the second; unset = all 1."""
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    """Whether the labels of examples far before the input count less."""
    opt_loss_decay_factor: Scale = 1.0
    """How much less the labels of an example count than those of the next, with "decay"."""
    opt_projection_epsilon: Scale = 0.1
    """How far an input's embedding may move, in a model of width 2048."""
    opt_projection_format_epsilon: Scale = 0.1
    """How far a template's embedding may move, in a model of width 2048."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer that the context was read with; kept for the files."""

    def __post_init__(self) -> None:
        """Fill in what is one a token; UserError where counts differ, or the task is another."""
        if self.task_type is None:
            object.__setattr__(self, "task_type", "CAUSAL_LM")
        super().__post_init__()
        if self.task_type != "CAUSAL_LM":
            raise UserError(f"task_type={self.task_type!r}: CPT is for CAUSAL_LM alone")
        ids = self.cpt_token_ids or [0]
        ones = [1] * len(ids)
        fields = {"cpt_token_ids": ids, "cpt_mask": ones, "cpt_tokens_type_mask": ones}
        for name, usual in fields.items():
            value = getattr(self, name) or usual
            if len(value) != len(ids):
                raise UserError(f"{name} has {len(value)} entries, but cpt_token_ids {len(ids)}")
            object.__setattr__(self, name, list(value))
        if self.num_virtual_tokens not in (None, len(ids)):
            raise UserError(
                f"num_virtual_tokens={self.num_virtual_tokens}, but cpt_token_ids has {len(ids)}: "
                "leave it out"
            )
        object.__setattr__(self, "num_virtual_tokens", len(ids))
        if min(self.opt_projection_epsilon, self.opt_projection_format_epsilon) < 0:
            raise UserError("opt_projection_epsilon and opt_projection_format_epsilon are from 0")


class CPT(Virtual):
    """The context's embeddings, and how far each has moved."""

    config: CPTConfig
    frozen = ("context",)
    computed: ClassVar[tuple[str, ...]] = ("prompt_embeddings",)
    _due: tuple[Tensor, Tensor, Any] | None = None

    def make(self, base: Base) -> None:
        """Make E(c) and D; UserError where the model has no such tokens, or is no decoder."""
        check_width(base.module, self.config.token_dim)
        size, ids = len(word_embeddings(base.module).weight), self.config.cpt_token_ids or [0]
        if max(ids) >= size:
            raise UserError(
                f"cpt_token_ids holds {max(ids)}; the model's vocabulary has {size} tokens: read "
                "the context with the model's own tokenizer"
            )
        self.context = self.parameter(self.count, self.config.token_dim or 1)
        self.delta = self.parameter(self.count, self.config.token_dim or 1)

    @torch.no_grad()
    def reset(self, base: Base) -> None:
        """Start from the context's embeddings, moved nowhere."""
        ids = torch.tensor(self.config.cpt_token_ids, device=self.context.device)
        self.context.copy_(word_embeddings(base.module)(ids))
        nn.init.zeros_(self.delta)

    def _limits(self) -> Tensor:
        """Return how far each token may move, [V, 1]."""
        config = self.config
        kinds, template = self._types() % 4, config.opt_projection_format_epsilon
        far = torch.where(kinds == INPUT, config.opt_projection_epsilon, template)
        wide = ((config.token_dim or 1) / WIDTH) ** 0.5
        return torch.where(kinds == LABEL, 0.0, far * wide)[:, None].to(self.delta.dtype)

    def _types(self) -> Tensor:
        return torch.tensor(self.config.cpt_tokens_type_mask, device=self.delta.device)

    def _projected(self) -> Tensor:
        """Return D, each row no longer than its limit."""
        norm, most = self.delta.norm(dim=1, keepdim=True), self._limits()
        return torch.where(norm > most, self.delta * most / norm.clamp(min=1e-30), self.delta)

    @property
    def prompt_embeddings(self) -> Tensor:
        """The moved context [V, W], as a file holds it."""
        return self.context + self._projected()

    def virtual(self) -> Tensor:
        """Return the moved context; in training D itself is first brought back to its limits."""
        if not (self.training and torch.is_grad_enabled()):
            return self.prompt_embeddings
        with torch.no_grad():  # a step of projected gradient descent ends here
            self.delta.copy_(self._projected())
        return self.context + self.delta * (self._limits() > 0)

    def fill(self, name: str, value: Tensor) -> None:
        """Take a moved context as one that has moved nowhere yet, as PEFT does."""
        self._put("context", value)
        self._put("delta", torch.zeros_like(value))

    def unsaved(self) -> dict[str, Tensor]:
        """Return the context and how far it has moved, which a file holds as a sum."""
        return {"context": self.context, "delta": self._projected()}

    def resume(self, tensors: dict[str, Tensor]) -> None:
        """Take context and movement; ValueError where their sum is not the one here."""
        if tensors.keys() != {"context", "delta"}:
            raise ValueError("it has other tensors")
        both = {name: tensor.to(self.context) for name, tensor in tensors.items()}
        if not torch.allclose(both["context"] + both["delta"], self.context, atol=1e-5):
            raise ValueError("their sum is another")
        for name, value in both.items():
            self._put(name, value)

    def edit(
        self,
        model: Any,
        call: dict[str, Any],
        count: int,
        virtual: Tensor | None,
        shown: Tensor | None = None,
    ) -> None:
        """Put the context before the input, and keep what the loss needs, which is `finish`'s."""
        labels, types = call.pop("labels", None), call.pop("input_type_mask", None)
        items = call.pop("num_items_in_batch", None) if labels is not None else None
        if labels is not None and len(set((self.selection and self.selection.rows) or ())) > 1:
            raise UserError(
                "the loss is over one context's labels: train rows of several adapters in batches "
                "of their own"
            )
        super().edit(model, call, count, virtual, shown)
        self._due = None
        if labels is not None:
            ids = torch.tensor(self.config.cpt_token_ids, device=labels.device)
            own = self._types().to(labels.device)
            self._due = (*widened(labels, types, ids, own), items)

    def finish(self, output: Any) -> Any:
        """Return a model's output with the mean loss of all label tokens, weighted."""
        if self._due is None:
            return output
        (labels, types, items), self._due, config = self._due, None, self.config
        plain = config.opt_weighted_loss_type == "none"
        loss = weighted(
            output.logits, labels, types, 1.0 if plain else config.opt_loss_decay_factor
        )
        if items is not None:  # this batch's share of an optimizer step's
            seen = labels[:, 1:] != -100
            loss = loss * seen[:, self.count - 1 :].sum() / items
        return type(output)(loss=loss, **{k: v for k, v in output.items() if k != "loss"})

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's one key."""
        return {"prompt_embeddings": ("prompt_embeddings", tuple(self.context.shape))}


METHOD = Method(CPTConfig, CPT)
