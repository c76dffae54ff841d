"""The loop: what it steps on, writes and stops for, and that a resumed run is the same run."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from inlay.core.errors import UserError
from inlay.train.events import Events, read_events
from inlay.train.loop import fit
from inlay.train.settings import TrainConfig
from inlay.train.step import NonFiniteError

SMALL = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "precision": "float32"}


@pytest.fixture
def run(toy, tmp_path):
    def start(folder="run", model=None, rows=10, eval=0, resume=False, listeners=(), **config):
        model = model or toy.model(config.pop("dropout", 0.0))
        rows = toy.rows(rows) if isinstance(rows, int) else rows
        at = tmp_path / folder
        events = Events(at, listeners)
        settings = TrainConfig(**{**SMALL, **config})
        held_out = toy.rows(eval, seed=9)
        return model, fit(
            model, None, toy.objective, rows, held_out, settings, at, events, resume=resume
        )

    return start


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(one, other):
    torch.testing.assert_close(trained(one), trained(other), rtol=0, atol=0)


def events_of(folder, kind):
    return [e for e in read_events(folder / "events.jsonl") if e["event"] == kind]


def test_frozen_parameters_do_not_move_and_trained_ones_do(run, toy):
    model, outcome = run(num_epochs=2)
    fresh = dict(toy.model().named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh[name]) == (not parameter.requires_grad), name
    assert outcome.stopped == "done"


def test_the_last_step_of_an_epoch_takes_the_rows_that_are_left(run, tmp_path):
    _, outcome = run(rows=10, num_epochs=2)
    assert outcome.total_steps == 2 * 3
    tokens = [e["tokens"] for e in events_of(tmp_path / "run", "step")]
    assert sum(tokens[:3]) == sum(tokens[3:]) == outcome.tokens / 2


@pytest.mark.parametrize("rows", [16, 13])
def test_the_cut_into_micro_batches_does_not_change_the_weights(run, rows):
    models = [
        run(f"{size}x{times}", rows=rows, max_steps=20, weight_decay=0.1, **cut)[0]
        for size, times in ((8, 1), (1, 8), (2, 4))
        for cut in [{"micro_batch_size": size, "gradient_accumulation_steps": times}]
    ]
    for other in models[1:]:
        torch.testing.assert_close(trained(models[0]), trained(other), rtol=0, atol=1e-6)


def test_a_micro_batch_that_trains_nothing_changes_nothing(run, toy):
    rows = toy.rows(3)
    masked = toy.Row([1] * 30, [-100] * 30, "toy.jsonl:99")
    cut = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
    with_it, _ = run("with", rows=[*rows, masked], **cut)
    without, _ = run("without", rows=rows, **cut)
    torch.testing.assert_close(trained(with_it), trained(without), rtol=0, atol=1e-7)


def test_a_step_that_trains_nothing_has_loss_zero_and_no_gradient(run, toy):
    masked = [toy.Row([1, 2, 3], [-100] * 3, f"toy.jsonl:{i}") for i in range(4)]
    model, outcome = run(rows=masked)
    assert outcome.train_loss == 0.0
    assert_same(model, toy.model())


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens(run, toy, tmp_path):
    rows = toy.rows(4)
    run(rows=rows, max_steps=1)
    model, losses = toy.model(), []
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row.labels[1:]), reduction="none"
        )
        losses += each[torch.tensor(row.labels[1:]) != -100].tolist()
    first = events_of(tmp_path / "run", "step")[0]
    assert first["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert first["trained_tokens"] == len(losses)


def test_logging_every_third_step_gives_the_mean_of_three(run, tmp_path):
    run("each", max_steps=7)
    run("third", max_steps=7, logging_steps=3)
    each = [e["loss"] for e in events_of(tmp_path / "each", "step")]
    third = [(e["step"], e["loss"]) for e in events_of(tmp_path / "third", "step")]
    means = [sum(each[:3]) / 3, sum(each[3:6]) / 3, each[6]]
    assert third == [(s, pytest.approx(m)) for s, m in zip((3, 6, 7), means, strict=True)]


@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(run, tmp_path, at):
    settings = {"dropout": 0.3, "eval": 5, "eval_steps": 2, "max_steps": 9, "save_steps": 3}
    settings["logging_steps"] = 2
    whole, _ = run("whole", **settings)

    def stop(event):
        if event["event"] == "step" and event["step"] >= at:
            os.kill(os.getpid(), signal.SIGTERM)

    _, first = run("cut", listeners=[stop], **settings)
    assert first.stopped == "sigterm"
    assert at <= first.step < 9
    resumed, second = run("cut", resume=True, **settings)
    assert second.stopped == "done"
    assert_same(whole, resumed)
    for kind in ("step", "eval"):
        assert [(e["step"], e["loss"]) for e in events_of(tmp_path / "cut", kind)] == [
            (e["step"], e["loss"]) for e in events_of(tmp_path / "whole", kind)
        ]


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    done, first = run(eval=3, num_epochs=1)
    again, second = run(eval=3, num_epochs=1, resume=True)
    assert_same(done, again)
    assert (second.step, second.eval_loss) == (first.step, first.eval_loss)
    assert len(events_of(tmp_path / "run", "end")) == 1


def test_resume_where_there_is_no_checkpoint_starts(run):
    fresh, _ = run("a", max_steps=2)
    resumed, _ = run("b", max_steps=2, resume=True)
    assert_same(fresh, resumed)


def test_resume_skips_a_damaged_checkpoint_with_a_notice(run, tmp_path):
    whole, _ = run("whole", max_steps=6)
    run("cut", max_steps=6, save_steps=2, save_total_limit=9)
    tensors = tmp_path / "cut/checkpoints/step-6/tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    resumed, _ = run("cut", max_steps=6, save_steps=2, save_total_limit=9, resume=True)
    assert_same(whole, resumed)
    [notice] = events_of(tmp_path / "cut", "notice")
    assert "step-6" in notice["text"]
    assert len(events_of(tmp_path / "cut", "step")) == 6


def test_resume_with_other_settings_or_rows_says_what_differs(run):
    run(max_steps=2)
    with pytest.raises(UserError, match=r"learning_rate was 0.0002, now 0.1"):
        run(max_steps=2, resume=True, learning_rate=0.1)
    with pytest.raises(UserError, match="training rows are not the same"):
        run(max_steps=2, resume=True, rows=9)


def test_resume_may_train_longer(run):
    run(max_steps=2)
    _, outcome = run(max_steps=4, resume=True)
    assert (outcome.step, outcome.stopped) == (4, "done")


def test_a_folder_with_a_run_is_refused_and_left_as_it_is(run, tmp_path):
    run(max_steps=1)
    before = (tmp_path / "run/events.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        run(max_steps=1)
    assert (tmp_path / "run/events.jsonl").read_bytes() == before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_weights_and_names_the_row(
    run, toy, tmp_path, where
):
    class Poisoned(type(toy.objective)):
        def loss(self, policy, batch, norm):
            share = super().loss(policy, batch, norm)
            if "toy.jsonl:6" in batch.rows:
                # sqrt at 0: the value is finite, its slope is not
                broken = float("nan") if where == "loss" else (share - share.detach()).sqrt()
                share = share + broken
            return share

    toy.objective = Poisoned()
    before = {}

    def remember(event):
        if event["event"] == "step":
            before.update(trained(model))

    model = toy.model()
    with pytest.raises(NonFiniteError, match=r"toy\.jsonl:6;") as caught:
        run(model=model, rows=10, num_epochs=1, listeners=[remember])
    assert caught.value.rows == ("toy.jsonl:6",)
    torch.testing.assert_close(trained(model), before or trained(toy.model()), rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    [line] = events_of(tmp_path / "run", "nonfinite")
    assert line["rows"] == ["toy.jsonl:6"]


def test_early_stopping_ends_the_run_and_the_best_weights_come_back(run, tmp_path):
    settings = {"eval": 4, "eval_steps": 1, "max_steps": 50, "learning_rate": 0.5}
    settings |= {"lr_scheduler": "constant", "early_stopping_patience": 3, "restore_best": True}
    settings |= {"save_total_limit": 1, "warmup_ratio": 0}
    model, outcome = run(**settings)
    assert outcome.stopped == "early"
    assert outcome.step == outcome.best_step + 3
    losses = {e["step"]: e["loss"] for e in events_of(tmp_path / "run", "eval")}
    assert outcome.best_eval_loss == min(losses.values()) == losses[outcome.best_step]
    only, _ = run("only", **{**settings, "max_steps": outcome.best_step})
    assert_same(model, only)
    again, second = run(resume=True, **settings)
    assert second.stopped == "early"
    assert_same(model, again)


def test_early_stopping_without_rows_to_evaluate_is_refused(run):
    with pytest.raises(UserError, match="eval_fraction"):
        run(early_stopping_patience=1)


def test_no_rows_and_nothing_to_train_are_refused(run, toy):
    with pytest.raises(UserError, match="no training rows"):
        run(rows=[])
    with pytest.raises(UserError, match="requires a gradient"):
        run(model=toy.model().requires_grad_(False))


def test_the_callers_random_state_mode_and_signal_handlers_are_put_back(run, toy):
    torch.manual_seed(5)
    before = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)
    model, _ = run(model=toy.model(0.5).eval())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert signal.getsignal(signal.SIGTERM) is before[1]
    assert not model.training


def test_it_trains_outside_the_main_thread(run):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(max_steps=1)[1].stopped))
    thread.start()
    thread.join()
    assert found == ["done"]


def test_a_full_disk_is_one_clear_error_and_leaves_no_part_of_a_checkpoint(
    run, tmp_path, monkeypatch
):
    import safetensors.torch

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="no space left"):
        run(max_steps=1)
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_the_run_folder_has_a_plot(run, tmp_path):
    run(max_steps=3, eval=2)
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_activations_computed_again_give_the_same_weights(run, toy):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(type(toy.model())):
        kwargs = None

        def gradient_checkpointing_enable(self, kwargs):
            self.kwargs = kwargs

        def gradient_checkpointing_disable(self):
            self.kwargs = None

        def forward(self, input_ids, use_cache=True):
            if self.kwargs is None:
                return super().forward(input_ids)
            return checkpoint(super().forward, input_ids, **self.kwargs)

    plain, _ = run("plain", dropout=0.4, max_steps=3)
    model = Checkpointed(0.4)
    model.load_state_dict(toy.model().state_dict())
    run("again", model=model, max_steps=3, gradient_checkpointing=True)
    assert_same(plain, model)
    assert model.kwargs is None
    with pytest.raises(UserError, match="cannot checkpoint"):
        run("not", gradient_checkpointing=True)


def test_packing_over_layers_that_carry_a_state_is_refused(run, toy):
    model = toy.model()
    model.config = type("Config", (), {"model_type": "mamba"})()
    with pytest.raises(UserError, match="packing"):
        run(model=model, packing=True)
