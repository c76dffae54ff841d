"""X-LoRA: the mixture beside PEFT's, its two runs, and the LoRAs that it is made of."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay import LoraConfig, PeftModel, UserError, XLoraConfig, get_peft_model
from tests.methods.bases import bert, build, llama, output, randomize, t5

FILE = "adapter_model.safetensors"
CASES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "layers apart": {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 8},
    "without dropout": {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0},
    "first run with the LoRAs": {"scaling_pass_value": 0.3, "global_scaling_weight": 1.5},
    "the largest": {"top_k_lora": 1, "softmax_temperature": 0.5},
    "the largest alone": {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True},
    "as they come": {"enable_softmax": False, "layerwise_scalings": True},
}


def base() -> Any:
    return build(lambda: llama(use_cache=False))  # as PEFT asks


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return two trained LoRAs of different layers and ranks, one with an embedding."""
    found = {}
    for name, targets in {"0": ["q_proj", "embed_tokens"], "1": ["q_proj", "down_proj"]}.items():
        config = LoraConfig(r=2 + int(name), target_modules=targets, lora_alpha=5)
        model = get_peft_model(base(), config)
        randomize(model, 0.5)
        folder = tmp_path_factory.mktemp(f"lora{name}")
        model.save_pretrained(folder)
        found[name] = str(folder)
    return found


def adapted(folders: dict[str, str], **settings: Any) -> PeftModel:
    model = get_peft_model(base(), XLoraConfig(adapters=folders, **settings)).eval()
    randomize(model, 0.5)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_peft_does_and_pefts_files_go_both_ways(
    case: str, folders: dict[str, str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    settings = CASES[case] | {"hidden_size": 32, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base(), peft.XLoraConfig(adapters=folders, **settings))
    randomize(model, 0.5)
    expected = output(model.eval())
    assert not torch.allclose(expected, output(base()), atol=1e-3)
    model.save_pretrained(tmp_path / "theirs")
    # PEFT drops tensors whose names hold ".0." or ".1.", which are names of its adapters too: its
    # file lacks part of the classifier, which is put back here
    held = model.base_model.internal_xlora_classifier.state_dict()
    whole = {f"base_model.internal_xlora_classifier.{key}": t for key, t in held.items()}
    assert load_file(tmp_path / "theirs" / FILE).keys() < whole.keys()
    save_file(whole, tmp_path / "theirs" / FILE)

    ours = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), expected, rtol=0, atol=1e-5)
    own = get_peft_model(base(), XLoraConfig(adapters=folders, **settings))
    assert own.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()

    ours.save_pretrained(tmp_path / "ours", selected_adapters=["default"])
    after = load_file(tmp_path / "ours" / FILE)
    assert after.keys() == whole.keys()
    assert all(torch.equal(after[key], whole[key]) for key in whole)
    written = [
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("ours", "theirs")
    ]
    assert written[0] == written[1]
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), expected, rtol=0, atol=1e-5)


def test_a_layer_adds_each_lora_by_its_weight_of_the_token(folders: dict[str, str]) -> None:
    model = adapted(folders)
    host: Any = model.roster.hosts["model.layers.1.self_attn.q_proj"]
    seen: dict[str, Any] = {}
    host.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    own = base()
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        model(input_ids=ids)
        hidden = own(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        held: Any = model.roster.hosts["model.embed_tokens"].adapters["default"]._held[0]
        weights = held.layers(hidden).softmax(-1)
        meant = host.base_layer(seen["x"])
        for n, name in enumerate(("0", "1")):
            lora = host.adapters[name]
            meant += weights[..., n, None] * (seen["x"] @ lora.delta(torch.float32).T)
    torch.testing.assert_close(seen["out"], meant)


def test_it_is_saved_with_its_loras_and_found_beside_them(
    folders: dict[str, str], tmp_path: Path
) -> None:
    model = adapted(folders, use_trainable_adapters=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n}
    expected = output(model)  # the LoRAs are others now than in their folders
    model.save_pretrained(tmp_path / "all")
    moved = (tmp_path / "all").rename(tmp_path / "moved")
    again = PeftModel.from_pretrained(base(), moved)
    assert (again.active_adapters, list(again.peft_config)) == (["default"], ["0", "1", "default"])
    torch.testing.assert_close(output(again), expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in again.parameters())


def test_only_the_classifier_trains_and_gets_gradients(folders: dict[str, str]) -> None:
    model = adapted(folders, layerwise_scalings=True).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    ids = torch.arange(3, 23).reshape(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    for name in trained:
        assert model.get_parameter(name).grad.abs().sum() > 0
    model.set_adapter("0")
    assert not any(p.requires_grad for p in model.parameters())  # it was loaded to be used


def test_loras_that_the_model_has_are_mixed_under_their_names() -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["v_proj"]))
    model.add_adapter("law", LoraConfig(r=3, target_modules=["up_proj"]))
    for name in ("default", "law"):
        model.set_adapter(name)
        randomize(model, 0.5)
    model.add_adapter("mix", XLoraConfig(adapters={"default": "", "law": ""}))
    assert model.active_adapters == ["law"]
    model.set_adapter("mix")
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n]
    randomize(model.eval(), 0.5)
    mixed = output(model)
    assert not torch.allclose(mixed, output(base()), atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(output(model), output(base()), rtol=0, atol=0)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(output(twin), mixed, rtol=0, atol=0)
    with pytest.raises(UserError, match="'law' is a part of 'mix': delete that first"):
        model.delete_adapter("law")
    with pytest.raises(UserError, match="'mix' is a XLora, which no weight can say"):
        model.merge_adapter(["mix"])
    model.delete_adapter("mix")
    model.set_adapter("law")
    output(model)
    assert not model.get_base_model()._forward_pre_hooks
    torch.testing.assert_close(output(twin), mixed, rtol=0, atol=0)
    plain = twin.unload()
    assert not plain._forward_pre_hooks
    torch.testing.assert_close(output(plain), output(base()), rtol=0, atol=0)


def test_rows_of_one_batch_may_be_of_it_of_its_loras_and_of_the_base(
    folders: dict[str, str],
) -> None:
    model = adapted(folders, layerwise_scalings=True, scaling_pass_value=0.2)
    ids = torch.arange(3, 33).reshape(3, 10)
    names = ["1", "__base__", "default"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = model(input_ids=ids[row : row + 1], adapter_names=[name]).logits
            torch.testing.assert_close(mixed[row : row + 1], alone)


def test_it_generates_without_a_cache_and_says_so(folders: dict[str, str]) -> None:
    model = adapted(folders)
    ids = torch.arange(3, 13)[None]
    given = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 3}
    made = model.generate(input_ids=ids, use_cache=False, **given)
    with torch.no_grad():
        expected = ids
        for _ in range(3):
            logits = model(input_ids=expected).logits[:, -1]
            logits[:, model.generation_config.eos_token_id] = -torch.inf
            expected = torch.cat([expected, logits.argmax(-1)[:, None]], 1)
    assert torch.equal(made, expected)
    with pytest.raises(UserError, match=r"keeps no cache: generate\(use_cache=False\)"):
        model.generate(input_ids=ids, use_cache=True, **given)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **given), made)


def test_an_encoder_is_mixed_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = get_peft_model(build(bert), LoraConfig(r=2))
        randomize(model, 0.5)
        model.save_pretrained(tmp_path / name)
    config = XLoraConfig(
        adapters={n: str(tmp_path / n) for n in ("a", "b")}, task_type="SEQ_CLS", xlora_depth=1
    )
    model = get_peft_model(build(bert), config).eval()
    randomize(model, 0.5)
    expected = output(model)
    model.save_pretrained(tmp_path / "mix")
    torch.testing.assert_close(
        output(PeftModel.from_pretrained(build(bert), tmp_path / "mix")), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, r"adapters=\{\} must name the LoRAs to mix"),
        ({"adapters": {"0": "nowhere"}}, "there is no folder nowhere"),
        ({"hidden_size": 4096}, "hidden_size=4096, but the model's is 32"),
        ({"top_k_lora": 3}, "top_k_lora=3, but there are 2 adapters to mix"),
        ({"top_k_lora": 0}, "top_k_lora=0 must be a whole number from 1"),
        ({"softmax_temperature": 0.0}, "softmax_temperature=0.0 must be above 0"),
        ({"target_modules": ["q_proj"]}, "the LoRAs that are mixed say where"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_as_it_was(
    settings: dict[str, Any], reason: str, folders: dict[str, str]
) -> None:
    model = base()
    given = {"adapters": folders} if settings and "adapters" not in settings else {}
    with pytest.raises(UserError, match=reason):
        get_peft_model(model, XLoraConfig(**given | settings))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, inlay.core.inlaid.Inlaid) for m in model.modules())


def test_only_plain_loras_of_one_sequence_are_mixed(tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="has a Dora of an adapter to mix: XLORA mixes plain LoRAs"):
        model.add_adapter("mix", XLoraConfig(adapters={"default": ""}))
    model = get_peft_model(build(t5), LoraConfig(r=2))
    with pytest.raises(UserError, match="is no model of transformers with one sequence"):
        model.add_adapter("mix", XLoraConfig(adapters={"default": ""}))
    with pytest.raises(UserError, match="the model has no 'default': load it first"):
        inlay.model.roster.Roster(base()).add("mix", XLoraConfig(adapters={"default": ""}))
