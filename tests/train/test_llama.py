"""Runs of a real, tiny Llama through `fit`: what holds of a step holds of twenty."""

from __future__ import annotations

import resource

import pytest
import torch

from inlay.core.errors import UserError
from inlay.data.encode import Example
from inlay.data.rows import Source
from inlay.objectives.pretrain import Pretrain
from inlay.objectives.sft import Sft
from inlay.train.events import Events, read_events
from inlay.train.loop import fit
from inlay.train.settings import TrainConfig


def uneven_rows(count=24):
    """Rows of 3 to 20 tokens of which 0 to all are trained; every sixth is masked whole."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        length = int(torch.randint(3, 21, (), generator=generator))
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        masked = int(torch.randint(0, length, (), generator=generator)) if i % 6 else length
        labels = [-100] * masked + ids[masked:]
        weights = [0.5] * length if i % 5 == 1 else None
        rows.append(Example(ids, labels, f"{i}", Source("rows.jsonl", i + 1), weights))
    return rows


@pytest.fixture
def run(tiny_llama, tiny_tokenizer, tmp_path):
    """Return `run(name, resume=False, listeners=(), **settings)` -> weights, outcome."""

    def start(name, *, resume=False, listeners=(), **settings):
        model = tiny_llama(attention_dropout=0.1, attn_implementation="eager")
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("self_attn" in key or "norm" in key)
        given = {"max_steps": 6, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
        given |= {"precision": "float32", "learning_rate": 2e-3, "weight_decay": 0.1}
        config = TrainConfig(**{**given, **settings})
        folder, rows = tmp_path / name, uneven_rows()
        events = Events(folder, listeners)
        outcome = fit(
            model, tiny_tokenizer, Sft(), rows[4:], rows[:4], config, folder, events, resume=resume
        )
        return dict(model.named_parameters()), outcome

    return start


@pytest.mark.parametrize("objective", [Sft, Pretrain])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_eight_micro_batches_of_one_are_one_of_eight_after_twenty_steps(
    tiny_llama, tiny_tokenizer, tmp_path, objective, packing
):
    found = []
    for size, times in ((8, 1), (1, 8), (4, 2)):
        model = tiny_llama()
        config = TrainConfig(
            max_steps=20,
            micro_batch_size=size,
            gradient_accumulation_steps=times,
            packing=packing,
            learning_rate=1e-3,
            weight_decay=0.1,
            max_grad_norm=0.5,
            precision="float32",
        )
        folder = tmp_path / f"{size}x{times}"
        made = objective(packing=packing)
        rows, events = uneven_rows(), Events(folder)
        fit(model, tiny_tokenizer, made, rows, [], config, folder, events)
        found.append({n: p.detach() for n, p in model.named_parameters()})
    start = {n: p.detach() for n, p in tiny_llama().named_parameters()}
    moved = max(float((found[0][name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3, "nothing was learned, so nothing was compared"
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=1e-6)


def test_a_disk_that_fills_up_at_a_checkpoint_leaves_a_run_that_resumes_to_the_same_bits(
    run, tmp_path
):
    whole, _ = run("whole", save_steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event):
        if event["event"] == "step" and event["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    try:
        with pytest.raises(UserError, match=r"no space left .*step-4"):
            run("cut", listeners=[fill], save_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(path.name for path in (tmp_path / "cut/checkpoints").iterdir())
    assert left == ["step-2"]
    resumed, outcome = run("cut", resume=True, save_steps=2)
    assert outcome.stopped == "done"
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [truncate, flip, remove])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_harmed_newest_checkpoint_is_told_and_the_run_goes_on_from_the_one_before(
    run, tmp_path, harm, name
):
    whole, _ = run("whole")
    run("cut", save_steps=2)
    harm(tmp_path / "cut/checkpoints/step-6" / name)
    resumed, _ = run("cut", resume=True, save_steps=2)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    events = read_events(tmp_path / "cut/events.jsonl")
    [notice] = [event for event in events if event["event"] == "notice"]
    assert "step-6" in notice["text"]
    [resume] = [event for event in events if event["event"] == "resume"]
    assert resume["step"] == 4
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_where_no_checkpoint_verifies_the_run_begins_anew_and_says_so(run, tmp_path):
    whole, _ = run("whole")
    run("cut")
    flip(tmp_path / "cut/checkpoints/step-6/tensors.safetensors")
    again, _ = run("cut", resume=True)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    events = read_events(tmp_path / "cut/events.jsonl")
    assert [event["event"] for event in events][:2] == ["start", "notice"]


def test_in_bfloat16_the_weights_stay_float32_and_the_losses_are_near(run, tmp_path):
    weights, _ = run("half", precision="bfloat16", max_steps=12)
    run("full", max_steps=12)
    assert all(parameter.dtype == torch.float32 for parameter in weights.values())
    losses = [
        [e["loss"] for e in read_events(tmp_path / name / "events.jsonl") if e["event"] == "step"]
        for name in ("half", "full")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0] != losses[1]
    start = next(e for e in read_events(tmp_path / "half/events.jsonl") if e["event"] == "start")
    assert start["precision"] == "bfloat16"


def test_another_seed_is_another_run_and_the_same_one_the_same(run):
    one, _ = run("one", seed=1)
    same, _ = run("same", seed=1)
    other, _ = run("other", seed=2)
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert any(not torch.equal(one[name], other[name]) for name in one)
