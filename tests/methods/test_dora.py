"""DoRA, LoRA's `use_dora`: the norms it computes, and its training steps beside PEFT's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import inlay
from inlay.bases import view
from inlay.core.errors import UserError
from inlay.methods._dora import Dora
from inlay.methods.lora import LoraConfig
from tests.methods.bases import bert, build, gpt2, llama, output, randomize, vit

peft = pytest.importorskip("peft")
SETTINGS = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.3, "use_dora": True}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (llama, ["q_proj", "down_proj"]),
        (bert, ["value"]),
        (gpt2, ["c_attn"]),
        (vit, ["projection"]),
    ],
    ids=["linear", "linear with bias", "Conv1D", "conv"],
)
def test_a_training_step_with_dropout_is_pefts(make, targets, tmp_path):
    stored_as = {"fan_in_fan_out": True} if make is gpt2 else {}
    settings = SETTINGS | stored_as | {"target_modules": targets}
    theirs = peft.get_peft_model(build(make), peft.LoraConfig(**settings))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = inlay.PeftModel.from_pretrained(build(make), tmp_path / "theirs", is_trainable=True)
    outputs, gradients = [], []
    for model in (theirs, ours):
        model.eval()
        for name, module in model.named_modules():
            # only the adapters train, for the base's own dropout draws from the same numbers
            if any(name.endswith(f".{target}") for target in targets):
                module.train()
        torch.manual_seed(3)
        out = output.__wrapped__(model)
        out.square().mean().backward()
        outputs.append(out.detach())
        shapes = sorted(
            (tuple(p.grad.squeeze().shape), p.grad.abs().sum().item())
            for p in model.parameters()
            if p.requires_grad
        )
        gradients.append(torch.tensor([size for _, size in shapes]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()


def test_the_norms_are_those_of_the_sum_without_making_it():
    torch.manual_seed(0)
    layer = nn.Linear(24, 10).double()
    adapter = Dora(LoraConfig(r=3, lora_alpha=5, use_dora=True), view(layer)).double()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    made = layer.weight + 5 / 3 * adapter.lora.lora_B @ adapter.lora.lora_A
    torch.testing.assert_close(adapter._norms(layer.weight), made.norm(dim=1))


def test_an_unchanged_direction_of_another_magnitude_scales_the_outputs_but_not_the_bias():
    layer = nn.Linear(6, 5)
    adapter = Dora(LoraConfig(use_dora=True), view(layer))
    adapter.reset(view(layer))
    with torch.no_grad():
        adapter.magnitude.mul_(2)
    x = torch.randn(3, 6)
    torch.testing.assert_close(adapter(view(layer), x), 2 * x @ layer.weight.T + layer.bias)


def test_dora_adapters_are_not_summed_as_if_they_were_loras():
    model = inlay.get_peft_model(build(llama), LoraConfig(use_dora=True))
    model.add_adapter("other", LoraConfig(use_dora=True))
    with pytest.raises(UserError, match="Dora"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
