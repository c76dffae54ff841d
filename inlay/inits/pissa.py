"""PiSSA: the R largest singular values of W = U S V start as the update, the rest stays below.

    B = U_R sqrt(S_R / s)    A = sqrt(S_R / s) V_R    (Meng et al., arXiv:2404.02948)

pissa_niter_N finds them with N rounds of subspace iteration (Halko et al., arXiv:0909.4061), which
costs a few products with W in place of its whole SVD.   O out, I in, R rank, s scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.errors import UserError
from inlay.inits._search import largest

FROM_THE_BASE = True
SPARE = 8
"""Directions tried beyond R, which make the R better."""


def start(
    weight: Tensor, rank: int, scale: float, niter: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return B [O, R] and A [R, I] of the largest singular values; niter: how to look for them."""
    if scale <= 0:
        raise UserError(f"a PiSSA start needs a scale above 0, not {scale}: raise lora_alpha")
    if niter is None:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = largest(weight, rank + SPARE, niter)
    root = (s[:rank] / scale).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
