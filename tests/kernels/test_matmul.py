"""Products with frozen matrices are torch's, up to the order of their sums."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels import matmul


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("by_onednn", [False, True])
def test_both_products(
    rows: int, dtype: torch.dtype, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: by_onednn)
    shapes = (rows, 70), (rows, 33), (33, 70), (33,)
    x, grad, weight, bias = (torch.randn(shape).to(dtype) for shape in shapes)
    wide = [t.double() for t in (x, grad, weight, bias)]
    near = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for made, wanted in (
        (matmul.linear(x, weight, bias), wide[0] @ wide[2].T + wide[3]),
        (matmul.linear(x, weight), wide[0] @ wide[2].T),
        (matmul.linear(x, weight.T.contiguous().T), wide[0] @ wide[2].T),
        (matmul.product(grad, weight), wide[1] @ wide[2]),
    ):
        assert made.dtype == dtype
        torch.testing.assert_close(made.double(), wanted, **near)
