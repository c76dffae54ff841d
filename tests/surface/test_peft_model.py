"""PEFT's names do here what they do there, and refuse what PEFT leaves silent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay import LoraConfig, PeftModel, UserError, get_peft_model
from inlay.core.inlaid import Inlaid
from inlay.methods.full import FullConfig

IDS = torch.arange(3, 13)[None]
CONFIG = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@torch.no_grad()
def logits(model: Any, **given: Any) -> torch.Tensor:
    return model(input_ids=IDS, **given).logits


@pytest.fixture
def model(tiny_llama: Any) -> PeftModel:
    """Return a model with the random adapters "default" and "other", the first active."""
    adapted = get_peft_model(tiny_llama(), CONFIG)
    adapted.add_adapter("other", CONFIG)
    return adapted.eval()


# -- making


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained(tiny_llama: Any) -> None:
    base = tiny_llama()
    before = logits(base)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    assert torch.equal(logits(adapted), before)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("CAUSAL_LM", inlay.PeftModelForCausalLM),
        ("SEQ_2_SEQ_LM", inlay.PeftModelForSeq2SeqLM),
        ("FEATURE_EXTRACTION", inlay.PeftModelForFeatureExtraction),
        (None, PeftModel),
    ],
)
def test_the_task_type_decides_the_class(tiny_llama: Any, task: str | None, kind: type) -> None:
    assert type(get_peft_model(tiny_llama(), CONFIG.replace(task_type=task))) is kind


def test_the_heads_of_a_task_are_trained_and_saved(tmp_path: Path) -> None:
    base, _ = inlay.load_base(task_type="SEQ_CLS")
    adapted = get_peft_model(base, LoraConfig(r=4, task_type="SEQ_CLS"))
    assert isinstance(adapted, inlay.PeftModelForSequenceClassification)
    assert any("score" in n for n, p in adapted.named_parameters() if p.requires_grad)
    assert "base_model.model.score.weight" in inlay.get_peft_model_state_dict(adapted)


def test_a_dictionary_with_pefts_fields_will_do(tiny_llama: Any) -> None:
    config = inlay.get_peft_config({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    assert isinstance(config, LoraConfig)
    assert isinstance(config, inlay.PeftConfig)
    adapted = get_peft_model(tiny_llama(), {"peft_type": "LORA", "target_modules": ["q_proj"]})
    assert adapted.peft_config["default"].r == 8


def test_adapters_follow_the_base_in_half_precision_only_when_told(tiny_llama: Any) -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        adapted = get_peft_model(tiny_llama().bfloat16(), CONFIG, autocast_adapter_dtype=autocast)
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {dtype}
        assert logits(adapted).dtype == torch.bfloat16


def test_a_model_with_adapters_is_not_adapted_again(model: PeftModel) -> None:
    for again in (model, model.get_base_model()):
        with pytest.raises(UserError, match="holds adapters already"):
            get_peft_model(again, CONFIG)


def test_what_is_no_configuration_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="no configuration of inlay"):
        get_peft_model(tiny_llama(), object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has no method"):
        inlay.PeftConfig()


def test_the_counts_and_the_line_that_tells_them(model: PeftModel, capsys: Any) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) == 896
    model.print_trainable_parameters()
    line = f"trainable params: 896 || all params: {total:,d} || trainable%: {89600 / total:.4f}\n"
    assert capsys.readouterr().out == line


def test_the_active_adapters_settings_are_at_hand(model: PeftModel) -> None:
    assert model.active_peft_config.r == 4
    assert model.peft_type == "LORA"
    model.set_adapter(["default", "other"])
    with pytest.raises(UserError, match="2 adapters are active"):
        model.active_peft_config  # noqa: B018


def test_pefts_arguments_of_loading_and_saving_are_taken(tiny_llama: Any, tmp_path: Path) -> None:
    adapted = get_peft_model(tiny_llama(), CONFIG)
    adapted.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="save_embedding_layers=True is not supported"):
        adapted.save_pretrained(tmp_path / "none", save_embedding_layers=True)
    adapted.save_pretrained(tmp_path / "all", save_embedding_layers="auto", is_main_process=True)
    half = tiny_llama().bfloat16()
    again = PeftModel.from_pretrained(
        half, tmp_path / "all", low_cpu_mem_usage=True, autocast_adapter_dtype=False
    )
    again.load_adapter(tmp_path / "all", "wide", check_base=False)
    dtypes = {
        name: {p.dtype for _, _, a in again.roster.adapters(name) for p in a.parameters()}
        for name in ("default", "wide")
    }
    assert dtypes == {"default": {torch.bfloat16}, "wide": {torch.float32}}
    assert again.merge_and_unload(progressbar=True) is half


def test_a_pickle_is_not_written(model: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only safetensors are written"):
        model.save_pretrained(tmp_path / "a", safe_serialization=False)
    assert not (tmp_path / "a").exists()


# -- choosing


def test_switching_and_disabling(model: PeftModel, tiny_llama: Any) -> None:
    first = logits(model)
    model.set_adapter("other")
    assert model.active_adapters == [model.active_adapter] == ["other"]
    second = logits(model)
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(model), second)


def test_disabling_ends_also_with_an_error(model: PeftModel) -> None:
    with pytest.raises(RuntimeError), model.disable_adapter():
        raise RuntimeError
    assert model.active_adapters == ["default"]


def test_a_stack_of_adapters_adds_up(model: PeftModel) -> None:
    model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    stacked = logits(model)
    with pytest.raises(UserError, match="2 adapters are active"):
        _ = model.active_adapter
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), stacked, rtol=0, atol=1e-5)


def test_set_adapter_gives_the_chosen_adapter_the_gradients(model: PeftModel) -> None:
    def trained() -> set[str]:
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        return {"other" if ".other." in name else "default" for name in names}

    assert trained() == {"default"}
    model.set_adapter("other")
    assert trained() == {"other"}
    model.set_adapter("other", inference_mode=True)
    assert trained() == set()


@pytest.mark.parametrize("name", ["third", "othr"])
def test_an_unknown_adapter_is_an_error_that_names_the_known(model: PeftModel, name: str) -> None:
    for use in (model.set_adapter, model.delete_adapter, lambda n: model.merge_adapter([n])):
        with pytest.raises(UserError, match=f"no adapter is called '{name}'; .*default, other"):
            use(name)
    with pytest.raises(UserError, match="no adapter is called"):
        logits(model, adapter_names=[name])


# -- a batch over several adapters


def test_each_row_of_a_batch_gets_its_own_adapter(model: PeftModel, tiny_llama: Any) -> None:
    names = ["other", "__base__", "default", "other"]
    rows = torch.arange(3, 43).reshape(4, 10)
    with torch.no_grad():
        mixed = model(input_ids=rows, adapter_names=names).logits
        for i, name in enumerate(names):
            if name == "__base__":
                alone = tiny_llama()(input_ids=rows[i : i + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=rows[i : i + 1]).logits
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_serves_each_row_its_adapter(model: PeftModel, beams: int) -> None:
    rows = torch.arange(3, 23).reshape(2, 10)
    given = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": 319}
    mixed = model.generate(input_ids=rows, adapter_names=["default", "other"], **given)
    for i, name in enumerate(("default", "other")):
        model.set_adapter(name)
        alone = model.generate(input_ids=rows[i : i + 1], **given)
        assert mixed[i].tolist() == alone[0].tolist()


def test_a_failed_batch_leaves_no_routing_behind(model: PeftModel) -> None:
    with pytest.raises(UserError, match="adapter_names has 2 names, but the batch has 3 rows"):
        model(input_ids=IDS.repeat(3, 1), adapter_names=["default", "other"])
    assert model.roster.selection.rows is None
    logits(model)


# -- merging


def test_merging_and_unmerging_gives_the_base_back_bit_for_bit(tiny_llama: Any) -> None:
    model = get_peft_model(tiny_llama().bfloat16(), CONFIG).eval()
    before = {n: p.clone() for n, p in model.get_base_model().state_dict().items()}
    adapted = logits(model)
    for _ in range(10):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), adapted, rtol=0.05, atol=0.05)
        model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_while_merged_nothing_else_can_be_chosen(model: PeftModel) -> None:
    model.merge_adapter(["other"])
    assert model.active_adapters == ["other"]
    for use in (
        lambda: model.set_adapter("default"),
        lambda: logits(model, adapter_names=["default"]),
        lambda: model.merge_adapter(["default"]),
        lambda: model.add_adapter("third", CONFIG),
        lambda: model.delete_adapter("other"),
    ):
        with pytest.raises(UserError, match="merged"):
            use()
    with pytest.raises(UserError, match="merged"), model.disable_adapter():
        pass
    assert model.active_adapters == ["other"]


@pytest.mark.parametrize("names", [None, ["other"], ["default", "other"]])
def test_merge_and_unload_gives_a_plain_model_with_the_adapters_logits(model, names) -> None:
    model.set_adapter(names or ["default"])
    expected = logits(model)
    model.set_adapter("default")
    merged = model.merge_and_unload(safe_merge=True, adapter_names=names)
    assert not any(isinstance(m, Inlaid) for m in merged.modules())
    assert all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_a_merge_that_is_not_finite_is_refused_with_nothing_merged(model: PeftModel) -> None:
    before = logits(model)
    with torch.no_grad():
        host = list(model.roster.hosts.values())[-1]
        host.adapters["other"].lora_B.fill_(float("inf"))
    with pytest.raises(UserError, match=r"not finite.*nothing was merged"):
        model.merge_and_unload(safe_merge=True, adapter_names=["other"])
    assert torch.equal(logits(model), before)


def test_unload_gives_the_base_back(model: PeftModel, tiny_llama: Any) -> None:
    base = model.unload()
    fresh = tiny_llama()
    assert not any(isinstance(m, Inlaid) for m in base.modules())
    assert all(p.requires_grad for p in base.parameters())
    for name, weight in fresh.state_dict().items():
        assert torch.equal(base.state_dict()[name], weight)


def test_a_deleted_adapter_is_gone_and_its_name_free(model: PeftModel) -> None:
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert not any(".default." in name for name, _ in model.named_parameters())
    model.add_adapter("default", CONFIG)
    assert list(model.peft_config) == ["other", "default"]


# -- an ordinary module


def test_the_base_shines_through(model: PeftModel) -> None:
    assert model.config.model_type == "llama"
    assert model.get_base_model() is model.base_model.model
    assert model.device.type == "cpu"
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, Inlaid)
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


def test_a_copy_is_a_model_of_its_own(model: PeftModel) -> None:
    other = copy.deepcopy(model)
    before = logits(model)
    other.set_adapter("other")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), before)
    assert other.unload() is not model.get_base_model()


def test_a_state_dict_goes_round(model: PeftModel, tiny_llama: Any) -> None:
    other = get_peft_model(tiny_llama(seed=3), CONFIG)
    other.add_adapter("other", CONFIG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other.eval()), logits(model))


def test_full_fine_tuning_trains_the_base_itself(tiny_llama: Any) -> None:
    model = get_peft_model(tiny_llama(), FullConfig())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == total
    part = get_peft_model(tiny_llama(), FullConfig(target_modules=["q_proj"]))
    assert {
        n.rpartition(".")[0].rpartition(".")[2]
        for n, p in part.named_parameters()
        if p.requires_grad
    } == {"q_proj"}
