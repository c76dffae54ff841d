"""AdaLoRA beside PEFT's after ranks were taken away, and its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.core.errors import UserError
from inlay.methods.adalora import AdaLoraConfig
from tests.methods.bases import build, llama, output, randomize

FILE = "adapter_model.safetensors"


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_took_ranks_from_computes_the_same_and_goes_back(tmp_path):
    peft = pytest.importorskip("peft")
    settings = {"init_r": 4, "target_r": 1, "total_step": 6, "tfinal": 1, "lora_alpha": 64}
    config = peft.AdaLoraConfig(target_modules=["q_proj", "down_proj"], **settings)
    model = peft.get_peft_model(build(llama), config)
    randomize(model)
    ids = torch.arange(3, 23).reshape(2, 10)
    for step in range(1, 7):
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    expected = output(model.eval())
    model.save_pretrained(tmp_path / "theirs")
    before = load_file(tmp_path / "theirs" / FILE)
    ranks = {len(t) for k, t in before.items() if k.endswith("lora_E")}
    assert len(ranks) > 1, "no rank was taken away"

    ours = inlay.PeftModel.from_pretrained(build(llama), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), expected, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / FILE)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    back = peft.PeftModel.from_pretrained(build(llama), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), expected, rtol=0, atol=1e-5)


def test_a_layer_that_no_rank_is_left_of_computes_what_the_base_does():
    pattern = {f"model.layers.{n}.self_attn.q_proj.lora_E": [n == 1] * 3 for n in (0, 1)}
    config = AdaLoraConfig(init_r=3, target_modules=["q_proj"], rank_pattern=pattern)
    model = inlay.get_peft_model(build(llama), config)
    assert model.get_nb_trainable_parameters()[0] == 3 * (32 + 32 + 1)
    torch.testing.assert_close(output(model), output(build(llama)), rtol=0, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(output(model), output(build(llama)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"init_r": 0}, "init_r=0 must be a whole number"),
        ({"beta1": 1.0}, "beta1=1.0 must be above 0"),
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, "leave no step of total_step=10"),
        ({"rank_pattern": {"a.lora_E": [True]}}, "must be 12 times true or false"),
        ({"use_dora": True}, "use_dora=True is not supported: AdaLoRA has no such thing"),
        ({"alpha_pattern": {"q": 3}}, "alpha_pattern=.* is not supported"),
    ],
)
def test_what_adalora_cannot_be_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        AdaLoraConfig(**settings)
