"""A linear in 4-bit codes: what it computes, keeps, converts to, saves, and is when merged."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.bases import view
from inlay.bases.nf4 import Nf4, PackedLinear
from inlay.bases.plain import Linear
from inlay.core.beside import Copy
from inlay.kernels import codec
from inlay.kernels.scratch import SCRATCH
from inlay.methods.lora import LoraConfig


def made(o: int = 6, i: int = 64, *, bias: bool = True, dtype=torch.float32, **given):
    torch.manual_seed(0)
    linear = nn.Linear(i, o, bias).to(dtype).requires_grad_(False)
    return PackedLinear.of(linear, **given), linear


@pytest.mark.parametrize("kind", codec.KINDS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_with_the_dequantized_weight(kind, double, dtype):
    packed, linear = made(dtype=dtype, kind=kind, double=double)
    meant = codec.dequantize(codec.quantize(linear.weight, kind, double=double), dtype=dtype)
    assert torch.equal(view(packed).weight(), meant)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    out = packed(x)
    torch.testing.assert_close(out, F.linear(x, meant, linear.bias))
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad)[0], grad @ meant)


def test_a_bias_that_trains_gets_its_gradient():
    packed, linear = made()
    bias = packed.bias.requires_grad_()
    for x in (torch.randn(5, 64), torch.randn(64)):
        meant = F.linear(x, view(packed).weight(), bias).square().sum()
        found = packed(x).square().sum()
        torch.testing.assert_close(*(torch.autograd.grad(loss, bias)[0] for loss in (found, meant)))
    assert packed.bias is linear.bias


def test_what_it_returns_may_be_written_into():
    packed, linear = made()
    meant = F.linear(torch.ones(2, 3, 64), view(packed).weight(), linear.bias)
    x = torch.ones(2, 3, 64, requires_grad=True)
    # as llama 4 does with the scores of its router
    torch.testing.assert_close(packed(x).mul_(2), meant * 2)


def test_neither_the_input_nor_a_weight_is_kept_for_the_backward_pass():
    packed, _ = made(64, 64)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(torch.randn(7, 64, requires_grad=True)).sum().backward()
    assert kept == []


def test_the_buffer_is_reused_grown_and_not_shared_by_threads():
    small, large = made(4, 64)[0], made(16, 64)[0]
    SCRATCH.buffers.clear()
    x = torch.randn(2, 64)
    alone = small(x), large(x)
    buffer = SCRATCH.buffers[torch.float32]
    assert buffer.numel() == 16 * 64
    assert torch.equal(small(x), alone[0])
    assert SCRATCH.buffers[torch.float32] is buffer
    others = []
    thread = threading.Thread(target=lambda: others.append(SCRATCH.take(torch.float32, 8)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != buffer.data_ptr()


def test_what_ran_in_inference_mode_first_trains_afterwards():
    SCRATCH.buffers.clear()
    packed, _ = made()
    with torch.inference_mode():
        expected = packed(torch.ones(1, 64))
    x = torch.ones(1, 64, requires_grad=True)
    out = packed(x)
    out.sum().backward()
    assert torch.equal(out, expected)
    assert x.grad is not None


def test_autocast_computes_in_its_own_dtype():
    packed, _ = made()
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed(x)
        meant = F.linear(x, view(packed).weight(), packed.bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, meant)
    out.sum().backward()
    assert x.grad.dtype == torch.float32


def test_an_input_of_another_dtype_comes_back_in_it():
    packed, _ = made(dtype=torch.bfloat16)
    x = torch.randn(3, 64)
    out = packed(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, packed(x.bfloat16()).float())


def test_the_magnitudes_are_never_cast_with_the_model():
    packed, _ = made(double=False)
    before = packed.absmax.clone()
    for cast in (packed.bfloat16, packed.half, packed.double, packed.float):
        cast()
        assert torch.equal(packed.absmax, before)
    assert view(packed.bfloat16()).dtype == torch.bfloat16
    assert view(packed).adapter_dtype == torch.float32
    assert packed.to("meta").absmax.is_meta
    assert view(packed).device.type == "meta"


def test_nothing_packed_is_a_parameter():
    packed, _ = made()
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    assert packed.numel == 6 * 64


@pytest.mark.parametrize("double", [False, True])
def test_a_state_dict_brings_it_back_and_is_what_bitsandbytes_writes(double):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, linear = made(dtype=torch.bfloat16, double=double)
    state = packed.state_dict()
    codes, theirs = functional.quantize_4bit(
        linear.weight, quant_type="nf4", compress_statistics=double
    )
    wanted = {f"weight.{key}": value for key, value in theirs.as_dict(packed=True).items()}
    assert set(state) == {"weight", "bias", *wanted}
    assert torch.equal(state["weight"], codes)
    for key, value in wanted.items():
        if "quant_state" in key:
            unpack = functional.unpack_tensor_to_dict
            assert unpack(state[key]) == unpack(value)
        else:
            assert torch.equal(state[key], value), key
    other = PackedLinear(64, 6, double=not double, dtype=torch.bfloat16)
    other.load_state_dict(state)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert torch.equal(other(x), packed(x))


def test_an_int8_layer_has_the_keys_of_bitsandbytes_and_comes_back():
    packed, _ = made(dtype=torch.bfloat16, kind="int8")
    state = packed.state_dict()
    assert set(state) == {"weight", "bias", "SCB", "weight_format"}
    assert (state["weight"].dtype, state["weight"].shape) == (torch.int8, (6, 64))
    other = PackedLinear(64, 6, kind="int8", dtype=torch.bfloat16)
    other.load_state_dict(state)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert torch.equal(other(x), packed(x))
    for broken in (
        state | {"SCB": state["SCB"][:2]},
        state | {"weight_format": torch.tensor(1, dtype=torch.uint8)},
        state | {"weight": state["weight"].view(torch.uint8)},
    ):
        with pytest.raises(RuntimeError, match="no packed weight of this layer"):
            PackedLinear(64, 6, kind="int8").load_state_dict(broken)


def test_a_state_of_another_layer_or_none_is_refused():
    packed, _ = made()
    state = packed.state_dict()
    with pytest.raises(RuntimeError, match="no packed weight of this layer"):
        PackedLinear(64, 6).load_state_dict(made(4, 96)[0].state_dict() | {"bias": state["bias"]})
    key = next(k for k in state if "quant_state" in k)
    for broken in (
        {k: v for k, v in state.items() if k != key},
        state | {key: torch.tensor([91, 93], dtype=torch.uint8)},
        state | {key: torch.tensor([200], dtype=torch.uint8)},
        state | {"weight.absmax": state["weight.absmax"][:2]},
        state | {"weight.nested_absmax": state["weight.nested_absmax"].repeat(2)},
    ):
        with pytest.raises(RuntimeError, match="no packed weight of this layer"):
            PackedLinear(64, 6).load_state_dict(broken)
    with pytest.raises(RuntimeError, match="weight"):
        PackedLinear(64, 6).load_state_dict({"bias": state["bias"]})


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one = made(64, 64, dtype=dtype)[0]
        self.two = made(8, 64, dtype=dtype, bias=False)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def adapted(dtype: torch.dtype = torch.float32, **given):
    settings = {"target_modules": ["one", "two"], "r": 2, "init_lora_weights": False} | given
    return inlay.get_peft_model(Two(dtype), LoraConfig(**settings))


def test_a_merge_puts_plain_layers_there_and_an_unmerge_the_codes():
    model, x = adapted(torch.bfloat16), torch.randn(3, 64).bfloat16()
    codes = model.base_model.model.one.weight.clone()
    ran = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), ran, rtol=0.05, atol=0.05)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.one.weight, codes)
    assert torch.equal(model(x), ran)
    host = model.roster.hosts["one"]
    exact = host.base.weight().float() + host.adapters["default"].delta(torch.float32)
    merged = model.merge_and_unload()
    assert type(merged.one) is type(merged.two) is nn.Linear
    assert torch.equal(merged.one.weight, exact.bfloat16())


def test_a_packed_weight_counts_as_its_values_once():
    model = adapted()
    base = 64 * 64 + 64 + 8 * 64
    expected = (2 * (64 + 64) + 2 * (64 + 8), base + 2 * (64 + 64) + 2 * (64 + 8))
    assert model.get_nb_trainable_parameters() == expected
    model.merge_adapter()
    assert model.get_nb_trainable_parameters() == expected


def test_unloading_leaves_the_codes():
    model = adapted()
    plain = model.unload()
    assert type(plain.one) is PackedLinear
    assert plain.one.dense is None


def test_a_copy_to_train_is_in_plain_numbers():
    packed, _ = made(dtype=torch.bfloat16)
    base = view(packed)
    assert (type(base), base.unpacked) == (Nf4, Linear)
    trained = Copy(LoraConfig(), base)
    assert type(trained.module) is nn.Linear
    assert trained.module.weight.dtype == torch.float32
    x = torch.randn(2, 64).bfloat16()
    torch.testing.assert_close(trained(base, x), packed(x), rtol=0.02, atol=0.02)


def test_copies_are_apart_and_recomputing_gives_the_same_gradients():
    model, x = adapted(), torch.randn(3, 64)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    model(x).sum().backward()
    checkpoint(other, x, use_reentrant=False).sum().backward()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    found = [(a.grad, b.grad) for a, b in pairs if a.requires_grad]
    assert len(found) == 4
    assert all(torch.equal(a, b) for a, b in found)
