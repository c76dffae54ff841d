"""AdaMSS: [W b] + M N; M's rows fall into K groups, each of a rank of its own   (NeurIPS 2025).

Zheng et al., neurips.cc/virtual/2025/poster/119606.  N [R, I], or with a bias [R, I + 1], is the
first R right singular vectors of [W b], fixed.  The rows of the left ones are grouped by k-means;
the rows of group k of M [O, R] are B_k A_k, of rank R_k: A_k [R_k, R] starts as the main directions
of those left rows, B_k [O_k, R_k] at zero.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Count, Rank, Scale, Seed, Steps
from inlay.core.targeted import TargetedConfig
from inlay.methods._kmeans import grouped


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamssConfig(TargetedConfig):
    """AdaMSS's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.ADAMSS
    unwritten = ("exclude_modules",)
    not_yet: ClassVar[dict[str, str]] = {
        "use_asa": "which groups train is not changed during training; all of them do"
    }

    r: Rank = 100
    """Singular vectors R of a weight; at most as many as it has."""
    num_subspaces: Rank = 5
    """Groups K that a layer's rows fall into; at most as many as it has rows."""
    subspace_rank: Rank = 1
    """Largest rank of one group's update, R_k."""
    init_weights: Literal["orthogonal", False] | None = "orthogonal"
    """ "orthogonal": B zero. None: B random, for tests."""
    use_asa: bool = False
    """Whether training leaves out the groups that matter least; only False."""
    asa_target_subspaces: Count = 50
    """Of use_asa: groups that are left at the end, in the whole model."""
    init_warmup: Steps = 50
    """Of use_asa: the step it begins at."""
    final_warmup: Steps = 1000
    """Of use_asa: the step it ends at."""
    mask_interval: Steps = 100
    """Of use_asa: steps between two choices."""
    asa_importance_beta: Scale = 0.85
    """Of use_asa: decay of the mean importance."""
    asa_uncertainty_beta: Scale = 0.85
    """Of use_asa: decay of the mean uncertainty."""
    asa_schedule_exponent: Scale = 3.0
    """Of use_asa: how fast the groups become fewer."""
    use_dynamic_rank: bool = False
    """Lower a group's rank to the directions whose share is above svd_threshold."""
    svd_threshold: Scale = 0.1
    """Least share, of the squared first singular value of a group's rows, that counts."""
    random_seed: Seed = 0
    """Seed of the random projection that finds the singular vectors."""

    def __post_init__(self) -> None:
        """Read False as None, as PEFT does."""
        super().__post_init__()
        if self.init_weights is False:
            object.__setattr__(self, "init_weights", None)


class Adamss(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    config: AdamssConfig
    adamss_newB: Tensor
    order: Tensor

    def make(self, base: Base) -> None:
        """Find N and the groups; make A_k and B_k."""
        weight, bias = base.weight().detach(), base.bias()
        self.wide = bias is not None
        if bias is not None:
            weight = torch.cat([weight, bias.detach()[:, None]], 1)
        n, rows, self._starts = _subspaces(weight.float(), self.config)
        self.register_buffer("adamss_newB", n.to(self._device, self._dtype))
        # which row of B_1 A_1, B_2 A_2, ... is row o of M
        self.register_buffer("order", torch.cat(rows).argsort(), persistent=False)
        self.groups = len(rows)
        for k, (group, start) in enumerate(zip(rows, self._starts, strict=True)):
            self.register_parameter(f"adamss_A_{k}", self.parameter(*start.shape))
            self.register_parameter(f"adamss_B_{k}", self.parameter(len(group), len(start)))

    def reset(self, base: Base) -> None:
        """Start from an update of zero."""
        del base
        with torch.no_grad():
            for start, (a, b) in zip(self._starts, self._pairs(), strict=True):
                a.copy_(start)
                nn.init.normal_(b, std=0.01 if self.config.init_weights is None else 0.0)

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return A_k and B_k of each group."""
        of = self.get_parameter
        return [(of(f"adamss_A_{k}"), of(f"adamss_B_{k}")) for k in range(self.groups)]

    def _rows(self, dtype: torch.dtype) -> Tensor:
        """Return M [O, R]."""
        return torch.cat([b.to(dtype) @ a.to(dtype) for a, b in self._pairs()])[self.order]

    def _columns(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return N's part for the weight [R, I], and that for the bias [R]."""
        n = self.adamss_newB.to(dtype)
        return (n[:, :-1], n[:, -1]) if self.wide else (n, None)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return M [O, R] and N [R, I]: the update of the weight."""
        return self._rows(dtype), self._columns(dtype)[0]

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return M (N x), the bias's share in it."""
        low, constant = self._columns(self.dtype)
        h = base.down(self.dropped(x), low)
        return base.up(h if constant is None else h + constant, self._rows(self.dtype))

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W and b, each with its update."""
        rows, (low, constant) = self._rows(weight.dtype), self._columns(weight.dtype)
        if bias is not None and constant is not None:
            bias = bias + rows @ constant
        return weight + rows @ low, bias

    def rebias(self, base: Base) -> Tensor | None:
        """Return b with its update."""
        bias, constant = base.bias(), self._columns(self.dtype)[1]
        return (
            bias if bias is None or constant is None else bias + self._rows(self.dtype) @ constant
        )

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, which number the groups, and that of N."""
        found = {}
        for name, slot in super().keys(base).items():
            of, _, group = name.rpartition("_")
            found[f"{of}.{group}"] = slot
        return found | {"adamss_newB": ("adamss_newB", tuple(self.adamss_newB.shape))}


def _subspaces(weight: Tensor, config: AdamssConfig) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return N [R, I], the rows of each group, and what its A_k starts at [R_k, R].

    Of a weight without memory, groups of one size.
    """
    outputs, r = len(weight), min(config.r, *weight.shape)
    count = min(config.num_subspaces, outputs)
    if weight.is_meta:
        rows = list(torch.tensor_split(torch.arange(outputs, device="meta"), count))
        ranks = [min(config.subspace_rank, len(group), r) for group in rows]
        return weight[:r], rows, [weight.new_empty(rank, r) for rank in ranks]
    devices = [] if weight.device.type == "cpu" else [weight.device]
    with torch.random.fork_rng(devices, device_type=weight.device.type):
        torch.manual_seed(config.random_seed)
        left, _, right = torch.svd_lowrank(weight, q=r, niter=2)
    labels = grouped(left.cpu(), count).to(weight.device)
    rows = [group for k in range(count) if len(group := (labels == k).nonzero()[:, 0])]
    starts = []
    for group in rows:
        _, values, directions = torch.linalg.svd(left[group], full_matrices=False)
        rank = min(config.subspace_rank, len(values))
        if config.use_dynamic_rank:
            shares = values.square() > config.svd_threshold * values[0].square()
            rank = max(1, min(rank, int(shares.sum())))
        starts.append(directions[:rank])
    return right.T.contiguous(), rows, starts


METHOD = Method(AdamssConfig, Adamss)
