"""A factor for each column, and its gradients, are plain torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inlay.kernels import columns


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (2, 5, 70), (700, 200)])
def test_both_passes(
    shape: tuple[int, ...], dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(columns, "_functions", lambda: None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad, factors = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1]).to(wide)
    x, grad = x.to(dtype).requires_grad_(), grad.to(dtype)
    factors.requires_grad_()
    out = columns.times_columns(x, factors)
    out.backward(grad)
    exact = [t.detach().double() for t in (x, factors, grad)]
    near: Any = (
        {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    )
    if dtype == torch.bfloat16 and not compiled:
        near["atol"] = 0.5  # torch rounds each product before it adds them up
    wanted = (exact[0] * exact[1], exact[2] * exact[1], (exact[2] * exact[0]).flatten(0, -2).sum(0))
    for made, meant in zip((out, x.grad, factors.grad), wanted, strict=True):
        assert made is not None
        torch.testing.assert_close(made.double(), meant, **near)
    assert out.dtype == x.dtype
