"""A mixture's experts in codes: what they compute, keep, save, and are when merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.bases import view
from inlay.bases._experts import PackedExperts, pack_parameters
from inlay.kernels import codec
from inlay.methods.lora import LoraConfig

KINDS = ["mixtral", "gpt_oss"]


def experts(kind: str, *, hidden: int = 64, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a mixture of transformers: [E, O, I], or with biases and the other way round."""
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 32, "num_local_experts": 4}
    made: nn.Module = (
        MixtralExperts(MixtralConfig(**sizes, num_hidden_layers=1))
        if kind == "mixtral"
        else GptOssExperts(GptOssConfig(**sizes, num_hidden_layers=1))
    )
    made.config._experts_implementation = "eager"
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.to(dtype).requires_grad_(False)


def packed(kind: str, **given: Any) -> tuple[PackedExperts, nn.Module]:
    """Return packed experts, and plain ones of the same numbers."""
    codes = {key: given.pop(key) for key in ("double", "block") if key in given}
    of = given.pop("of", "nf4")
    plain = experts(kind, **given)
    made = pack_parameters(copy.deepcopy(plain), ["gate_up_proj", "down_proj"], of, **codes)
    for name in made.stacks:
        plain.register_parameter(name, nn.Parameter(made.numbers(name), requires_grad=False))
    return made, plain


def rows(hidden: int = 64, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x = torch.randn(7, hidden, dtype=dtype)
    weights, index = torch.randn(7, 3).softmax(-1).topk(2)
    return x, index, weights.to(dtype)  # the fourth expert has no rows


def differentiated(module: Any, x: torch.Tensor, *routed: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    index, weights = routed[0], routed[1].clone().requires_grad_()
    out = module(x, index, weights)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, weights])]


@pytest.mark.parametrize("of", codec.KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [64, 33], ids=["blocks of their own", "blocks of two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_compute_what_plain_ones_of_the_same_numbers_do(of, kind, hidden, dtype):
    made, plain = packed(kind, of=of, hidden=hidden, dtype=dtype)
    assert type(made).__name__ == f"Packed{type(plain).__name__}"
    assert isinstance(made, type(plain))
    assert made._is_a_mixture() == (hidden == 64 or of == "int8")
    found, meant = (differentiated(m, *rows(hidden, dtype)) for m in (made, plain))
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found, meant, **tolerance)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("of", codec.KINDS)
def test_one_of_a_stack_is_what_it_is_in_the_stack(of, double):
    for shape in ((3, 4, 32), (3, 256, 64)):  # within a nested block of 256, and whole ones
        stack = codec.quantize(torch.randn(shape), of, 64, double)
        whole = codec.dequantize(stack)
        for i in range(3):
            assert torch.equal(codec.dequantize(codec.one(stack, i)), whole[i])


@pytest.mark.parametrize("hidden", [64, 33])
def test_no_matrix_is_kept_for_the_backward_pass(hidden):
    made, plain = packed("mixtral", hidden=hidden)
    most = made.numbers("down_proj")[0].numel()
    x, index, weights = rows(hidden)
    for module, keeps in ((made, False), (plain, True)):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.untyped_storage().nbytes() // 4) or t, lambda t: t
        ):
            module(x.clone().requires_grad_(), index, weights)
        assert any(size >= most for size in kept) == keeps


@pytest.mark.parametrize("hidden", [64, 33])
def test_a_step_with_checkpoints_has_the_same_gradients(hidden):
    made, _ = packed("mixtral", hidden=hidden)
    alone = differentiated(made, *rows(hidden))

    def again(*given: torch.Tensor) -> torch.Tensor:
        return checkpoint(made, *given, use_reentrant=False)

    torch.testing.assert_close(differentiated(again, *rows(hidden)), alone)


def test_they_are_moved_cast_and_copied_as_any_module():
    made, _ = packed("gpt_oss")
    codes = {name: value.clone() for name, value in made.state_dict().items()}
    other = copy.deepcopy(made).to(torch.bfloat16)
    assert other.numbers("down_proj").dtype == other.down_proj_bias.dtype == torch.bfloat16
    assert view(other).dtype == torch.bfloat16
    for name, value in other.state_dict().items():
        assert torch.equal(value, codes[name].to(value.dtype)) or name.endswith("bitsandbytes__nf4")
    assert torch.equal(made.gate_up_proj, made.numbers("gate_up_proj"))
    plain = made.unpacked()
    assert type(plain).__name__ == "GptOssExperts"
    assert list(plain._parameters) == list(experts("gpt_oss")._parameters)
    x, *routed = rows()
    torch.testing.assert_close(plain(x, *routed), made(x, *routed))


@pytest.mark.parametrize("double", [True, False])
def test_a_state_dict_is_that_of_bitsandbytes(double):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    theirs = experts("mixtral")
    ours, _ = packed("mixtral", double=double)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(theirs, name, compress_statistics=double)
    held, there = ours.state_dict(), theirs.state_dict()
    assert held.keys() == there.keys()
    for name, value in held.items():
        if "quant_state" not in name:
            assert torch.equal(value, there[name]), name
    again, _ = packed("mixtral", double=double)
    again.load_state_dict(there)
    assert torch.equal(again.gate_up_proj, ours.gate_up_proj)


def test_a_state_dict_that_is_not_whole_says_what_is_wrong():
    made, _ = packed("mixtral")
    whole = made.state_dict()
    for lacking, told in (("down_proj", "Missing key"), ("down_proj.absmax", "no packed stack")):
        with pytest.raises(RuntimeError, match=told):
            made.load_state_dict({k: v for k, v in whole.items() if k != lacking})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        made.load_state_dict(whole | {"other": whole["down_proj"]})


class Model(nn.Module):
    """One module of experts."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.experts = module

    def forward(self, x: torch.Tensor, *routed: torch.Tensor) -> torch.Tensor:
        return self.experts(x, *routed)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_their_parameters_train_merge_and_unmerge(kind):
    made, plain = packed(kind)
    settings = LoraConfig(r=2, target_parameters=["gate_up_proj", "down_proj"])
    models = [inlay.get_peft_model(Model(m), settings).eval() for m in (made, plain)]
    x, *routed = rows()
    grads = []
    for model in models:
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
        model(x, *routed).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 4
    torch.testing.assert_close(*grads)
    codes = {name: value.clone() for name, value in made.state_dict().items()}
    ran = models[0](x, *routed)
    models[0].merge_adapter()
    assert made.in_codes == []
    torch.testing.assert_close(models[0](x, *routed), ran)
    models[0].unmerge_adapter()
    assert all(torch.equal(value, codes[name]) for name, value in made.state_dict().items())
    merged = models[0].merge_and_unload()
    assert type(merged.experts) is type(plain)
    torch.testing.assert_close(merged(x, *routed), ran)
