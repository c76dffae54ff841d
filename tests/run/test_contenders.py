"""What a comparison trains: names, settings and learning rates, before anything is loaded."""

from __future__ import annotations

import pytest

from inlay.config.given import from_mapping
from inlay.core.errors import UserError
from inlay.methods import names
from inlay.run.contenders import RATES, VARIANTS, changed, contenders, settings_of

RECIPE = from_mapping(
    {
        "adapter": {"method": "lora", "r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.1},
        "data": "chats.jsonl",
        "train": {"learning_rate": 1e-3},
    },
    "recipe.yaml",
)


def resolved(word, *sets):
    one = contenders([word, "other=lora"], sets)[0]
    return settings_of(one, RECIPE, [], "lora", "sft").config


def test_the_recipe_s_adapter_settings_go_to_its_method_and_the_shared_ones_to_all():
    lora, dora = resolved("lora").adapter, resolved("dora").adapter
    assert (lora.r, lora.lora_dropout, lora.use_dora) == (4, 0.1, False)
    assert (dora.r, dora.lora_dropout, dora.use_dora) == (4, 0.1, True)
    vera = resolved("vera").adapter
    assert (vera.r, vera.target_modules) == (256, ["q_proj"])
    # a method that is not for all linear layers keeps its own targets
    assert resolved("ia3").adapter.target_modules is None
    assert resolved("full").adapter.target_modules is None


def test_a_setting_of_one_is_of_that_one_alone():
    words = ["small=lora", "large=lora"]
    small, large = contenders(words, ["small.r=2", "large.r=32", "large.train.learning_rate=1e-4"])
    found = [settings_of(one, RECIPE, [], "lora", "sft").config for one in (small, large)]
    assert [config.adapter.r for config in found] == [2, 32]
    assert [config.train.learning_rate for config in found] == [1e-3, 1e-4]
    assert (small.own_rate, large.own_rate) == (False, True)


def test_changing_a_value_keeps_the_others_and_their_origins():
    one = contenders(["dora", "full"], [])[0]
    before = settings_of(one, RECIPE, [], "lora", "sft")
    after = changed(before, {"train.seed": 7})
    assert after.config.train.seed == 7
    assert after.config.adapter == before.config.adapter
    assert after.origins["adapter.r"] == "recipe.yaml"


def test_the_tables_name_methods():
    # the rate of a method may stand there before its file does
    known = {*names(), "p_tuning", "prefix_tuning"}
    assert set(RATES) <= known
    assert {method for method, _ in VARIANTS.values()} <= known


@pytest.mark.parametrize(
    ("methods", "sets", "told"),
    [
        (["lora", "lor"], [], "Did you mean 'lora'?"),
        (["lora"], [], "fewer than 2"),
        (["lora", "lora"], [], "'lora' is given twice"),
        (["a/b=lora", "full"], [], "'a/b' is no name"),
        (["lora", "full"], ["lora.r"], "NAME.KEY=VALUE"),
        (["lora", "full"], ["ia3.r=2"], "--methods names no 'ia3'"),
        (["lora", "full"], ["lora.rr=2"], "Did you mean 'r'?"),
        (["lora", "full"], ["lora.train.max_steps=2"], "train.max_steps is the same for all"),
        (["lora", "full"], ["lora.data.path=x"], "is the recipe's"),
    ],
)
def test_what_cannot_be_compared_is_told(methods, sets, told):
    with pytest.raises(UserError) as error:
        contenders(methods, sets)
    assert told in str(error.value)
