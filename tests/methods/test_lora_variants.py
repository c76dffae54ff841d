"""LoRA's variants where the settings of `settings/lora.py` cannot say what is tried."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.bases import view
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.core.selection import Selection
from inlay.methods import method
from inlay.methods.lora import LoraConfig
from tests.methods.bases import build, llama


def made(layer: nn.Module, path: str = "", **settings: Any) -> Any:
    config, base = LoraConfig(**settings), view(layer)
    base.path = path
    kind = method("lora").of(config)
    assert kind is not None
    adapter = kind(config, base)
    adapter.reset(base)
    return adapter


def randomized(adapter: Any) -> Any:
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def test_qalora_computes_what_peft_does_over_gptq_layers_where_alone_it_has_it():
    variants = pytest.importorskip("peft.tuners.lora.variants")
    layer, x = nn.Linear(12, 5), torch.randn(2, 3, 12)
    adapter = randomized(made(layer, use_qalora=True, qalora_group_size=4, r=2, lora_alpha=3))
    theirs = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=adapter.lora_A)},
        lora_B={"a": SimpleNamespace(weight=adapter.lora_B)},
        lora_dropout={"a": nn.Identity()},
        scaling={"a": 1.5},
        qalora_group_size={"a": 4},
        training=False,
        in_features=12,
    )
    expected = variants.QALoraLinearVariant.forward(theirs, "a", x, layer(x))
    torch.testing.assert_close(adapter(view(layer), x), expected)
    with pytest.raises(UserError, match=r"qalora_group_size=5 does not divide the 12 .* try 4"):
        made(layer, use_qalora=True, qalora_group_size=5)


def test_the_update_of_qalora_is_the_same_for_all_inputs_of_a_group():
    delta = randomized(made(nn.Linear(12, 5), use_qalora=True, qalora_group_size=4)).delta(
        torch.float32
    )
    groups = delta.unflatten(1, (3, 4))
    torch.testing.assert_close(groups, groups[..., :1].expand_as(groups))


def test_a_bias_merged_into_a_layer_without_one_is_taken_out_again():
    layer, x = nn.Linear(4, 3, bias=False), torch.randn(2, 4)
    host = Inlaid(view(layer), Selection(("a",)))
    host.adapters["a"] = randomized(made(layer, lora_bias=True))
    expected = host(x)
    host.merge(("a",))
    torch.testing.assert_close(layer(x), expected)
    host.unmerge()
    assert layer.bias is None


def test_bdlora_counts_a_module_by_any_part_of_its_path_and_refuses_what_is_in_neither_list():
    where = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["down"], "nblocks": 2}
    sizes = {}
    for path in ("layers.0.q_proj", "layers.0.mlp.down_proj"):
        adapter = made(nn.Linear(8, 6), path, use_bdlora=where, r=4)
        sizes[path] = tuple(adapter.lora_A.shape), tuple(adapter.lora_B.shape)
    assert list(sizes.values()) == [((4, 4), (6, 4)), ((4, 8), (6, 2))]
    with pytest.raises(UserError, match=r"'layers\.0\.up' is in neither of target_modules_bd_a"):
        made(nn.Linear(8, 6), "layers.0.up", use_bdlora=where)
    with pytest.raises(UserError, match="nblocks=2 does not divide the 3"):
        made(nn.Linear(8, 6), "q_proj", use_bdlora=where, r=3)
    whole = made(nn.Linear(8, 6), "up", use_bdlora={**where, "match_strict": False}, r=3)
    assert tuple(whole.lora_A.shape) == (3, 8)


@pytest.mark.parametrize(
    "settings", [{"lora_bias": True}, {"use_qalora": True}], ids=["lora_bias", "use_qalora"]
)
def test_what_is_no_plain_lora_is_not_combined_as_one(settings):
    model = inlay.get_peft_model(build(llama), LoraConfig(**settings))
    model.add_adapter("b", LoraConfig())
    with pytest.raises(UserError, match="default"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", "linear")
