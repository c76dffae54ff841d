"""`inlay compare`: each method trained alike from one base, and a report of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from inlay.config.recipe import read_recipe
from inlay.run import training
from inlay.run.compare import Options, compare
from inlay.run.compare_view import Terminal
from inlay.run.standing import only_one

RECIPE = """
data: {path: chats.jsonl, eval_fraction: 0.25}
adapter: {method: lora, r: 2}
train: {max_steps: 2, micro_batch_size: 2, learning_rate: 0.01, precision: float32}
evaluate: {answers: 0}
output_dir: runs/shop
"""


@pytest.fixture
def recipe(place):
    Path("recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


def report(folder):
    return json.loads(Path(folder, "report.json").read_text())


def test_each_method_is_trained_and_the_report_holds_all(inlay, recipe):
    code, out, errors = inlay("compare", recipe, "--methods", "lora,ia3,full")
    assert code == 0, errors
    assert [name for name in ("lora", "ia3", "full") if f" {name} " not in out] == []
    found = report("runs/shop-compare")
    assert [line["name"] for line in found["best"]] == ["lora", "ia3", "full"]
    assert found["total"] == found["best"][2]["trainable"]
    rates = {line["name"]: line["rate"] for line in found["best"]}
    assert rates == {"lora": 0.01, "ia3": 0.15, "full": 0.001}
    for result in found["results"]:
        assert result["steps"] == 2
        assert result["scores"]["loss"] < result["base"]["loss"]
        assert result["memory_mb"] is not None
        assert not Path(result["folder"], "checkpoints").exists()
    names = {path.name for path in Path("runs/shop-compare").iterdir() if path.is_file()}
    plots = {f"quality-{name}.png" for name in ("parameters", "memory", "time")}
    assert names == {"report.json", "report.md", "report.html", *plots}
    page = Path("runs/shop-compare/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "<td>ia3</td>" in page
    assert "| lora | 0.01 |" in Path("runs/shop-compare/report.md").read_text()


def test_what_is_done_is_not_done_again_and_a_new_method_is_added(inlay, recipe, monkeypatch):
    assert inlay("compare", recipe, "--methods", "lora,ia3")[0] == 0
    before = report("runs/shop-compare")
    fitted = []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *a, **k: fitted.append(1) or fit(*a, **k))
    assert inlay("compare", recipe, "--methods", "lora,ia3,ln_tuning")[0] == 0
    after = report("runs/shop-compare")
    assert len(fitted) == 1
    assert after["results"][:2] == before["results"]
    code, _, errors = inlay("compare", recipe, "--methods", "lora,ia3", "--adapter.r", "4")
    assert code == 2
    assert "adapter.r was 2, now 4" in errors


def test_a_run_is_the_one_that_training_alone_gives_whatever_ran_before(inlay, recipe):
    """Also after full fine-tuning, so the base is the same to the bit each time."""
    assert inlay("compare", recipe, "--methods", "full,lora,dora")[0] == 0
    words = ["--train.learning_rate", "0.01", "--output_dir", "alone"]
    for name, more in {"lora": [], "dora": ["--adapter.use_dora", "true"]}.items():
        assert inlay("train", recipe, *words, *more, "--overwrite")[0] == 0
        paths = (f"runs/shop-compare/{name}-lr1e-2-seed42", "alone")
        one, other = (Path(p, "adapter/adapter_model.safetensors").read_bytes() for p in paths)
        assert one == other


def test_the_best_rate_is_taken_for_the_other_seeds_and_measured_on_the_test(inlay, recipe):
    words = ["--learning_rates", "x1,x0.001", "--seeds", "1,2", "--test", "chats.jsonl"]
    code, out, errors = inlay("compare", recipe, "--methods", "lora,ln_tuning", *words, "--json")
    assert code == 0, errors
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0] == {"event": "begin", "runs": 6}
    assert [event["event"] for event in events].count("done") == 6
    assert events[-1]["event"] == "result"
    found = report("runs/shop-compare")
    lora = found["best"][0]
    assert (lora["rate"], lora["seeds"], sorted(lora["tried"])) == (0.01, 2, ["0.01", "1e-05"])
    tested = [r["test"]["loss"] for r in found["results"] if r["name"] == "lora" and r["test"]]
    assert lora["scores"]["loss"] == pytest.approx(sum(tested) / 2)
    assert len(tested) == 2
    assert [r["seed"] for r in found["results"] if r["name"] == "lora"] == [1, 1, 2]


def test_a_budget_of_seconds_gives_each_its_steps(inlay, recipe):
    code, _, errors = inlay("compare", recipe, "--methods", "lora,ln_tuning", "--seconds", "0.5")
    assert code == 0, errors
    steps = [result["steps"] for result in report("runs/shop-compare")["results"]]
    assert all(count >= 1 for count in steps)
    assert inlay("compare", recipe, "--methods", "lora,ln_tuning", "--seconds", "0.5")[0] == 0
    assert [result["steps"] for result in report("runs/shop-compare")["results"]] == steps
    code, _, errors = inlay("compare", recipe, "--methods", "lora,ia3", "--seconds", "2")
    assert code == 2
    assert "train.max_steps was" in errors


def test_a_method_that_the_model_cannot_take_is_told_and_the_others_go_on(inlay, recipe):
    words = ["--methods", "lora,bad=lora", "--set", "bad.target_modules=[nowhere]"]
    code, out, _ = inlay("compare", recipe, *words)
    assert code == 0
    assert "bad lr 1e-2 seed 42: not trained: target_modules names 'nowhere'" in out
    lines = report("runs/shop-compare")["best"]
    assert "nowhere" in lines[1]["failed"]
    assert lines[0]["scores"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("recipe.yaml", "--methods is missing"),
        ("recipe.yaml --methods lora", "fewer than 2"),
        ("recipe.yaml --methods lora,ia3 --seeds one", "--seeds is 'one'"),
        ("recipe.yaml --methods lora,ia3 --learning_rates x0", "--learning_rates names 'x0'"),
        ("recipe.yaml --methods lora,ia3 --seconds 0", "--seconds is 0"),
        ("recipe.yaml --methods lora,ia3 --data.eval_fraction 0", "needs held-out rows"),
        ("recipe.yaml --methods lora,ia3 --methods full", "--methods is given twice"),
        ("recipe.yaml --methods lora,ia3 --test nope.jsonl", "nope.jsonl: no such file"),
        ("recipe.yaml --methods lora,ia3 --train.epoch 3", "'--train.epoch'"),
    ],
)
def test_a_mistake_is_one_error_and_leaves_no_folder(inlay, recipe, words, told):
    code, out, errors = inlay("compare", *words.split())
    assert code == 2, out
    assert told in errors
    assert not Path("runs").exists()


def test_a_run_that_another_process_trains_is_no_result(inlay, recipe):
    with only_one(Path("runs/shop-compare/ia3-lr1.5e-1-seed42")):
        code, _, errors = inlay("compare", recipe, "--methods", "lora,ia3")
    assert code == 2
    assert "another process is training" in errors
    assert not Path("runs/shop-compare/report.json").exists()


def test_the_base_comes_back_as_it_was(recipe):
    kept = {}

    class View(Terminal):
        def done(self, label, result):
            kept.setdefault("base", {k: v.clone() for k, v in job.loaded.base.state_dict().items()})
            for name, tensor in job.loaded.base.state_dict().items():
                assert torch.equal(tensor, kept["base"][name])

    from inlay.run.compare import _Job
    from inlay.run.contenders import contenders

    job = _Job(read_recipe(recipe), [], Options(["lora", "full", "pissa"]), View())
    assert job.go(contenders(["lora", "full", "pissa"], [])) is not None
    assert len(kept["base"]) > 10
    assert compare(read_recipe(recipe), [], Options(["lora", "full"]), Terminal()) is not None
