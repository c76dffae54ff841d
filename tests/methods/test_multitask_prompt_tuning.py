"""Multitask prompt tuning: each row's own task, and starts from an adapter of many tasks."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay import MultitaskPromptTuningConfig, UserError, get_peft_model
from tests.methods.bases import build, llama, randomize, t5

IDS = torch.arange(3, 13).reshape(2, 5)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def made(make=llama, **settings):
    torch.manual_seed(0)
    config = MultitaskPromptTuningConfig(num_virtual_tokens=3, **settings)
    model = get_peft_model(build(make), config).eval()
    randomize(model)
    return model


def adapter(model):
    return model.roster.hosts[""].adapters["default"]


def test_each_rows_task_says_what_the_shared_tokens_are_multiplied_with():
    model, base = made(num_tasks=3, num_ranks=2), build(llama)
    own = adapter(model)
    tokens = own.prompt * (own.prefix_task_cols[[2, 0]] @ own.prefix_task_rows[[2, 0]])
    joined = torch.cat([tokens, model.get_input_embeddings()(IDS)], 1)
    got = model(IDS, task_ids=[2, 0]).logits
    torch.testing.assert_close(got, base(inputs_embeds=joined).logits)
    mask = torch.ones_like(IDS)
    both = model.generate(IDS, attention_mask=mask, task_ids=[2, 0], num_beams=2, **GREEDY)
    for row, task in enumerate((2, 0)):
        one = IDS[row : row + 1]
        alone = model.generate(
            one, attention_mask=torch.ones_like(one), task_ids=[task], num_beams=2, **GREEDY
        )
        assert both[row].tolist() == alone[0].tolist()
    with pytest.raises(UserError, match="num_tasks=3: say of each row which"):
        model(IDS)
    with pytest.raises(UserError, match="from 0 to 2"):
        model(IDS, task_ids=[3, 0])


def test_rows_of_two_adapters_have_tasks_of_their_own():
    model = made(num_tasks=3)
    model.add_adapter("one", MultitaskPromptTuningConfig(num_virtual_tokens=3))
    mixed = model(IDS, task_ids=[2, 0], adapter_names=["default", "one"]).logits
    for row, (name, task) in enumerate((("default", 2), ("one", 0))):
        alone = model(IDS, task_ids=[task] * 2, adapter_names=[name] * 2).logits
        torch.testing.assert_close(mixed[row], alone[row])


def test_it_starts_from_the_mean_one_task_or_the_shared_tokens_of_an_adapter(tmp_path):
    source = made(num_tasks=3, num_ranks=2)
    source.save_pretrained(tmp_path)
    theirs = adapter(source)
    for init, at in (
        ("AVERAGE_SOURCE_TASKS", slice(None)),
        ("EXACT_SOURCE_TASK", slice(1, 2)),
        ("ONLY_SOURCE_SHARED", None),
    ):
        config = MultitaskPromptTuningConfig(
            num_virtual_tokens=3,
            num_ranks=2,
            num_tasks=2,
            prompt_tuning_init=init,
            prompt_tuning_init_task=1,
            prompt_tuning_init_state_dict_path=str(tmp_path),
        )
        own = adapter(get_peft_model(build(llama), config))
        torch.testing.assert_close(own.prompt, theirs.prompt)
        if at is not None:
            meant = theirs.prefix_task_rows[at].mean(0, keepdim=True).expand(2, -1, -1)
            torch.testing.assert_close(own.prefix_task_rows.data, meant)


def test_an_encoder_decoder_has_them_before_its_encoder():
    model, base = made(t5), build(t5)
    own = adapter(model)
    tokens = (own.prompt * (own.prefix_task_cols @ own.prefix_task_rows)[0]).expand(2, -1, -1)
    joined = torch.cat([tokens, model.get_input_embeddings()(IDS)], 1)
    got = model(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(got, base(inputs_embeds=joined, decoder_input_ids=IDS).logits)
    with pytest.raises(UserError, match="num_transformer_submodules: 1"):
        made(t5, num_transformer_submodules=2)


def test_what_cannot_be_is_refused(tmp_path):
    made(num_ranks=2).save_pretrained(tmp_path / "two")
    inlay.get_peft_model(
        build(llama), inlay.PromptTuningConfig(num_virtual_tokens=3)
    ).save_pretrained(tmp_path / "other")
    (tmp_path / "pickle.bin").write_bytes(b"PK\x03\x04 not read")
    start = {"prompt_tuning_init": "EXACT_SOURCE_TASK"}
    for settings, said in (
        ({"prompt_tuning_init": "SAMPLE_VOCAB"}, "is not one of"),
        (start, "needs prompt_tuning_init_state_dict_path"),
        (start | {"at": "missing"}, "is no safetensors file"),
        (start | {"at": "pickle.bin"}, "a pickle is not opened"),
        (start | {"at": "other"}, "has no prefix_task_cols"),
        (start | {"at": "two"}, "num_ranks"),
        (start | {"at": "two", "num_ranks": 2, "prompt_tuning_init_task": 1}, "has 1 tasks"),
    ):
        given = dict(settings)
        if "at" in given:
            given["prompt_tuning_init_state_dict_path"] = str(tmp_path / given.pop("at"))
        with pytest.raises(UserError, match=said):
            made(**given)
