"""A head and its softmax together are what plain torch makes of all logits, forward and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import linear_cross_entropy as module
from inlay.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from inlay.kernels.scratch import SCRATCH

N, H, V = 13, 24, 301
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"cap": 3.0},
    "scaled and capped": {"scale": 2.0, "cap": 5.0},
}
near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=["compiled", "eager"], autouse=True)
def twin(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with the compiled softmax and with its eager twin."""
    if request.param == "eager":
        monkeypatch.setattr(module, "_function", lambda: None)
    elif module._function() is None:
        pytest.skip("no compiler here")


@pytest.fixture(params=[1, 4, 1000])
def rows(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let the buffer hold so many rows of float32 logits."""
    monkeypatch.setattr(module, "BUFFER", request.param * V * 4)
    return int(request.param)


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "hidden": 3 * torch.randn(N, H, generator=generator),
        "weight": torch.randn(V, H, generator=generator),
        "bias": torch.randn(V, generator=generator),
    }
    return {name: t.to(dtype).requires_grad_() for name, t in made.items()}


def targets() -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


def plain(given: dict[str, Tensor], scale: float = 1.0, cap: float | None = None) -> Tensor:
    """Return the log-probabilities from all logits, in float64."""
    wide = {name: t.double() for name, t in given.items()}
    z = scale * F.linear(wide["hidden"], wide["weight"], wide.get("bias"))
    z = z if cap is None else cap * torch.tanh(z / cap)
    return z.log_softmax(-1)[torch.arange(len(z)), targets()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight", "bias")])
def test_log_probabilities_and_gradients(rows: int, form: str, trained: tuple[str, ...]) -> None:
    given = {name: t.requires_grad_(name in trained) for name, t in inputs().items()}
    upstream = torch.linspace(-1, 2, N)
    wanted = plain(given, **FORMS[form])
    slopes = torch.autograd.grad((wanted * upstream).sum(), [given[name] for name in trained])
    found = linear_log_probs(targets=targets(), **given, **FORMS[form])
    made = torch.autograd.grad((found * upstream).sum(), [given[name] for name in trained])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, **near)
    torch.testing.assert_close(made, slopes, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_loss_is_torchs_to_a_millionth(rows: int, weighted: bool, biased: bool) -> None:
    given = inputs()
    bias = given["bias"] if biased else None
    factors = torch.linspace(0, 2, N) if weighted else None
    each = F.cross_entropy(
        F.linear(given["hidden"], given["weight"], bias), targets(), reduction="none"
    )
    wanted = (each if factors is None else each * factors).sum()
    found = linear_cross_entropy(
        given["hidden"], given["weight"], targets(), bias=bias, factors=factors
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_bfloat16_is_as_near_as_its_logits() -> None:
    given = {name: t.requires_grad_(name == "hidden") for name, t in inputs(torch.bfloat16).items()}
    wanted = plain(given)
    found = linear_log_probs(targets=targets(), **given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=5e-2)
    (made,) = torch.autograd.grad(found.sum(), [given["hidden"]])
    (slope,) = torch.autograd.grad(wanted.sum(), [given["hidden"]])
    assert made.dtype == torch.bfloat16
    assert F.cosine_similarity(made.flatten().float(), slope.flatten().float(), dim=0) > 0.999


@pytest.mark.parametrize("trains", [False, True])
def test_a_wider_head_is_taken_in_the_dtype_of_the_hidden_states(trains: bool) -> None:
    given = inputs()
    hidden = given["hidden"].detach().bfloat16().requires_grad_()
    weight = given["weight"].requires_grad_(trains)
    found = linear_log_probs(hidden, weight, targets())
    narrow = weight.detach().bfloat16()
    torch.testing.assert_close(found, linear_log_probs(hidden, narrow, targets()), rtol=0, atol=0)
    found.sum().backward()
    assert (weight.grad is not None) == trains
    assert not trains or weight.grad.dtype == torch.float32


def test_without_a_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    softmax = module._log_softmax

    def spied(z: Tensor, targets: Tensor, factors: Tensor | None, cap: float | None) -> Tensor:
        asked.append(factors is not None)
        return softmax(z, targets, factors, cap)

    monkeypatch.setattr(module, "_log_softmax", spied)
    given = inputs()
    expected = linear_log_probs(targets=targets(), **given).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = linear_log_probs(targets=targets(), **given)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    frozen = {name: t.detach() for name, t in given.items()}
    assert not linear_log_probs(targets=targets(), **frozen).requires_grad
    assert not any(asked), "the head trains, so that its gradient is the backward pass's to make"


def test_no_rows_are_zero_and_hang_on_the_graph() -> None:
    hidden = torch.zeros(0, H, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(V, H), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None


def test_logits_are_never_there_for_more_rows_than_the_buffer_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BUFFER", 4 * V * 2)
    SCRATCH.buffers.clear()
    hidden = inputs()["hidden"].detach().bfloat16().requires_grad_()
    linear_log_probs(hidden, torch.randn(V, H).bfloat16(), targets()).sum().backward()
    assert SCRATCH.buffers[torch.bfloat16].numel() <= 4 * V


def test_what_is_not_a_number_stays_none() -> None:
    given = {name: t.detach() for name, t in inputs().items()}
    for bad in (float("nan"), float("inf")):
        hidden = given["hidden"].clone()
        hidden[2, 3] = bad
        hidden.requires_grad_()
        found = linear_log_probs(hidden, given["weight"], targets())
        assert found.isnan().nonzero().flatten().tolist() == [2]
        (slope,) = torch.autograd.grad(found.sum(), [hidden])
        assert slope.isnan().all(1).nonzero().flatten().tolist() == [2]


def test_extreme_logits() -> None:
    hidden, weight = torch.tensor([[1e30], [-1e4], [0.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    at = torch.tensor([0, 0, 1])
    wanted = (hidden @ weight.T).double().log_softmax(-1)[torch.arange(3), at]
    torch.testing.assert_close(linear_log_probs(hidden, weight, at).double(), wanted, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_tokens_that_a_bias_rules_out_get_no_gradient(
    trained: tuple[str, ...], dtype: torch.dtype
) -> None:
    bias = torch.full((V,), -torch.inf)
    bias[targets()] = 0.0
    given = inputs(dtype) | {"bias": bias.to(dtype)}
    given = {name: t.requires_grad_(name in trained) for name, t in given.items()}
    found, wanted = linear_log_probs(targets=targets(), **given), plain(given)
    made, slopes = (
        torch.autograd.grad(out.sum(), [given[name] for name in trained]) for out in (found, wanted)
    )
    far = near if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(found.double(), wanted, **far)
    for one, other in zip(made, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * far["rtol"], atol=10 * far["atol"])


@pytest.mark.parametrize("target", [-100, V])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    at = targets()
    at[3] = target
    given = inputs()
    with pytest.raises(IndexError, match=str(target)):
        linear_log_probs(given["hidden"], given["weight"], at)
