"""Products with codes are those with the numbers that these stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from inlay.kernels import codec, native, products
from inlay.kernels.codec import Packed
from inlay.kernels.scratch import SCRATCH

needs_instructions = pytest.mark.skipif(
    not products.available(), reason="no C compiler here, or no AVX512-BF16"
)
# rounding to bfloat16, and the order of some hundred sums in float32
NEAR = {torch.bfloat16: (2**-8, 1e-3), torch.float16: (2**-10, 1e-3), torch.float32: (1e-5, 1e-4)}


def drawn(o: int, i: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Return a weight, and x, bias and a gradient to multiply it with."""
    generator = torch.Generator().manual_seed(o + i + rows)
    shapes = (o, i), (rows, i), (o,), (rows, o)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check(x: Tensor, bias: Tensor, grad: Tensor, packed: Packed) -> None:
    """Compare both products with those of the dequantized weight in float64."""
    weight = codec.dequantize(packed, dtype=x.dtype).double()
    rtol, atol = NEAR[x.dtype]
    for found, meant in (
        (products.linear(x, packed, bias), x.double() @ weight.T + bias.double()),
        (products.linear(x, packed), x.double() @ weight.T),
        (products.product(grad, packed), grad.double() @ weight),
    ):
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), meant, rtol=rtol, atol=atol)


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 33, 130, 513])
@pytest.mark.parametrize(("o", "i"), [(1, 64), (37, 64), (130, 576), (257, 320), (600, 128)])
def test_both_products_are_those_with_the_dequantized_weight(o: int, i: int, rows: int) -> None:
    weight, x, bias, grad = drawn(o, i, rows)
    check(x, bias, grad, codec.quantize(weight))


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("kind", codec.KINDS)
@pytest.mark.parametrize("width", [64, 70])
def test_so_they_are_of_every_kind_dtype_and_width(
    kind: str, dtype: torch.dtype, width: int
) -> None:
    weight, x, bias, grad = drawn(45, width, 19, dtype)
    packed = codec.quantize(weight, kind)
    compiled = kind != "int8" and dtype == torch.bfloat16 and width == 64
    assert products.known(x, packed) == (compiled and products.available())
    check(x, bias, grad, packed)


@needs_instructions
@pytest.mark.parametrize("kind", codec.TABLES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("block", "i"), [(32, 96), (64, 640), (256, 768), (4096, 4096)])
def test_what_is_multiplied_is_to_the_bit_what_would_be_merged(
    kind: str, double: bool, block: int, i: int
) -> None:
    packed = codec.quantize(drawn(70, i, 0)[0], kind, block, double)
    weight = codec.dequantize(packed, dtype=torch.bfloat16)
    one = torch.ones(1, dtype=torch.bfloat16)
    assert torch.equal(products.linear(one.expand(i).diag(), packed), weight.T)
    assert torch.equal(products.product(one.expand(70).diag(), packed), weight)


@needs_instructions
def test_without_the_instructions_the_products_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x, bias, grad = drawn(70, 256, 40)
    packed = codec.quantize(weight)
    fast = products.linear(x, packed, bias), products.product(grad, packed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx512bf16"))
    native.library.cache_clear()
    products._functions.cache_clear()
    try:
        assert not products.available()
        plain = products.linear(x, packed, bias), products.product(grad, packed)
        assert list(tmp_path.glob("inlay/kernels/products-*.so"))  # compiled, and unfit
    finally:
        native.library.cache_clear()
        products._functions.cache_clear()
    # each is rounded from sums that differ in their last bits
    torch.testing.assert_close(fast, plain, rtol=2**-7, atol=1e-3)


@needs_instructions
def test_any_number_of_threads_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, bias, grad = drawn(400, 704, 150)
    packed = codec.quantize(weight)
    found = []
    for threads in (1, 2, 3, 200):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append((products.linear(x, packed, bias), products.product(grad, packed)))
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


@needs_instructions
def test_the_weight_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, _, grad = drawn(2048, 2048, 20)
    packed = codec.quantize(weight)
    monkeypatch.setattr(codec, "dequantize", None)
    SCRATCH.buffers.clear()
    products.linear(x, packed)
    products.product(grad, packed)
    assert sum(buffer.nbytes for buffer in SCRATCH.buffers.values()) < weight.nbytes / 4


def test_rows_are_apart_and_may_lie_anywhere() -> None:
    weight, x, _, grad = drawn(40, 128, 35)
    packed = codec.quantize(weight)
    for of, given in ((products.linear, x), (products.product, grad)):
        whole = of(given, packed)
        spoiled = given.clone()
        spoiled[20] = torch.nan
        found = of(spoiled, packed)
        assert found[20].isnan().all()
        found[20] = whole[20]
        assert torch.equal(found, whole)
        assert torch.equal(of(given.T.contiguous().T, packed), whole)
        alike = of(given[:1].expand(35, -1), packed)
        assert torch.equal(alike, whole[:1].expand(35, -1))
        assert of(given[:0], packed).shape == (0, whole.shape[1])
