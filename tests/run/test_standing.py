"""Starting in a folder that holds a run: it goes on, is shown, or is refused; never mixed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import inlay
from inlay.core.errors import UserError
from inlay.run import training
from inlay.run.standing import is_held, only_one


class Killed(BaseException):
    """Stands for SIGKILL within this process."""


def adapter(run):
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def interrupted(monkeypatch, start, where):
    """Start a run that dies when it comes to `where`, a method of the job."""

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training._Job, where, die)
        with pytest.raises(Killed):
            start()


@pytest.mark.parametrize("where", ["measure_base", "fit", "save", "measure_trained"])
def test_a_run_that_died_anywhere_goes_on_and_ends_with_the_same_bits(start, monkeypatch, where):
    whole, _ = start(output_dir="whole")
    interrupted(monkeypatch, start, where)
    run, told = start()
    assert "going on with the run in run" in told.texts()
    assert run.is_finished
    assert adapter(run) == adapter(whole)
    assert run.evaluation == whole.evaluation
    assert [e["step"] for e in run.events() if e["event"] == "step"] == [1, 2, 3, 4]


def test_what_was_measured_before_is_not_measured_again(start, monkeypatch):
    interrupted(monkeypatch, start, "save")
    seen = []
    measure = training.measure_answers
    monkeypatch.setattr(training, "measure_answers", lambda *a: seen.append(1) or measure(*a))
    start()
    assert len(seen) == 1


def test_a_finished_run_is_shown_again_and_says_how_to_start_anew(start):
    first, _ = start()
    written = (first.folder / "events.jsonl").read_bytes()
    again, told = start()
    assert "--overwrite" in told.texts()
    assert told.events[-1]["event"] == "result"
    assert (again.folder / "events.jsonl").read_bytes() == written


def test_other_settings_are_refused_by_name_with_the_way_out(start):
    start()
    with pytest.raises(UserError, match=r"adapter.r was 2, now 3.*output_dir.*--overwrite"):
        start(adapter={"r": 3})


def test_settings_that_change_no_result_may_change(start):
    start()
    _, told = start(train={"save_steps": 3}, evaluate={"shown": 1})
    assert told.events[-1]["event"] == "result"


def test_a_run_goes_on_wherever_the_moments_lie(start, monkeypatch):
    whole, _ = start(output_dir="whole")
    interrupted(monkeypatch, start, "save")
    run, told = start(train={"optimizer": "paged_adamw"})
    assert "going on with the run in run" in told.texts()
    assert adapter(run) == adapter(whole)
    with pytest.raises(UserError, match=r"train\.optimizer was 'paged_adamw', now 'adamw_8bit'"):
        start(train={"optimizer": "adamw_8bit"})


def test_overwrite_starts_anew_and_leaves_other_files_alone(start):
    run, _ = start()
    (run.folder / "notes.txt").write_text("mine")
    run, _ = start(overwrite=True, adapter={"r": 3})
    assert run.config.adapter.r == 3
    assert [e["step"] for e in run.events() if e["event"] == "step"] == [1, 2, 3, 4]
    assert (run.folder / "notes.txt").read_text() == "mine"


def test_the_config_of_a_run_is_its_recipe(start):
    first, _ = start()
    again = inlay.train(first.folder / "config.yaml")
    assert again.folder.resolve() == first.folder.resolve()


def test_a_folder_with_things_of_unknown_origin_is_refused(start, chats):
    (chats.parent / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds adapter but no config\.yaml"):
        start()


def test_a_run_whose_settings_cannot_be_read_is_refused(start):
    run, _ = start()
    (run.folder / "config.yaml").write_text("nonsense: 1\n")
    with pytest.raises(UserError, match=r"cannot be read.*--overwrite"):
        start()


def test_two_processes_cannot_train_in_one_folder(start, chats):
    (chats.parent / "run").mkdir()
    with only_one(chats.parent / "run"), pytest.raises(UserError, match="another process"):
        start()


def test_changed_rows_are_refused_on_resume(start, chats, monkeypatch):
    interrupted(monkeypatch, start, "save")
    chats.write_text("".join(chats.read_text().splitlines(keepends=True)[:-4]))
    with pytest.raises(UserError, match="training rows are not the same"):
        start()


def test_changed_rows_are_refused_where_the_run_has_ended(start, chats):
    start()
    chats.write_text("".join(chats.read_text().splitlines(keepends=True)[:-4]))
    with pytest.raises(UserError, match=r"chats\.jsonl changed since the run.*--overwrite"):
        start()
    start(overwrite=True)


def test_the_base_is_measured_again_on_changed_rows(start, chats, monkeypatch):
    interrupted(monkeypatch, start, "fit")
    before = json.loads(Path("run/evaluation.json").read_text())
    lines = chats.read_text().splitlines(keepends=True)
    chats.write_text("".join(line.replace("Where is", "Who has") for line in lines))
    run, _ = start()
    assert run.evaluation["base"]["loss"] != before["base"]["loss"]


def test_a_start_that_fails_leaves_the_earlier_run_whole(start, chats):
    run, _ = start()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    chats.write_text(chats.read_text().replace('"content": "In', '"train": false, "content": "In'))
    with pytest.raises(UserError, match="no turn is trained"):
        start(overwrite=True)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_the_folder_is_held_before_anything_is_written_there(start, chats):
    run, _ = start()
    ledger = (run.folder / "ledger.jsonl").read_bytes()
    with only_one(run.folder):
        assert is_held(run.folder)
        with pytest.raises(UserError, match="another process"):
            start(overwrite=True, data={"limit": 8})
    assert not is_held(run.folder)
    assert (run.folder / "ledger.jsonl").read_bytes() == ledger


def test_nothing_is_left_where_a_start_fails(start, chats):
    with pytest.raises(UserError, match=r"no module of this model"):
        start(adapter={"target_modules": ["nope"]}, output_dir="a/b/c")
    assert not (chats.parent / "a").exists()


def test_what_a_killed_writer_left_is_cleaned_up(start, chats):
    run = chats.parent / "run"
    run.mkdir()
    (run / ".adapter.999999.partial").mkdir()
    start()
    assert [name for name in os.listdir(run) if name.startswith(".")] == []
