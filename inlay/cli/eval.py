"""Measure a trained adapter beside its base, on held-out rows.

Loss, perplexity, and exact match of the answers:

    inlay eval runs/support
    inlay eval runs/support --data other.jsonl
    inlay eval my-adapter --data other.jsonl --base_model Qwen/Qwen3-0.6B

Without --data the rows are those that the run held out.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

from inlay.cli._machine import settle
from inlay.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("source", metavar="RUN|ADAPTER", help="a run folder, or an adapter's")
    parser.add_argument("--data", metavar="FILE", help="rows to measure, in place of the held-out")
    parser.add_argument("--base_model", help="base in place of the one that the adapter names")
    parser.add_argument(
        "--any_base", action="store_true", help="do not check that it is the base of the training"
    )
    parser.add_argument("--answers", type=int, help="rows to answer (default: the run's, or 100)")
    parser.add_argument(
        "--max_new_tokens", type=int, help="longest answer (default: the run's, or 64)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Measure both sides and print them."""
    settle()
    from inlay.config.schema import RunConfig
    from inlay.run.folder import Run
    from inlay.run.loaded import load
    from inlay.run.opening import kind_of, open_trained

    check_limits(arguments)
    kind = kind_of(arguments.source)
    config = Run.open(arguments.source).config if kind == "run" else RunConfig()
    if kind == "adapter" and arguments.data is None:
        raise UserError(f"{arguments.source} is an adapter; give rows to measure it: --data FILE")
    data = rows_to_measure(config, arguments.data) if kind in ("run", "adapter") else None
    model, tokenizer = open_trained(
        arguments.source, arguments.base_model, check_base=not arguments.any_base
    )
    if kind == "adapter":
        config = settings_of(model)
    full = None
    if not hasattr(model, "disable_adapter"):
        # after full fine-tuning the base is another model, not this one without its adapter
        loaded = load(config)
        loaded.redraw(config.train.seed)
        full = loaded.base
    found = measure(model, full, tokenizer, config, data, arguments)
    name = "adapter" if full is None else "model"
    show(found, name, config.evaluate.shown, as_json=arguments.json)
    return 0


def settings_of(model: Any) -> Any:
    """Return the settings of a run for a model whose adapter comes without one."""
    from inlay.config.schema import RunConfig
    from inlay.objectives.classify import Classify

    if model.active_peft_config.task_type != "SEQ_CLS":
        return RunConfig()
    names = model.config.id2label
    labels = [names[i] for i in sorted(names)]
    return RunConfig(adapter=model.active_peft_config, objective=Classify(labels=labels))


def check_limits(arguments: argparse.Namespace) -> None:
    """Raise UserError for a number that no measurement can have."""
    for name, least in {"answers": 0, "max_new_tokens": 1}.items():
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise UserError(f"--{name} is {given}; it must be {least} or more")


def rows_to_measure(config: Any, file: str | None) -> Any:
    """Return the `data:` block whose rows are to be measured, all those of `file` where given."""
    from dataclasses import replace

    if file is not None:
        return replace(config.data, path=file, eval_path=None, eval_fraction=0.0, limit=None)
    if not (config.data.eval_fraction or config.data.eval_path):
        raise UserError("the run held no rows out; give some to measure: --data FILE")
    return config.data


def measure(
    model: Any,
    other_base: Any,
    tokenizer: Any,
    config: Any,
    data: Any,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return {"held_out", "base", "adapter"}, as evaluation.json has it."""
    from dataclasses import replace

    from inlay.data.dataset import prepare
    from inlay.run.limits import fitting
    from inlay.run.measure import measure as scores
    from inlay.train.precision import choose

    prepared = prepare(fitting(data, model, config.objective), tokenizer)
    objective = config.objective
    if objective.task == "SEQ_CLS" and objective.labels is None:
        names = model.config.id2label
        objective = replace(objective, labels=[names[i] for i in sorted(names)])
    given = arguments.data is not None
    examples = prepared.train if given else prepared.eval
    rows = prepared.train_rows if given else prepared.eval_rows
    asked = {name: getattr(arguments, name) for name in ("answers", "max_new_tokens")}
    evaluate = replace(config.evaluate, **{k: v for k, v in asked.items() if v is not None})
    config = replace(config, evaluate=evaluate)
    precision = choose(config.train.precision, model)

    def side(model: Any) -> dict[str, Any]:
        given = (examples, rows, config, precision, prepared.template)
        return scores(model, tokenizer, objective, *given)

    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        base = side(other_base or model)
    return {"held_out": len(examples), "base": base, "adapter": side(model)}


def show(found: dict[str, Any], name: str, shown: int, *, as_json: bool) -> None:
    """Print an evaluation of what is called `name`."""
    if as_json:
        import json

        print(json.dumps({"event": "evaluation", **found}, ensure_ascii=False))
        return
    from rich.console import Console

    from inlay.run.tables import answers_table, scores_table

    console = Console(highlight=False)
    for table in (answers_table(found, shown, name), scores_table(found, name)):
        if table is not None:
            console.print()
            console.print(table)
