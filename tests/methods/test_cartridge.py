"""Cartridge: a cache in the place of a text, parts that do not train, and composition."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import (
    CartridgeConfig,
    LoraConfig,
    PrefixTuningConfig,
    UserError,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)
from tests.methods.bases import build, gpt2, llama, output

IDS = torch.arange(3, 13).reshape(2, 5)


def made(make=llama, count=3, **settings):
    torch.manual_seed(0)
    config = CartridgeConfig(num_virtual_tokens=count, **settings)
    return get_peft_model(build(make), config).eval()


def adapter(model):
    return model.roster.hosts[""].adapters["default"]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_it_starts_as_the_text_in_the_prompt(make):
    text = torch.tensor([[30, 31, 32, 33]])
    base = build(make)
    cache = base(text, use_cache=True).past_key_values
    meant = base(torch.cat([text.expand(2, -1), IDS], 1)).logits[:, 4:]
    for model in (
        made(make, 4),
        get_peft_model(build(make), PrefixTuningConfig(num_virtual_tokens=4)),
    ):
        initialize_kv_prefix_from_past_key_values(model.eval(), past_key_values=cache)
        torch.testing.assert_close(model(IDS).logits, meant)


def test_a_text_is_read_with_its_template_and_only_as_far_as_there_are_tokens():
    base, tokenizer = inlay.load_base()
    text = "the mail goes to billing, and what is left goes to sales"
    for templated in (False, True):
        config = CartridgeConfig(num_virtual_tokens=6)
        model = get_peft_model(inlay.load_base()[0], config).eval()
        initialize_kv_prefix_from_text(
            model, tokenizer, text=text, use_chat_template=templated, num_virtual_tokens=6
        )
        if templated:
            chat = [{"role": "system", "content": text}]
            ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(text)["input_ids"]
        rest = torch.tensor([tokenizer("a letter")["input_ids"]])
        whole = torch.cat([torch.tensor([ids[:6]]), rest], 1)
        meant = base(whole).logits[:, 6:]
        torch.testing.assert_close(model(rest).logits, meant, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="the text has 2 tokens, and num_virtual_tokens=6"):
        initialize_kv_prefix_from_text(
            model, tokenizer, text=text, use_chat_template=False, max_length=2
        )


def test_the_first_tokens_do_not_train():
    model = made(num_frozen_tokens=2).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [p.numel() for p in trained] == [64]
    before = adapter(model).prompt_embeddings.detach().clone()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    changed = (adapter(model).prompt_embeddings != before).any(1)
    assert changed.tolist() == [False, False, True]
    model.set_adapter("default")
    assert not adapter(model).frozen_embedding.requires_grad


@pytest.mark.filterwarnings("ignore")
def test_composed_cartridges_stand_one_after_the_other_as_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    folders = []
    for name, count in (("a", 3), ("b", 2)):
        model = made(count=count, task_type="CAUSAL_LM")
        folders.append(tmp_path / name)
        model.save_pretrained(folders[-1])
    compose_cartridge_adapters(folders, output_path=tmp_path / "ours")
    peft.compose_cartridge_adapters(folders, output_path=tmp_path / "theirs")
    ours, theirs = (
        inlay.PeftModel.from_pretrained(build(llama), tmp_path / name)
        for name in ("ours", "theirs")
    )
    assert ours.peft_config["default"].num_virtual_tokens == 5
    torch.testing.assert_close(output(ours), output(theirs), rtol=0, atol=0)
    back = peft.PeftModel.from_pretrained(build(llama), tmp_path / "ours").eval()
    torch.testing.assert_close(output(back), output(ours))
    with pytest.raises(UserError, match="two or more"):
        compose_cartridge_adapters(folders[:1], output_path=tmp_path / "one")
    made(gpt2, task_type="CAUSAL_LM").save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="of different models"):
        compose_cartridge_adapters([folders[0], tmp_path / "other"], output_path=tmp_path / "x")


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="num_frozen_tokens=4 is more than num_virtual_tokens=3"):
        made(num_frozen_tokens=4)
    model, cache = made(), build(llama)(IDS[:1, :2], use_cache=True).past_key_values
    with pytest.raises(UserError, match="one row of 3 tokens or more"):
        initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    other = build(gpt2)(IDS[:1], use_cache=True).past_key_values
    with pytest.raises(UserError, match="the cache is of another model"):
        initialize_kv_prefix_from_past_key_values(model, past_key_values=other)
    with pytest.raises(UserError, match="num_virtual_tokens=2, but 'default' has 3"):
        initialize_kv_prefix_from_past_key_values(
            model, past_key_values=other, num_virtual_tokens=2
        )
    lora = get_peft_model(build(llama), LoraConfig())
    with pytest.raises(UserError, match="only PREFIX_TUNING and CARTRIDGE"):
        initialize_kv_prefix_from_past_key_values(lora, past_key_values=cache)
    made_by_network = PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True)
    network = get_peft_model(build(llama), made_by_network)
    with pytest.raises(UserError, match="leave prefix_projection out"):
        initialize_kv_prefix_from_past_key_values(network, past_key_values=cache)
