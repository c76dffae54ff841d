"""The compiled passes compute what their eager twins do, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inlay.kernels import elementwise
from inlay.kernels.elementwise import gated, rms_norm

pytestmark = pytest.mark.skipif(not elementwise.available(), reason="no compiler here")
DTYPES = [torch.float32, torch.bfloat16]


def both(run: Callable[..., Tensor], twin: Callable[..., Tensor], *inputs: Tensor) -> Any:
    """Return output and gradients of the compiled pass, and of the twin in float64."""
    found, dtype = [], inputs[0].dtype
    for compute, wide in ((run, False), (twin, True)):
        given = [t.detach().double() if wide else t.detach().clone() for t in inputs]
        for tensor in given:
            tensor.requires_grad_()
        out = compute(*given)
        (out * torch.arange(out.numel()).sin().view(out.shape).to(dtype).to(out)).sum().backward()
        found.append([out, *(t.grad for t in given)])
    return zip(*found, strict=True)


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 7), (3, 64), (300, 577)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], plus_one: bool) -> None:
    weight = torch.randn(shape[-1]).to(dtype)

    def run(x: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-6, plus_one=plus_one)

    def twin(x: Tensor) -> Tensor:
        return elementwise._plain_norm(x, weight.to(x.dtype), 1e-6, plus_one)

    for made, wanted in both(run, twin, torch.randn(shape).to(dtype)):
        assert made.dtype == dtype
        torch.testing.assert_close(made.double(), wanted, **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 7), (300, 577)])
@pytest.mark.parametrize("function", ["silu", "gelu"])
def test_a_gate(dtype: torch.dtype, shape: tuple[int, ...], function: Any) -> None:
    gate, up = (4 * torch.randn(2, *shape)).to(dtype).unbind()
    results = both(
        lambda a, b: gated(a, b, function),
        lambda a, b: elementwise._plain_gate(a, b, function),
        gate,
        up,
    )
    for made, wanted in results:
        assert made.dtype == dtype
        torch.testing.assert_close(made.double(), wanted, **close(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (300, 1154)])
@pytest.mark.parametrize("function", ["silu", "gelu"])
def test_halves_of_one_tensor_are_not_copied(
    dtype: torch.dtype, shape: tuple[int, ...], function: Any
) -> None:
    def run(x: Tensor) -> Tensor:
        out = gated(*x.chunk(2, -1), function)
        kept = out.grad_fn.saved_tensors  # type: ignore[union-attr]
        assert {t.untyped_storage().data_ptr() for t in kept} == {x.untyped_storage().data_ptr()}
        return out

    def twin(x: Tensor) -> Tensor:
        return elementwise._plain_gate(*x.chunk(2, -1), function)

    for made, wanted in both(run, twin, (4 * torch.randn(shape)).to(dtype)):
        torch.testing.assert_close(made.double(), wanted, **close(dtype))


def test_a_gate_of_extreme_values() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 1e30])
    for function in ("silu", "gelu"):
        made = gated(gate, torch.ones_like(gate), function)
        wanted = elementwise._plain_gate(gate.double(), torch.ones(9).double(), function)
        torch.testing.assert_close(made.double(), wanted, rtol=1e-5, atol=1e-7)


def test_what_is_not_a_number_stays_none() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]])
    for dtype in DTYPES:
        found = rms_norm(x.to(dtype), torch.ones(3, dtype=dtype), 1e-6)
        assert found.isnan().all(1).tolist() == [True, False]
        assert gated(x.to(dtype), x.to(dtype), "silu").isnan().sum() == 1


def test_inputs_of_any_strides() -> None:
    x = torch.randn(6, 4, 10).transpose(0, 1)
    torch.testing.assert_close(
        rms_norm(x, torch.ones(10), 1e-6), elementwise._plain_norm(x, torch.ones(10), 1e-6, False)
    )
    torch.testing.assert_close(gated(x, x.clone(), "silu"), elementwise._plain_gate(x, x, "silu"))
