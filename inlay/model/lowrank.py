"""The nearest matrix of low rank (Eckart and Young, 1936), and a LoRA made of given factors.

O output features, I input features, R rank. An update is B A with B [O, R], A [R, I], at scale 1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inlay.core import patterns
from inlay.core.beside import Copy
from inlay.methods.lora import Lora, LoraConfig
from inlay.model.places import spelled_out
from inlay.model.roster import Roster


class Spectrum(NamedTuple):
    """A matrix [O, I] as U diag(s) V: u [O, K], s [K] from the largest down, v [K, I]."""

    u: Tensor
    s: Tensor
    v: Tensor

    def rank(self, wanted: int | float) -> int:
        """Return how many of the values to keep: the count, or for a float the share of squares.

        A count is cut to K, beyond which there is nothing to hold.
        """
        if not isinstance(wanted, float):
            return min(int(wanted), len(self.s))
        kept = self.s.double().square().cumsum(0)
        return min(int((kept < wanted * kept[-1]).sum()) + 1, len(self.s))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return B [O, rank], which holds the values, and A [rank, I]."""
        return self.u[:, :rank] * self.s[:rank], self.v[:rank]

    def squares(self, rank: int = 0) -> float:
        """Return the sum of squares of what is left when `rank` values are kept."""
        return float(self.s[rank:].double().square().sum())


def of_matrix(matrix: Tensor, driver: str | None = None) -> Spectrum:
    """Return the singular values and vectors of `matrix` [O, I]; driver: cuSOLVER's, on a GPU."""
    return Spectrum(*torch.linalg.svd(matrix, full_matrices=False, driver=driver))


def of_product(b: Tensor, a: Tensor, driver: str | None = None) -> Spectrum:
    """Return those of the product B A without making it: QR of both factors, SVD of the cores."""
    left, b_core = torch.linalg.qr(b)
    right, a_core = torch.linalg.qr(a.T)
    core = of_matrix(b_core @ a_core.T, driver)
    return Spectrum(left @ core.u, core.s, core.v @ right.T)


def set_lora(
    roster: Roster,
    name: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    copies: Mapping[str, Copy] | None = None,
    trainable: bool = True,
    **settings: Any,
) -> None:
    """Set a LoRA called `name` into the model whose update at each path is B A, as given.

    copies: path -> the copy of a whole module that goes with it. settings: more of LoraConfig's
    fields; those that say where and of which rank follow from the factors.
    """
    ranks = {path: len(a) for path, (_, a) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    of_site = {key_of(path, ranks): rank for path, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=of_site,
        alpha_pattern=dict(of_site),
        target_modules=spelled_out(tuple(factors), roster.model),
        **settings,
    )
    first = not roster.names
    meta = torch.device("meta")  # no start of its own, and no random numbers drawn for one
    roster.add(name, config, strict=False, device=meta, trainable=trainable)
    try:
        for path, host, adapter in roster.adapters(name):
            if isinstance(adapter, Copy):
                adapter.module.load_state_dict((copies or {})[path].module.state_dict())
                continue
            assert isinstance(adapter, Lora), path
            for part, value in zip(("lora_B", "lora_A"), factors[path], strict=True):
                old = adapter.get_parameter(part)
                assert old.shape == value.shape, path
                value = value.detach().to(host.base.device, old.dtype, copy=True).contiguous()
                adapter.register_parameter(part, nn.Parameter(value, old.requires_grad))
    except BaseException:
        if first:
            roster.take_out(merged=False)
        else:
            roster.remove(name)
        raise


def key_of(path: str, paths: Mapping[str, int]) -> str:
    """Return the pattern that means this path: the path, held at its start where others end so."""
    longer = any(path in list(patterns.ends(other))[1:] for other in paths)
    return f"^{re.escape(path)}" if longer else path


def relative(part: float, whole: float) -> float:
    """Return the ratio of two norms given by their squares; 0 where there is nothing."""
    return math.sqrt(part / whole) if whole > 0 else 0.0
