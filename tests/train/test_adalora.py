"""AdaLoRA in training: the loop drives its ranks, and so may a loop of one's own, as with PEFT."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.core.errors import UserError
from inlay.train.events import Events, read_events
from inlay.train.loop import fit
from inlay.train.settings import TrainConfig
from tests.methods.bases import build, llama, output, randomize

# PEFT warns of its own files, and asks models for what transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "precision": "float32"}
SETTINGS: dict[str, Any] = {
    "init_r": 4,
    "target_r": 1,
    "tinit": 1,
    "tfinal": 2,
    "deltaT": 2,
    "lora_alpha": 64,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",  # without, PEFT goes past its own term of the loss
}
SITES, STEPS = 4, 9


def adalora(**settings):
    torch.manual_seed(0)
    return inlay.get_peft_model(build(llama), inlay.AdaLoraConfig(**{**SETTINGS, **settings}))


@pytest.fixture
def run(toy, tmp_path):
    def start(model, folder="run", resume=False, **config):
        at = tmp_path / folder
        settings = TrainConfig(**{**SMALL, "lr_scheduler": "constant", **config})
        arguments = (model, None, toy.objective, toy.rows(12), toy.rows(4, seed=9), settings, at)
        return fit(*arguments, Events(at), resume=resume)

    return start


def ranks_left(model):
    return [len(a.lora_E) for _, _, a in model.roster.adapters("default")]


def test_the_loop_brings_the_ranks_to_their_target_and_the_file_says_so(run, tmp_path):
    peft = pytest.importorskip("peft")
    model = adalora()
    outcome = run(model, max_steps=STEPS, learning_rate=1e-2)
    assert outcome.stopped == "done"
    assert sum(ranks_left(model)) == SITES * SETTINGS["target_r"]
    expected = output(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["total_step"] == STEPS
    left = {f"{path}.lora_E": len(a.lora_E) for path, _, a in model.roster.adapters("default")}
    assert {key: sum(mask) for key, mask in told["rank_pattern"].items()} == left
    for library in (inlay, peft):
        back = library.PeftModel.from_pretrained(build(llama), tmp_path / "adapter").eval()
        torch.testing.assert_close(output(back), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_run_is_the_same_run(run, stop):
    # total_step is given, since a run of other length has another schedule
    whole, cut, rest = (adalora(total_step=STEPS) for _ in range(3))
    run(whole, "whole", max_steps=STEPS, learning_rate=1e-2, early_stopping_patience=99)
    stopped = {"max_steps": STEPS, "save_steps": stop}
    with pytest.raises(KeyboardInterrupt):
        run(interrupted(cut, stop), "cut", learning_rate=1e-2, **stopped)
    run(rest, "cut", resume=True, learning_rate=1e-2, **stopped)
    assert ranks_left(rest) == ranks_left(whole)
    wanted, found = (inlay.get_peft_model_state_dict(m) for m in (whole, rest))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def interrupted(model, step):
    """Make the model raise, as if killed, in the step after `step`."""
    calls = []

    def count(*_):
        if model.training:
            calls.append(1)
        if len(calls) > 2 * step:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(count)
    return model


def test_the_penalty_is_in_the_gradient_once_however_a_step_is_cut(run):
    models = []
    for folder, cut in (("4x1", (4, 1)), ("1x4", (1, 4))):
        model = adalora(orth_reg_weight=5.0)
        size, times = cut
        run(model, folder, max_steps=4, micro_batch_size=size, gradient_accumulation_steps=times)
        models.append(inlay.get_peft_model_state_dict(model))
    for key in models[0]:
        torch.testing.assert_close(models[0][key], models[1][key], rtol=0, atol=1e-5)


def test_a_schedule_of_another_length_than_the_run_is_told(run, tmp_path):
    run(adalora(total_step=50), max_steps=4)
    events = read_events(tmp_path / "run" / "events.jsonl")
    told = [event["text"] for event in events if event["event"] == "notice"]
    assert told == ["total_step is 50, but this run has 4 steps: ranks are chosen by the former"]


def test_a_loop_of_ones_own_gives_what_pefts_gives(tmp_path):
    peft = pytest.importorskip("peft")
    settings = {**SETTINGS, "total_step": STEPS}
    theirs = peft.get_peft_model(build(llama), peft.AdaLoraConfig(**settings))
    randomize(theirs)
    ours = adalora(total_step=STEPS)
    inlay.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    ids = torch.arange(3, 23).reshape(2, 10)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (theirs, ours)]
    for step in range(1, STEPS + 1):
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
        if step == 4:  # a file written on the way leaves the training as it is
            ours.save_pretrained(tmp_path / "early")
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    wanted, found = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")
    )
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5, msg=key)
    assert sum(len(t) for key, t in found.items() if "lora_E" in key) == SITES
    assert ranks_left(ours) == [SETTINGS["init_r"]] * SITES
    again = inlay.PeftModel.from_pretrained(build(llama), tmp_path / "ours")
    torch.testing.assert_close(output(again), output(ours.eval()), rtol=0, atol=1e-5)


def test_under_transformers_trainer_a_callback_gives_what_it_gives_with_peft(tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **_):
            model.base_model.update_and_allocate(state.global_step + 1)

    rows = [
        {"input_ids": list(range(i, i + 6)), "labels": list(range(i, i + 6))} for i in range(18)
    ]
    settings = {**SETTINGS, "total_step": STEPS}
    theirs = peft.get_peft_model(build(llama), peft.AdaLoraConfig(**settings))
    randomize(theirs)
    ours = adalora(total_step=STEPS)
    inlay.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    files = []
    for model, who in ((theirs, "theirs"), (ours, "ours")):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            optim="sgd",
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[Allocate()]).train()
        model.save_pretrained(tmp_path / who)
        files.append(load_file(tmp_path / who / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    for key, wanted in files[0].items():
        torch.testing.assert_close(files[1][key], wanted, rtol=1e-4, atol=1e-5, msg=key)


def test_without_a_schedule_it_trains_with_the_penalty_alone():
    model = adalora(orth_reg_weight=0.5).train()
    ids = torch.arange(3, 23).reshape(2, 10)
    with_it = model(input_ids=ids, labels=ids).loss
    without = model.eval()(input_ids=ids, labels=ids).loss
    squares = [
        (square - torch.eye(len(square))).norm()
        for _, _, a in model.roster.adapters("default")
        for square in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)
    ]
    torch.testing.assert_close(with_it - without, 0.5 * torch.stack(squares).mean())
    with pytest.raises(UserError, match="needs total_step"):
        model.base_model.update_and_allocate(1)


def test_ranks_are_taken_from_those_that_an_earlier_training_left(run, tmp_path):
    first = adalora(target_r=2)
    run(first, "first", max_steps=STEPS, learning_rate=1e-2)
    first.save_pretrained(tmp_path / "first")
    config = first.peft_config["default"].replace(target_r=1, total_step=None)
    again = inlay.PeftModel.from_pretrained(
        build(llama), tmp_path / "first", is_trainable=True, config=config
    )
    run(again, "again", max_steps=STEPS, learning_rate=1e-2)
    assert sum(ranks_left(again)) == SITES
    expected = output(again.eval())
    again.save_pretrained(tmp_path / "again")
    back = inlay.PeftModel.from_pretrained(build(llama), tmp_path / "again")
    assert torch.equal(output(back), expected)
    masks = again.peft_config["default"].rank_pattern
    for key, mask in first.peft_config["default"].rank_pattern.items():
        assert len(masks[key]) == SETTINGS["init_r"]
        assert all(before or not after for before, after in zip(mask, masks[key], strict=True))


def test_a_new_adapter_of_the_name_of_an_old_one_has_ranks_of_its_own(tmp_path):
    model = adalora(total_step=STEPS, tinit=0)
    ids = torch.arange(3, 23).reshape(2, 10)
    for step in range(1, 8):
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(step)
    model.delete_adapter("default")
    model.add_adapter("default", inlay.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    inlay.PeftModel.from_pretrained(build(llama), tmp_path)


def test_it_is_refused_where_no_adalora_trains():
    model = inlay.get_peft_model(build(llama), inlay.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="is for an AdaLoRA in training"):
        model.base_model.update_and_allocate(1)
