"""`inlay.train`: settings -> base, adapter, rows -> training -> what it learned, in a run folder.

Every step of it can be repeated: a run that was stopped anywhere, and is started again with the
same settings, goes on where it stood and ends with the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from inlay.checkpoint.atomic import disk_errors, remove_folder, write_text
from inlay.checkpoint.export import export_model
from inlay.config.dump import to_yaml
from inlay.config.resolve import Resolved, resolve_python
from inlay.config.schema import RunConfig
from inlay.core.errors import UserError
from inlay.data.dataset import Prepared, prepare
from inlay.data.ledger import write_ledger
from inlay.data.pack import check_packable
from inlay.data.read import raw_rows
from inlay.model.offload import require_offload
from inlay.run.facts import facts
from inlay.run.folder import CONFIG, EVALUATION, LEDGER, Run
from inlay.run.limits import check_tokens, fitting
from inlay.run.loaded import Loaded, load
from inlay.run.measure import measure_answers, measure_labels, measure_loss, told
from inlay.run.report import Report, Terminal
from inlay.run.standing import clear, digests, look, no_junk, only_one
from inlay.run.starting import Rows, begin, needs_rows, without_start
from inlay.surface.tasks import get_peft_model
from inlay.train.compiled import require_compilable
from inlay.train.evaluate import Score
from inlay.train.events import Events
from inlay.train.loop import fit
from inlay.train.order import seed_of
from inlay.train.precision import choose, device_of
from inlay.train.progress import Outcome
from inlay.train.setup import choose_packing


def train(
    config: str | Path | Mapping[str, Any] | RunConfig | None = None,
    *,
    overwrite: bool = False,
    report: Report | None = None,
    **settings: Any,
) -> Run:
    """Train as `inlay train` does, and return the run.

    config: a recipe's path, a mapping with its keys, or a RunConfig. settings: keys that go before
    those of `config`, as in train("recipe.yaml", data="other.jsonl", train={"max_steps": 10}).
    overwrite: replace another run in output_dir. report: what is told of it, and how (default: on
    the terminal). A run of these settings that was stopped goes on where it stood; one that has
    ended is returned as it is. Raises UserError for every mistake in what was given.
    """
    return start(resolve_python(config, settings), overwrite=overwrite, report=report)


def start(
    resolved: Resolved,
    *,
    overwrite: bool = False,
    report: Report | None = None,
    loaded: Loaded | None = None,
) -> Run:
    """Train with settings that are resolved; the rest as `train`.

    loaded: the base of these settings where it is in memory already; it is given back as it was.
    """
    config, report = resolved.config, report or Terminal()
    run = Run(str(config.output_dir))
    with report, no_junk(run.folder), ExitStack() as stack:
        for notice in resolved.notices:
            report.notice(notice)
        look(run, resolved, overwrite=overwrite)  # refuses before a folder is made
        with only_one(run.folder):
            state = look(run, resolved, overwrite=overwrite)
            if state == "finished":
                report.notice(f"{run.folder} holds this run, finished; --overwrite starts it anew")
                report.result(run)
                return run
            # an earlier run stays whole until it is known that the new one has rows to train
            replaces = overwrite and run.is_run
            ledger = None if replaces else run.folder / LEDGER
            job = _Job(resolved, run, report, ledger, loaded)
            if loaded is not None:
                stack.enter_context(loaded.given_back(job.model))
            if overwrite:
                clear(run)
                write_ledger(run.folder / LEDGER, job.data.entries)
            if state == "begun":
                report.notice(f"going on with the run in {run.folder}; --overwrite starts it anew")
            write_text(
                run.folder / CONFIG, to_yaml(resolved, f"The settings of the run in {run.folder}")
            )
            job.begin(resume=state == "begun")
            job.measure_base()
            outcome = job.fit(resume=state == "begun")
            if outcome.stopped in ("sigterm", "sigint"):
                report.stopped(run, outcome)
                return run
            job.save()
            job.measure_trained(outcome)
            report.result(run)
    return run


class _Job:
    """The objects that settings become, in the order in which a mistake is cheapest to find."""

    def __init__(
        self,
        resolved: Resolved,
        run: Run,
        report: Report,
        ledger: Path | None,
        loaded: Loaded | None,
    ) -> None:
        config = self.config = resolved.config
        self.run, self.report = run, report
        check_sources(config)
        self.loaded = loaded or load(config)
        base, self.tokenizer = self.loaded.base, self.loaded.tokenizer
        if config.train.packing:
            check_packable(base.config)  # before the rows are read
        self.loaded.redraw(config.train.seed)
        self.model = adapted(base, without_start(config))
        if config.train.compile:
            require_compilable(self.model)  # before the rows are read
        if config.train.offload_activations:
            require_offload(device_of(self.model))
        # what is measured outside of the training is not packed unless it was asked for
        self.measured = self.loaded.objective(config)
        self.objective, padded = choose_packing(self.model, self.measured, config.train)
        if padded is not None:
            report.notice(f"rows are padded, not packed: {padded}")
        vocabulary = base.get_input_embeddings().weight.shape[0]
        data = fitting(config.data, base, config.objective)
        with disk_errors(run.folder):
            self.data: Prepared = prepare(data, self.tokenizer, ledger)
        check_tokens(self.data, self.tokenizer, vocabulary)
        self.precision = choose(config.train.precision, self.model)
        report.facts(facts(resolved, self.model, self.data, self.precision, self.objective))

    def begin(self, *, resume: bool) -> None:
        """Find the adapter's start in the rows, where it is one of these."""
        if needs_rows(self.config):
            train = self.config.train
            rows = Rows(self.data.train, self.measured, self.tokenizer, self.precision, train)
            tell, place = self.report.notice, self.run.folder
            begin(self.model, self.config, rows, place, tell, resume=resume)

    def measure_base(self) -> None:
        """Write what the base scores on the held-out rows, unless an earlier start did."""
        data, before = digests(self.config), self.run.evaluation or {}
        if not (self.data.eval and before.get("base") and before.get("data") == data):
            if self.data.eval:
                self.report.notice("measuring the base on the held-out rows")
            found = self.loaded.scores.get(self.loaded.drawn_from)
            if found is None:
                with self.without_adapter():
                    found = {**self.loss(), **self.answers()}
                self.loaded.scores[self.loaded.drawn_from] = found
            self.write({"data": data, "held_out": len(self.data.eval), "base": found or None})

    def fit(self, *, resume: bool) -> Outcome:
        """Train, or go on with it."""
        events = Events(self.run.folder, [self.report.event])
        return fit(
            self.model,
            self.tokenizer,
            self.objective,
            self.data.train,
            self.data.eval,
            self.config.train,
            self.run.folder,
            events,
            resume=resume,
        )

    def save(self) -> None:
        """Write the adapter with the tokenizer and chat template it was trained with."""
        place, template = self.run.trained, self.data.chat_template
        if place.is_dir():
            remove_folder(place)  # of a start that was killed while measuring
        if self.run.is_full:
            plain = self.model.get_base_model()
            export_model(plain, self.tokenizer, place, chat_template=template)
        else:
            self.model.save_pretrained(place, tokenizer=self.tokenizer, chat_template=template)

    def measure_trained(self, outcome: Outcome) -> None:
        """Write what the adapter scores beside the base, which says that the run has ended."""
        found: dict[str, Any] = {}
        if self.data.eval:
            self.report.notice(f"measuring the {self.run.trained.name} on the held-out rows")
            found = {**self.last_loss(outcome), **self.answers()}
        self.write({**(self.run.evaluation or {}), "adapter": found or None, "finished": True})

    def without_adapter(self) -> Any:
        """Return the context in which the model is the base; at the start a full one still is."""
        return nullcontext() if self.run.is_full else self.model.disable_adapter()

    def loss(self) -> dict[str, Any]:
        """Return the loss on the held-out rows."""
        size = self.config.train.eval_batch_size or self.config.train.micro_batch_size
        return measure_loss(
            self.model, self.tokenizer, self.measured, self.data.eval, size, self.precision
        )

    def last_loss(self, outcome: Outcome) -> dict[str, Any]:
        """Return the loss on the held-out rows after training, as the loop measured it last.

        It is measured again where weights were put back, and where the arithmetic shows by which
        path it was computed: base, adapter and `inlay eval` are to be comparable to the last digit.
        """
        again = self.config.train.restore_best or self.precision != torch.float32
        if outcome.eval_loss is None or again:
            return self.loss()
        base = (self.run.evaluation or {}).get("base") or {}
        return told(Score(outcome.eval_loss, base.get("tokens", 0)), self.objective)

    def answers(self) -> dict[str, Any]:
        """Return answers to the held-out rows: a text each, or for a classifier a label."""
        if self.objective.task == "SEQ_CLS":
            size = self.config.train.eval_batch_size or self.config.train.micro_batch_size
            return measure_labels(
                self.model, self.tokenizer, self.objective, self.data.eval, size, self.precision
            )
        return measure_answers(
            self.model,
            self.tokenizer,
            self.data.eval_rows,
            self.config.evaluate,
            self.precision,
            self.data.template,
        )

    def write(self, evaluation: dict[str, Any]) -> None:
        """Write evaluation.json."""
        text = json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n"
        write_text(self.run.folder / EVALUATION, text)


def adapted(base: Any, config: RunConfig) -> Any:
    """Return `base` with a fresh adapter, whose start depends on train.seed and nothing else."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_of(config.train.seed))
        return get_peft_model(
            base,
            config.adapter,
            autocast_adapter_dtype=config.autocast_adapter_dtype,
            revision=config.revision,
        )


def check_sources(config: RunConfig) -> None:
    """Raise UserError where a data file is not there, before a model is loaded for it."""
    if not config.data.paths:
        raise UserError("data.path is empty; give a file such as chats.jsonl or a hub data set")
    for path in (*config.data.paths, *config.data.eval_paths):
        if Path(path).suffix or Path(path).exists():
            raw_rows(path)
