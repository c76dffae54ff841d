"""4-bit codes: to the bit what bitsandbytes makes of the same weights, and back again."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from inlay.core.errors import UserError
from inlay.kernels import codec

bnb = pytest.importorskip("bitsandbytes.functional")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


def weights(count: int):
    """Yield (weight, kind, block): sizes odd and even, from one value to several blocks."""
    generator = torch.Generator().manual_seed(0)
    cases = itertools.cycle(itertools.product(codec.TABLES, DTYPES, (32, 64, 64, 64, 256, 4096)))
    for number, (kind, dtype, block) in zip(range(count), cases, strict=False):
        rows, columns = torch.randint(1, 60, (2,), generator=generator).tolist()
        scale = 10 ** torch.randn(1, generator=generator).item()
        weight = torch.randn(rows, columns, generator=generator) * scale
        weight[weight < 0] *= 0 if number % 50 == 0 else 1
        yield (weight * (number % 70 > 0)).to(dtype), kind, block


def test_the_tables_are_those_of_bitsandbytes():
    for kind in codec.TABLES:
        assert torch.equal(codec.table(kind), bnb.get_4bit_type(kind, device="cpu"))
    assert torch.equal(codec.dynamic_map(CPU), bnb.create_dynamic_map())


def test_codes_absmax_and_nested_state_of_a_thousand_weights_are_those_of_bitsandbytes():
    for weight, kind, block in weights(1000):
        codes, state = bnb.quantize_4bit(
            weight, blocksize=block, quant_type=kind, compress_statistics=True
        )
        packed = codec.quantize(weight, kind, block)
        assert torch.equal(packed.codes, codes.view(-1))
        assert torch.equal(packed.absmax, state.absmax)
        assert torch.equal(packed.nested, state.state2.absmax)
        assert packed.offset == float(state.offset)
        single = codec.quantize(weight, kind, block, double=False)
        wanted = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind)[1].absmax
        assert torch.equal(single.absmax, wanted)
        if weight.numel() % 2 == 0:  # of odd sizes bitsandbytes compiles a function each
            # in one row: of rows that the block does not divide it mistakes the absmax
            state.shape = torch.Size([1, weight.numel()])
            numbers = bnb.dequantize_4bit(codes, state).view(weight.shape)
            assert torch.equal(codec.dequantize(packed, dtype=weight.dtype), numbers)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 64), (65, 33)])
def test_plain_torch_and_what_is_fast_give_the_same_numbers(shape, dtype, double, monkeypatch):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for kind in codec.TABLES:
        packed = codec.quantize(weight, kind, double=double)
        fast = codec.dequantize(packed, dtype=dtype)
        values = codec.table(kind)[torch.stack((packed.codes >> 4, packed.codes & 15), -1).int()]
        absmax = codec.scales(packed).repeat_interleave(64)[: weight.numel()]
        meant = (values.view(-1)[: weight.numel()] * absmax).to(dtype).view(shape)
        monkeypatch.setattr(codec, "FAST", {})
        assert torch.equal(codec.dequantize(packed, dtype=dtype), meant)
        monkeypatch.undo()
        assert torch.equal(fast, meant)


def test_a_weight_of_many_pieces_is_that_of_one(monkeypatch):
    weight = torch.randn(70, 130, generator=torch.Generator().manual_seed(2))
    whole = codec.quantize(weight)
    numbers = codec.dequantize(whole)
    monkeypatch.setattr(codec, "PIECE", 256)
    monkeypatch.setattr(codec, "FAST", {})
    pieces = codec.quantize(weight)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.absmax, whole.absmax)
    assert torch.equal(codec.dequantize(whole), numbers)


def test_numbers_are_written_where_they_are_wanted():
    weight = torch.randn(6, 64)
    packed = codec.quantize(weight)
    out = torch.empty(6, 64, dtype=torch.bfloat16)
    assert codec.dequantize(packed, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, codec.dequantize(packed, dtype=torch.bfloat16))
    assert packed.nbytes == 6 * 32 + 6 + 4


def test_the_error_of_a_value_is_at_most_what_is_said():
    weight = torch.rand(64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    error = (codec.dequantize(codec.quantize(weight, double=False)) - weight).abs()
    assert (error.view(-1, 64).amax(1) / weight.view(-1, 64).abs().amax(1)).max() <= 0.152


def test_what_cannot_be_quantized_is_refused_by_its_name():
    one = torch.ones(2, 64)
    for weight, given, text in (
        (one, {"kind": "nf5"}, r"'nf5' is not one of nf4, fp4, int8. Did you mean"),
        (torch.ones(3), {"kind": "int8"}, r"takes matrices, not a weight of \[3\]"),
        (one / 0, {"kind": "int8"}, r"NaN or infinite"),
        (one, {"block": 48}, r"32, 64, .* values, not 48"),
        (one.double(), {}, r"a weight of torch.float64 is not quantized"),
        (one.to(torch.uint8), {}, r"a weight of torch.uint8"),
        (one / 0, {}, r"NaN or infinite"),
        (one * math.nan, {}, r"NaN or infinite"),
    ):
        with pytest.raises(UserError, match=text):
            codec.quantize(weight, **given)


@pytest.mark.parametrize("kind", [*codec.TABLES])
def test_the_code_is_that_of_the_nearest_value_also_at_the_middles(kind):
    rising = codec.table(kind).sort().values
    middles = (rising[:-1] + rising[1:]) / 2
    near = [
        middles,
        middles.nextafter(-rising.new_ones(15)),
        middles.nextafter(rising.new_ones(15)),
    ]
    values = torch.cat([*near, rising, torch.linspace(-1, 1, 100_001)])
    found = codec.table(kind)[codec._nearest(values, kind).int()]
    assert torch.equal(found, rising[torch.bucketize(values, middles)])
    # no two middles share a cell
    assert len(codec._cell(middles).unique()) == 15


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_a_row_over_its_largest_magnitude_times_127(dtype, monkeypatch):
    weight = torch.randn(9, 33, generator=torch.Generator().manual_seed(4)).to(dtype)
    weight[2], weight[3] = 0, 1e-38
    packed = codec.quantize(weight, "int8")
    absmax = weight.float().abs().amax(1, keepdim=True)
    meant = (weight.float() * (127 / absmax.clamp(min=1e-36))).round().double()
    assert torch.equal(packed.codes.view(torch.int8).view(9, 33).double(), meant)
    for numbers in (torch.float32, torch.bfloat16, torch.float64):
        found = codec.dequantize(packed, dtype=numbers)
        assert torch.equal(found, (meant.float() * (absmax / 127)).to(numbers))
        monkeypatch.setattr(codec, "PIECE", 40)
        assert torch.equal(codec.dequantize(packed, dtype=numbers), found)
        assert torch.equal(codec.quantize(weight, "int8").codes, packed.codes)
        monkeypatch.undo()
