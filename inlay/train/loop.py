"""The training loop: gradient, clip, AdamW, and what is written down on the way.

Everything a step does is a function of the weights, the optimizer's state, the seed and the step's
number. So a run killed at any moment and resumed from a checkpoint ends with the same bits as one
that was left alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.core.errors import UserError
from inlay.model.ranks import Ranks, names_in_training, penalties
from inlay.train.compiled import compiled
from inlay.train.distributed import add_up, rank, world
from inlay.train.evaluate import evaluate_loss
from inlay.train.events import Events, memory_mb
from inlay.train.factors import first_factors_frozen
from inlay.train.fast import fast_paths
from inlay.train.flat import clip, flattened
from inlay.train.optim import make_optimizer
from inlay.train.order import Order
from inlay.train.plot import plot_loss
from inlay.train.precision import choose, device_of
from inlay.train.progress import Outcome, Progress, Stopped
from inlay.train.resume import Keeper, digest_rows
from inlay.train.schedule import learning_rate
from inlay.train.settings import TrainConfig
from inlay.train.setup import require_fresh, require_isolation, trainable, training_mode
from inlay.train.signals import Stop, stop_signals
from inlay.train.step import NonFiniteError, Stepper


def fit(
    model: nn.Module,
    tokenizer: Any,
    objective: Any,
    train: Sequence[Any],
    eval: Sequence[Any],
    config: TrainConfig,
    folder: str | Path,
    events: Events,
    resume: bool = False,
) -> Outcome:
    """Train what requires a gradient in `model` on `train`; return how it ended.

    `folder` is the run folder: checkpoints/step-N/, events.jsonl (through `events`) and loss.png
    are written there. `resume` goes on from the newest checkpoint that verifies, or starts where
    there is none. On SIGTERM or Ctrl-C the step is finished and saved, and Outcome.stopped says so.
    Global random state and the model's mode are put back.

    Raises UserError: nothing to train or no rows; packing over a base that cannot keep rows apart;
    a folder that holds another run; a full disk; layers that cannot be compiled. NonFiniteError (a
    UserError): a NaN or infinite loss or gradient, before it touched the weights.
    """
    config.validate()
    if config.packing:
        require_isolation(model)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_cuda_devices()))
        stack.enter_context(training_mode(model, config))
        if config.optimizer == "lorafa":
            stack.enter_context(first_factors_frozen(model))
        stop = stack.enter_context(stop_signals())
        run = _Run(model, tokenizer, objective, train, eval, config, Path(folder), events)
        if config.fast:
            flats = stack.enter_context(flattened(run.optimizer, model))
            run.stepper = replace(run.stepper, flats=flats)
        if config.compile:
            stack.enter_context(compiled(model, by_rows=config.fast))
        elif config.fast:
            how = (tokenizer, objective, train[0], run.stepper.precision)
            stack.enter_context(fast_paths(model, *how))
        run.restore() if resume else run.start()
        return run.go(stop)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        objective: Any,
        train: Sequence[Any],
        eval: Sequence[Any],
        config: TrainConfig,
        folder: Path,
        events: Events,
    ) -> None:
        if not train:
            raise UserError(
                "there are no training rows; ledger.jsonl of the run says what was dropped, and why"
            )
        if not eval and (config.early_stopping_patience or config.restore_best):
            raise UserError(
                "early_stopping_patience and restore_best need held-out rows: "
                "set data.eval_fraction"
            )
        self.model, self.config, self.events = model, config, events
        self.train, self.eval, self.folder = train, eval, folder
        self.parameters = trainable(model)
        self.optimizer = make_optimizer(self.parameters, config, model)
        precision = choose(config.precision, model)
        per_step = config.micro_batch_size * config.gradient_accumulation_steps * world()
        self.order = Order(len(train), per_step, config.seed)
        self.total = config.max_steps or max(
            1, math.ceil(config.num_epochs * self.order.steps_per_epoch)
        )
        roster: Any = getattr(model, "roster", None)
        names = [] if roster is None else names_in_training(roster)
        self.ranks = [Ranks(roster, name, self.total) for name in names]
        added = [] if roster is None else penalties(roster)
        self.stepper = Stepper(
            model, self.parameters, objective, tokenizer, precision, config.seed, added
        )
        self.eval_every = config.eval_steps or self.order.steps_per_epoch
        self.progress = Progress()
        identity = {**config.identity(), "devices": world()}
        identity["packing"] = bool(getattr(objective, "packing", False))
        identity["rows"] = digest_rows(train, objective.size)
        self.keeper = Keeper(folder, self.parameters, self.optimizer, identity, config, self.ranks)

    def start(self) -> None:
        """Begin at step 0."""
        if rank() == 0:
            require_fresh(self.folder)
            self.events.rewind(-1)
        self.emit("start", steps=self.total, **self._facts())
        for ranks in self.ranks:
            if ranks.total != self.total:
                told = f"total_step is {ranks.total}, but this run has {self.total} steps"
                self.emit("notice", text=f"{told}: ranks are chosen by the former")

    def restore(self) -> None:
        """Begin where the newest verified checkpoint stands, or at step 0."""
        notices: list[str] = []
        progress = self.keeper.restore(notices.append)
        self.progress = progress or Progress()
        if rank() == 0:
            self.events.rewind(progress.step if progress else -1)
        kind = "resume" if progress else "start"
        self.emit(kind, steps=self.total, **self._facts())
        for text in notices:
            self.emit("notice", text=text)

    def go(self, stop: Stop) -> Outcome:
        """Make the steps that are left."""
        progress, config = self.progress, self.config
        self.session = (time.monotonic(), progress.step)
        stopped: Stopped | None = None
        while stopped is None:
            if self._is_early():
                stopped = "early"
            elif progress.step >= self.total:
                stopped = "done"
            else:
                self.one_step()
                last = progress.step >= self.total
                if self.eval and (last or progress.step % self.eval_every == 0):
                    self.evaluate()
                if config.save_steps and progress.step % config.save_steps == 0:
                    self.save()
                # told so late that all is done, it is done
                stopped = None if last else self._asked(stop)
        self.save()
        return self.finish(stopped)

    def one_step(self) -> None:
        """Make one step: gradient, clip, update, line."""
        progress, config = self.progress, self.config
        began = time.monotonic()
        try:
            sums = self.stepper.gradient(progress.step, self.micros(progress.step))
        except NonFiniteError as error:
            self.emit("nonfinite", at=error.step, rows=list(error.rows), text=str(error))
            raise
        if config.max_grad_norm:
            clip(sums.gradients, config.max_grad_norm, sums.grad_norm)
        lr = learning_rate(progress.step, self.total, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.optimizer.step()
        for ranks in self.ranks:
            ranks.update_and_allocate(progress.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        progress.add_step(sums, time.monotonic() - began)
        if progress.step % config.logging_steps == 0 or progress.step == self.total:
            self.log(lr)

    def micros(self, step: int) -> list[list[Any]]:
        """Return this rank's micro-batches of `step`, as rows."""
        rows = [self.train[i] for i in self.order.indices(step)]
        # how a step is cut does not matter (law 2), so rows of like size go together: less padding
        rows.sort(key=self.stepper.objective.size)
        size = self.config.micro_batch_size
        return [rows[i : i + size] for i in range(0, len(rows), size)][rank() :: world()]

    def log(self, lr: float) -> None:
        """Write the line of the steps since the last one."""
        step = self.progress.step
        began, first = self.session
        pace = (time.monotonic() - began) / (step - first)
        self.emit(
            "step",
            steps=self.total,
            epoch=round(step / self.order.steps_per_epoch, 4),
            lr=lr,
            **self.progress.close_window(),
            memory_mb=memory_mb(device_of(self.model)),
            eta_s=round(pace * (self.total - step), 1),
        )

    def evaluate(self) -> None:
        """Measure the held-out rows; save where it is the best so far and is wanted."""
        config, stepper = self.config, self.stepper
        score = evaluate_loss(
            self.model,
            stepper.tokenizer,
            stepper.objective,
            self.eval,
            batch_size=config.eval_batch_size or config.micro_batch_size,
            precision=stepper.precision,
        )
        best = self.progress.add_evaluation(score.loss, config.early_stopping_threshold)
        told = {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}
        self.emit("eval", **told, best=best)
        if best and config.restore_best:
            self.save()

    def save(self) -> None:
        """Write the checkpoint of this step unless it is there."""
        path = self.keeper.save(self.progress)
        if path is not None:
            self.emit("save", path=str(path.relative_to(self.folder)))

    def finish(self, stopped: Stopped) -> Outcome:
        """Put the best weights back where they are wanted, draw the plot, say the end."""
        progress = self.progress
        wanted = self.config.restore_best and stopped in ("done", "early")
        if wanted and progress.best_step is not None:
            fault = self.keeper.restore_weights(progress.best_step)
            if fault is not None:
                self.emit("notice", text=f"ended with the last weights, not the best: {fault}")
        if stopped in ("done", "early"):
            for ranks in self.ranks:
                ranks.settle()
        outcome = Outcome(
            step=progress.step,
            total_steps=self.total,
            stopped=stopped,
            train_loss=progress.train_loss,
            eval_loss=progress.eval_loss,
            best_eval_loss=progress.best_loss,
            best_step=progress.best_step,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 3),
            checkpoint=self.keeper.folder / f"step-{self.keeper.saved}",
        )
        told = asdict(outcome)
        del told["step"], told["checkpoint"]
        self.emit("end", **told)
        if rank() == 0:
            plot_loss(self.folder)
        return outcome

    def emit(self, event: str, **fields: Any) -> None:
        """Write an event of the step where the run stands (rank 0 only)."""
        if rank() == 0:
            self.events.emit(event, self.progress.step, **fields)

    def _facts(self) -> dict[str, Any]:
        counted = sum(parameter.numel() for parameter in self.parameters.values())
        precision = str(self.stepper.precision).removeprefix("torch.")
        return {
            "rows": len(self.train),
            "eval_rows": len(self.eval),
            "trainable": counted,
            "precision": precision,
        }

    def _is_early(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.evals_without_best >= patience

    def _asked(self, stop: Stop) -> Stopped | None:
        # told to one rank, told to all: they must leave at the same step
        told = add_up(torch.tensor(float(stop.asked is not None), device=device_of(self.model)))
        return (stop.asked or "sigterm") if told.item() else None


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
