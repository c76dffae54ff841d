"""Every architecture, with PEFT as the oracle for what is targeted: usual, all-linear, by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from inlay.methods import names
from inlay.methods.lora import LoraConfig
from inlay.model import targets
from inlay.model.defaults import HEADS, TARGETS, TARGETS_OF
from inlay.model.roster import Roster
from tests.model.conftest import ARCHITECTURES, output

HOW: dict[str, Any] = {"usual": None, "all-linear": "all-linear", "named": list}
EVERY = [(name, how) for name in ARCHITECTURES for how in HOW]


def settings(name: str, how: str) -> dict[str, Any]:
    names = ARCHITECTURES[name][3] if how == "named" else HOW[how]
    return {"r": 3, "lora_alpha": 5, "target_modules": names}


def spelled(model: nn.Module, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the usual targets named, for PEFT does not know all the models."""
    names = targets.targets(model, LoraConfig(**wanted))
    return {**wanted, "target_modules": names}


def by_peft(model: nn.Module, **settings: Any) -> Any:
    """Return `model` with PEFT's LoRA in it."""
    peft = pytest.importorskip("peft")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what transformers is about to drop
        return peft.get_peft_model(model, peft.LoraConfig(**settings))


def randomize(roster: Roster, name: str, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, _, adapter in roster.adapters(name):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "how"), EVERY)
def test_the_sites_and_the_trainable_count_are_pefts(architecture, name, how):
    ours, theirs = architecture(name), architecture(name)
    roster = Roster(ours)
    roster.add("a", LoraConfig(**settings(name, how)))
    peft_model = by_peft(theirs, **spelled(ours, settings(name, how)))
    assert set(roster.hosts) == set(peft_model.base_model.targeted_module_names)
    for path, parameter in peft_model.named_parameters():
        if ".mlp.experts." in path or ".mlp.gate." in path:
            parameter.requires_grad_(False)  # raw parameters of experts, which LoRA here leaves out
    assert trainable(ours) == trainable(peft_model) > 0


@pytest.mark.parametrize("name", [name for name in names() if name != "ia3"])
def test_the_usual_targets_are_pefts(name: str) -> None:
    # IA3's own file has its table, for it has two; test_beside_peft compares it
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_TUNER_MAPPING
    table = getattr(mapping.get(name.upper()), "target_module_mapping", None) or {}
    ours = TARGETS_OF.get(name.upper(), TARGETS)
    for kind, theirs in table.items():
        if (name, kind) == ("ln_tuning", "llava"):
            continue  # PEFT's has embeddings and a projector in it, which are no norms
        if kind == "vit":  # ours has the names of either version of transformers
            assert set(theirs) <= set(ours[kind])
        else:
            assert ours[kind] == theirs or set(ours[kind]) == set(theirs), kind


@pytest.mark.parametrize(("name", "how"), EVERY)
def test_an_adapter_changes_nothing_untrained_something_trained_and_leaves_no_trace(
    architecture, name, how
):
    model = architecture(name)
    next(model.parameters()).requires_grad_(False)  # a flag of the user's own
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    pristine = {n: t.clone() for n, t in model.state_dict().items()}
    tree = [(n, id(m)) for n, m in model.named_modules()]
    expected = output(model, name)

    roster = Roster(model)
    roster.add("a", LoraConfig(**settings(name, how)))
    torch.testing.assert_close(output(model, name), expected, rtol=0, atol=1e-6)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n] == []

    randomize(roster, "a")
    adapted = output(model, name)
    assert (adapted - expected).abs().max() > 1e-4
    with roster.selection.using(active=()):
        assert torch.equal(output(model, name), expected)

    roster.merge(check=True)
    torch.testing.assert_close(output(model, name), adapted, rtol=0, atol=1e-5)
    roster.unmerge()
    assert torch.equal(output(model, name), adapted)

    assert roster.take_out(merged=False) is model
    assert [(n, id(m)) for n, m in model.named_modules()] == tree
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    state = model.state_dict()
    assert state.keys() == pristine.keys()
    assert all(torch.equal(state[n], t) for n, t in pristine.items())
    assert torch.equal(output(model, name), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_model_is_a_plain_one_that_computes_the_same(architecture, name):
    model = architecture(name)
    flags = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    classes = [(n, type(m)) for n, m in model.named_modules()]
    roster = Roster(model)
    roster.add("a", LoraConfig(**settings(name, "all-linear")))
    randomize(roster, "a")
    adapted = output(model, name)
    roster.merge()
    roster.take_out(merged=True)
    torch.testing.assert_close(output(model, name), adapted, rtol=0, atol=1e-5)
    assert [(n, type(m)) for n, m in model.named_modules()] == classes
    after = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    assert after == flags


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_biases_train_where_the_setting_says_all(architecture, name):
    ours, theirs = architecture(name), architecture(name)
    wanted = {**settings(name, "usual"), "bias": "all"}
    expected = output(ours, name)
    roster = Roster(ours)
    roster.add("a", LoraConfig(**wanted))
    assert torch.equal(output(ours, name), expected)
    peft_model = by_peft(theirs, **spelled(ours, wanted))
    if name == "t5":  # PEFT also trains its table of relative positions, for "bias" is in its name
        theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.requires_grad_(False)
        theirs.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.requires_grad_(False)
    assert trainable(ours) == trainable(peft_model)
    randomize(roster, "a")
    adapted = output(ours, name)
    assert not torch.equal(adapted, expected)
    roster.merge()
    torch.testing.assert_close(output(ours, name), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("vit", "SEQ_CLS")]
)
def test_a_task_adds_its_head_as_a_copy(architecture, name, task):
    ours, theirs = architecture(name), architecture(name)
    wanted = {"r": 3, "task_type": task, "target_modules": "all-linear"}
    roster = Roster(ours)
    roster.add("a", LoraConfig(**wanted))
    peft_model = by_peft(theirs, **wanted)
    assert trainable(ours) == trainable(peft_model)
    heads = set(HEADS.get(task, [])) & {n for n, _ in ours.named_children()}
    assert set(roster.hosts) == set(peft_model.base_model.targeted_module_names) | heads


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_half_precision_base_keeps_its_precision_and_its_bits(architecture, name):
    model = architecture(name).to(torch.bfloat16)
    expected = output(model, name)
    roster = Roster(model)
    roster.add("a", LoraConfig(**settings(name, "named")))
    assert torch.equal(output(model, name), expected)
    randomize(roster, "a")
    adapted = output(model, name)
    assert adapted.dtype == expected.dtype
    assert not torch.equal(adapted, expected)
    roster.merge(check=True)
    torch.testing.assert_close(output(model, name), adapted, rtol=0.1, atol=0.1)
    roster.take_out(merged=False)
    assert torch.equal(output(model, name), expected)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "block", "target"),
    [
        ("llama", "self_attn", "gate_proj"),
        ("llama", "mlp", "o_proj"),
        ("gpt2", "attn", "c_fc"),
        ("t5", "SelfAttention", "wo"),
    ],
)
def test_a_whole_block_called_by_keywords_is_copied_and_merged(architecture, name, block, target):
    for dtype in (torch.float32, torch.bfloat16):
        model = architecture(name).to(dtype)
        expected = output(model, name)
        roster = Roster(model)
        roster.add("a", LoraConfig(target_modules=[target], modules_to_save=[block]))
        torch.testing.assert_close(output(model, name), expected, rtol=0.05, atol=0.05)
        for _, _, adapter in roster.adapters("a"):
            for parameter in adapter.parameters():
                parameter.data.mul_(1.5)
        adapted = output(model, name)
        assert not torch.equal(adapted, expected)
        roster.merge()
        torch.testing.assert_close(output(model, name), adapted, rtol=0.05, atol=0.05)
        roster.take_out(merged=True)
        torch.testing.assert_close(output(model, name), adapted, rtol=0.05, atol=0.05)
