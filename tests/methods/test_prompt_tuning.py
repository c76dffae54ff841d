"""Prompt tuning: positions, masks, labels, generation and training, beside plain torch and PEFT."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    UserError,
    get_peft_model,
)
from tests.methods.bases import SMALL, bert, build, gpt2, llama, output, randomize, t5

IDS = torch.arange(3, 13).reshape(2, 5)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def made(make, **settings):
    torch.manual_seed(0)
    return get_peft_model(build(make), PromptTuningConfig(num_virtual_tokens=3, **settings)).eval()


def joined(model, ids):
    prompt = model.roster.hosts[""].adapters["default"].virtual()
    return torch.cat([prompt.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], 1)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_tokens_come_before_the_embeddings_and_no_label_is_theirs(make):
    model, base = made(make), build(make)
    mask = torch.ones_like(IDS)
    got = model(IDS, attention_mask=mask, labels=IDS)
    meant = base(inputs_embeds=joined(model, IDS))
    torch.testing.assert_close(got.logits, meant.logits)
    scores = meant.logits[:, 3:-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(scores, IDS[:, 1:].flatten())
    # the last virtual token also foretells the first real one
    first = torch.nn.functional.cross_entropy(meant.logits[:, 2], IDS[:, 0])
    torch.testing.assert_close(got.loss, (loss * 8 + first * 2) / 10)


def test_positions_are_counted_on_and_packed_rows_are_refused():
    model = made(gpt2)
    places = torch.arange(5).expand(2, -1)
    torch.testing.assert_close(model(IDS, position_ids=places).logits, model(IDS).logits)
    with pytest.raises(UserError, match="packing: false"):
        model(IDS, position_ids=torch.tensor([[0, 1, 2, 0, 1]]).expand(2, -1))


def test_generation_is_that_of_the_joined_embeddings_in_an_encoder_decoder_too():
    for make in (llama, gpt2, t5):
        model, base = made(make), build(make)
        start = {"decoder_start_token_id": 0} if make is t5 else {}
        mask = torch.ones_like(IDS)
        got = model.generate(input_ids=IDS, attention_mask=mask, **start, **GREEDY)
        wide = torch.ones(2, 8, dtype=torch.long)
        meant = base.generate(
            inputs_embeds=joined(model, IDS), attention_mask=wide, **start, **GREEDY
        )
        assert got[:, -6:].tolist() == meant[:, -6:].tolist()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_rows_of_other_prompts_prefixes_methods_and_the_base_compute_what_they_do_alone(make):
    model = made(make)
    model.add_adapter("longer", PromptTuningConfig(num_virtual_tokens=4))
    model.add_adapter("computed", PromptEncoderConfig(num_virtual_tokens=2))
    model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=5))
    model.add_adapter("lora", LoraConfig(r=2))
    model.set_adapter("lora")
    randomize(model)
    model.double().eval()
    names = ["longer", "__base__", "default", "lora", "prefix", "computed"]
    ids = torch.arange(3, 33).reshape(6, 5)
    mask = torch.ones_like(ids)
    mask[1:3, :2] = 0
    mixed = model(ids, attention_mask=mask, labels=ids, adapter_names=names).logits[:, -5:]
    unmasked = model(ids, adapter_names=names).logits[:, -5:]
    told = model.generate(ids, attention_mask=mask, adapter_names=names, num_beams=2, **GREEDY)
    for row, name in enumerate(names):
        one, seen = ids[row : row + 1], mask[row : row + 1]
        alone = model(one, attention_mask=seen, adapter_names=[name]).logits[0, -5:]
        start = int(5 - seen.sum())
        torch.testing.assert_close(mixed[row, start:], alone[start:])
        alone = model(one, adapter_names=[name]).logits[0, -5:]
        torch.testing.assert_close(unmasked[row], alone)
        given = {"attention_mask": seen, "adapter_names": [name], "num_beams": 2, **GREEDY}
        assert told[row].tolist() == model.generate(one, **given)[0].tolist(), name


def test_a_model_that_reads_both_ways_or_has_an_encoder_takes_prompts_of_one_length_alone():
    for make, more in ((bert, {}), (t5, {"decoder_input_ids": IDS})):
        model = made(make)
        model.add_adapter("b", PromptTuningConfig(num_virtual_tokens=3))
        model.add_adapter("longer", PromptTuningConfig(num_virtual_tokens=4))
        mixed = model(input_ids=IDS, adapter_names=["b", "default"], **more).logits
        for row, name in enumerate(["b", "default"]):
            alone = model(input_ids=IDS, adapter_names=[name] * 2, **more).logits
            torch.testing.assert_close(mixed[row], alone[row])
        for names in (["b", "longer"], ["b", "__base__"]):
            with pytest.raises(UserError, match="virtual tokens of the same number"):
                model(input_ids=IDS, adapter_names=names, **more)


def test_it_starts_from_the_embeddings_of_a_text(tmp_path):
    base, tokenizer = inlay.load_base()
    tokenizer.save_pretrained(tmp_path)
    config = PromptTuningConfig(
        num_virtual_tokens=7,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="route the mail",
        tokenizer_name_or_path=str(tmp_path),
    )
    ids = (tokenizer("route the mail")["input_ids"] * 7)[:7]
    model = get_peft_model(base, config)
    prompt = model.roster.hosts[""].adapters["default"].prompt
    torch.testing.assert_close(prompt, base.get_input_embeddings().weight[ids], rtol=0, atol=0)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.virtual_tokens.adapters.default.prompt"
    ]


def test_deleting_it_leaves_the_model_as_it_was():
    base = build(llama)
    plain, names = output(base), list(base.state_dict())
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2))
    assert not torch.allclose(output(model)[:, 2:], plain)
    with model.disable_adapter():
        torch.testing.assert_close(output(model), plain, rtol=0, atol=0)
    model.delete_adapter("default")
    torch.testing.assert_close(output(model), plain, rtol=0, atol=0)
    assert list(base.state_dict()) == names


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"prompt_tuning_init": "WORDS"}, "not one of"),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text"),
        ({"tokenizer_kwargs": {"a": 1}}, "TEXT"),
        ({"target_modules": ["q_proj"]}, "at no layer"),
        ({"token_dim": 5}, "width of the model's embeddings"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        get_peft_model(build(llama), PromptTuningConfig(**settings))


def test_the_trainer_trains_it(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the mail goes to billing"}\n' * 8)
    adapter = {"method": "prompt_tuning", "num_virtual_tokens": 4}
    run = inlay.train(
        {
            "adapter": adapter,
            "data": {"path": str(rows)},
            "objective": "pretrain",
            "train": {"max_steps": 6, "learning_rate": 0.1, "micro_batch_size": 4},
            "output_dir": str(tmp_path / "run"),
        }
    )
    assert run is not None
    found = inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")
    assert list(found.peft_config) == ["default"]
    assert found.peft_config["default"].num_virtual_tokens == 4


@pytest.mark.parametrize("make", ["Llama", "GPT2"])
def test_a_decoder_that_classifies_reads_the_last_real_token_of_padded_rows(make):
    import transformers

    gpt2_sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    sizes = SMALL if make == "Llama" else gpt2_sizes
    config = getattr(transformers, f"{make}Config")(**sizes, num_labels=3, pad_token_id=0)
    base = build(lambda: getattr(transformers, f"{make}ForSequenceClassification")(config))
    model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"))
    model.eval()
    rows = [[5, 9, 12, 7, 31], [4, 8], [3, 3, 3]]
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    ids = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    found = model(input_ids=ids, attention_mask=(ids > 0).long()).logits
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
