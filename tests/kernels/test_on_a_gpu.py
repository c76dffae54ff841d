"""What a GPU computes by our kernels beside the CPU: `pytest -m gpu`, where there is one."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import inlay
from inlay.kernels import codec, elementwise, gpu, linear_cross_entropy
from inlay.kernels.codec import Packed

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def there(packed: Packed) -> Packed:
    """Return the weight on the GPU."""
    nested = None if packed.nested is None else packed.nested.to(DEVICE)
    codes, absmax = packed.codes.to(DEVICE), packed.absmax.to(DEVICE)
    return dataclasses.replace(packed, codes=codes, absmax=absmax, nested=nested)


@pytest.mark.parametrize("dtype", list(gpu.LEAST))
@pytest.mark.parametrize("module", [gpu, elementwise, linear_cross_entropy])
def test_the_first_try_of_tritons_kernels_comes_out_right(module, dtype):
    pytest.importorskip("triton")
    where = torch.empty(0, device=DEVICE).device
    if torch.cuda.get_device_capability(where) < gpu.LEAST[dtype]:
        pytest.skip("an older card")
    module.triton_for.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.triton_for(where, dtype) is not None


@pytest.mark.parametrize("dtype", [*gpu.LEAST, torch.float64])
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("kind", codec.KINDS)
def test_numbers_are_those_of_the_cpu_to_the_bit(kind, block, dtype):
    for shape in ((1, 1), (37, 129), (300, 1024)):
        for double in (False, True):
            packed = codec.quantize(torch.randn(shape), kind, block, double)
            found = codec.dequantize(there(packed), dtype=dtype)
            assert torch.equal(found.cpu(), codec.dequantize(packed, dtype=dtype))


@pytest.mark.parametrize("kind", codec.KINDS)
@pytest.mark.parametrize("length", [4, 40])
def test_a_base_is_packed_there_and_an_adapter_over_it_learns_what_it_does_here(kind, length):
    losses, norms = [], []
    for device in ("cpu", DEVICE):
        base, _ = inlay.load_base(quantize=kind, dtype="float32", device=device)
        settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
        torch.manual_seed(0)
        model = inlay.get_peft_model(base, inlay.LoraConfig(**settings)).train()
        torch.manual_seed(0)  # what is drawn on a GPU is not what is drawn here
        for p in model.parameters():
            if p.requires_grad:
                p.data = torch.randn(p.shape).mul_(0.02).to(p.device)
        ids = torch.arange(length).add(50).view(1, -1).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        norms.append([p.grad.norm().item() for p in model.parameters() if p.grad is not None])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(norms[0]) > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("dtype", list(gpu.LEAST))
def test_norms_gates_and_losses_of_real_sizes_are_the_cpus(dtype):
    torch.manual_seed(0)
    x, y, weight = (torch.randn(s).to(dtype) for s in ((300, 2048), (300, 2048), (2048,)))
    head, targets = (0.02 * torch.randn(50_001, 2048)).to(dtype), torch.randint(0, 50_001, (300,))

    def compute(x, y, weight, head, targets):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        hidden = elementwise.rms_norm(elementwise.gated(x, y, "silu"), weight, 1e-6)
        loss = linear_cross_entropy.linear_cross_entropy(hidden, head, targets, cap=30.0) / 300
        return loss, *torch.autograd.grad(loss, (x, y))

    given = x, y, weight, head, targets
    wanted = compute(*(t.float() if t.is_floating_point() else t for t in given))
    found = compute(*(t.to(DEVICE) for t in given))
    for one, other in zip(found, wanted, strict=True):
        apart = (one.cpu().float() - other).norm() / other.norm()
        assert apart < (1e-3 if dtype == torch.float32 else 0.03)
