"""Triton's norms, gates and losses in its interpreter, beside their eager twins.

`TRITON_INTERPRET=1 pytest tests/kernels/interpreted_passes.py`, which test_triton.py does.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from inlay.kernels import cross_entropy_triton, elementwise, elementwise_triton, gpu
from inlay.kernels import linear_cross_entropy as losses
from tests.kernels.interpreted_triton import bfloat16_as_on_a_gpu  # noqa: F401

# numpy, which the interpreter computes with, warns of e^x = inf, of which 1 / (1 + e^x) = 0 is made
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
DTYPES = list(gpu.LEAST)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    """Let the CPU's tensors go to the kernels, in every dtype that these know."""
    monkeypatch.setattr(elementwise, "_call_for", lambda *tensors: elementwise_triton.call)


def forms(shape, dtype):
    """Return name -> the pass, its twin, how many inputs it takes and what stays as it is."""
    weight = torch.randn(shape[-1]).to(dtype)
    found = {
        f"norm {plus_one}": (
            lambda x, w, one=plus_one: elementwise.rms_norm(x, w, 1e-6, plus_one=one),
            lambda x, w, one=plus_one: elementwise._plain_norm(x, w, 1e-6, one),
            1,
            (weight,),
        )
        for plus_one in (False, True)
    }
    for function in ("silu", "gelu"):
        found[function] = (
            lambda x, y, f=function: elementwise.gated(x, y, f),
            lambda x, y, f=function: elementwise._plain_gate(x, y, f),
            2,
            (),
        )
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 10), (9, 7, 64), (2, 1, 2050)])
def test_passes_are_their_twins_forward_and_backward(shape, dtype):
    for name, (run, twin, count, rest) in forms(shape, dtype).items():
        inputs = [(3 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(count)]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        grad = torch.randn(shape).to(dtype)
        made, wanted = run(*inputs, *rest), twin(*wide, *(t.double() for t in rest))
        backward = torch.autograd.grad(made, inputs, grad)
        meant = torch.autograd.grad(wanted, wide, grad.double())
        far = (
            {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
        )
        for one, other in zip((made, *backward), (wanted, *meant), strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(
                one.double(), other, **far, msg=lambda told, name=name: f"{name}: {told}"
            )


def test_extreme_and_missing_numbers_go_as_in_plain_torch():
    gate = torch.tensor([-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 1e30, torch.nan])
    for function in ("silu", "gelu"):
        x = gate.clone().requires_grad_()
        wide = gate.double().requires_grad_()
        made = elementwise.gated(x, torch.ones(10), function)
        wanted = elementwise._plain_gate(wide, torch.ones(10).double(), function)
        grads = [torch.autograd.grad(out.sum(), t)[0] for out, t in ((made, x), (wanted, wide))]
        near = {"rtol": 1e-5, "atol": 1e-7, "equal_nan": True}
        torch.testing.assert_close(made.double(), wanted, **near)
        torch.testing.assert_close(grads[0].double(), grads[1], **near)
    x = torch.tensor([[1.0, torch.nan, 2.0], [1.0, 2.0, 3.0]])
    found = elementwise.rms_norm(x, torch.ones(3), 1e-6)
    assert found.isnan().all(1).tolist() == [True, False]


def test_inputs_of_any_strides():
    x = torch.randn(6, 4, 10).transpose(0, 1)
    halves = torch.randn(5, 3, 4200).chunk(2, -1)  # of rows that two programs share
    for gate, up in ((x, x.clone()), halves):
        given = [t.detach().requires_grad_() for t in (gate, up)]
        found, wanted = (f(*given, "silu") for f in (elementwise.gated, elementwise._plain_gate))
        made, meant = (torch.autograd.grad(out.sum(), given) for out in (found, wanted))
        torch.testing.assert_close((found, *made), (wanted, *meant), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 6.0])
@pytest.mark.parametrize("n", [1, 301, 10_001])
def test_the_softmax_is_its_twin_in_place(n, cap, dtype):
    logits = (3 * torch.randn(3, n)).to(dtype)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    targets, factors = torch.tensor([0, n // 2, n - 1]), torch.linspace(-1, 2, 3)
    for given in (None, factors):
        z, wide = logits.clone(), logits.double()
        found = cross_entropy_triton.log_softmax(z, targets, given, cap)
        wanted = losses._plain_log_softmax(wide, targets, given, cap)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        far = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(z.double(), wide, rtol=far, atol=far if n > 1 else 1e-5)


def test_logits_of_no_hope_and_targets_that_are_not_there():
    z = torch.randn(3, 5000)
    z[:, :4200] = -torch.inf  # all that a program reads first
    targets = torch.tensor([4500, 5000, -1])
    wide = z[:1].double()
    found = cross_entropy_triton.log_softmax(z, targets, torch.ones(3), None)
    wanted = losses._plain_log_softmax(wide, targets[:1], torch.ones(1), None)
    assert found.isnan().tolist() == [False, True, True]
    torch.testing.assert_close(found[:1].double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z[:1].double(), wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [{}, {"scale": 0.25}, {"scale": 2.0, "cap": 5.0}])
def test_a_head_and_its_softmax_by_them_are_what_plain_torch_makes(form, monkeypatch):
    hidden, weight = (torch.randn(s, requires_grad=True) for s in ((5, 8), (300, 8)))
    targets, up = torch.randint(0, 300, (5,)), torch.linspace(-1, 2, 5)
    outcomes = []
    for compute in (cross_entropy_triton.log_softmax, losses._plain_log_softmax):
        monkeypatch.setattr(losses, "_log_softmax", compute)
        for trained in ((hidden,), (hidden, weight)):
            given = [
                t if any(t is one for one in trained) else t.detach() for t in (hidden, weight)
            ]
            found = losses.linear_log_probs(*given, targets, **form)
            outcomes.append((found, *torch.autograd.grad(found, trained, up)))
    half = len(outcomes) // 2
    for found, wanted in zip(outcomes[:half], outcomes[half:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_try_tells_what_is_wrong(dtype):
    assert elementwise.wrong(elementwise_triton, CPU, dtype) is None
    assert losses.wrong(cross_entropy_triton, CPU, dtype) is None

    def off(name):
        def call(asked, tensors, *rest):
            elementwise_triton.call(asked, tensors, *rest)
            if asked == name:
                tensors[3 if name == "gate_back" else -2 if "norm" in name else -1].mul_(1.05)

        return SimpleNamespace(call=call)

    for name in ("norm", "norm_back", "gate", "gate_back"):
        told = f"another {name.partition('_')[0]}"
        assert elementwise.wrong(off(name), CPU, dtype) == told

    def log_softmax(z, *rest):
        found = cross_entropy_triton.log_softmax(z, *rest)
        z.mul_(1.05)
        return found

    spoiled = SimpleNamespace(PIECE=cross_entropy_triton.PIECE, log_softmax=log_softmax)
    assert losses.wrong(spoiled, CPU, dtype) == "another gradient of the logits"
    spoiled.log_softmax = lambda *given: 1.05 * cross_entropy_triton.log_softmax(*given)
    assert losses.wrong(spoiled, CPU, dtype) == "another log-probability"


def test_a_first_try_is_out_of_reach_of_what_the_caller_is_in(monkeypatch):
    def refuse(t):
        raise RuntimeError("a checkpoint saw a tensor of the first try")

    wrong = elementwise.wrong
    monkeypatch.setattr(elementwise, "wrong", lambda kernels, _, dtype: wrong(kernels, CPU, dtype))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    elementwise.triton_for.cache_clear()
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), torch.inference_mode():
        found = elementwise.triton_for(torch.device("cuda", 0), torch.float32)
    elementwise.triton_for.cache_clear()
    assert found is elementwise_triton


def test_where_the_kernels_compute(monkeypatch):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for module, kernels in ((elementwise, elementwise_triton), (losses, cross_entropy_triton)):
        monkeypatch.setattr(module, "wrong", lambda kernels, device, dtype: None)
        module.triton_for.cache_clear()
        assert module.triton_for(card, torch.bfloat16) is kernels
        assert module.triton_for(card, torch.float64) is None
        assert module.triton_for(CPU, torch.bfloat16) is None
        monkeypatch.setattr(module, "wrong", lambda kernels, device, dtype: "another sum")
        module.triton_for.cache_clear()
        with pytest.warns(UserWarning, match=r"are computed by plain torch on cuda:0.*another sum"):
            assert module.triton_for(card, torch.bfloat16) is None
        module.triton_for.cache_clear()
