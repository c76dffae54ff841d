"""`inlay.compare`: several methods trained alike on one loaded base, each run a folder of its own.

    FOLDER/NAME-lrRATE-seedSEED/    a run, as `inlay train` leaves it (without its checkpoints)
    FOLDER/report.json, .md, .html  what came out; quality-*.png, its plots

What is there already is not done again: a comparison that was stopped goes on, and one that is
given another method or seed trains that one alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inlay.checkpoint.atomic import remove_folder, write_text
from inlay.config.given import Given
from inlay.config.resolve import Resolved, resolve
from inlay.config.schema import RunConfig, flatten
from inlay.core.errors import UserError
from inlay.data.dataset import Prepared, prepare
from inlay.data.settings import DataConfig
from inlay.run.budget import steps_in
from inlay.run.compare_view import View, Watched
from inlay.run.comparison import Comparison, Result
from inlay.run.contenders import Contender, changed, contenders, own_method, settings_of
from inlay.run.folder import CHECKPOINTS, Run
from inlay.run.limits import fitting
from inlay.run.loaded import load
from inlay.run.measure import measure
from inlay.run.peak import Peak
from inlay.run.standing import is_held, look
from inlay.run.training import check_sources, start
from inlay.train.precision import choose, device_of

MEASURED = "compare.json"
"""In a run's folder: what only a comparison measures."""


@dataclass(frozen=True)
class Options:
    """What a comparison is told beside the recipe."""

    methods: Sequence[str]
    sets: Sequence[str] = ()
    rates: Sequence[str] = ()
    """Learning rates to try, each a number, or `x3`: three times the method's own."""
    seeds: Sequence[int] = ()
    seconds: float | None = None
    """Training time of each, in place of the recipe's steps."""
    test: str | None = None
    """Rows to measure on, where those held out choose the learning rate."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be; raises UserError."""
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UserError(f"--seconds is {self.seconds}; it must be above 0")
        for word in self.rates:
            _rate(word, 1.0)


def compare(
    recipe: Sequence[Given], words: Sequence[Given], options: Options, view: View
) -> Comparison | None:
    """Train every contender, write the report and return it; None where it was told to stop."""
    listed = contenders(options.methods, options.sets)
    with view:
        job = _Job(recipe, words, options, view)
        return job.go(listed)


class _Job:
    def __init__(
        self, recipe: Sequence[Given], words: Sequence[Given], options: Options, view: View
    ) -> None:
        self.recipe, self.words, self.options, self.view = recipe, words, options, view
        self.resolved = resolve(recipe, words)
        config = self.config = self.resolved.config
        for notice in self.resolved.notices:
            view.notice(notice)
        check_sources(config)
        if not (config.data.eval_fraction or config.data.eval_path):
            raise UserError(
                "a comparison needs held-out rows; set data.eval_fraction or data.eval_path"
            )
        named = self.resolved.origins["output_dir"] == "command line"
        self.folder = Path(str(config.output_dir) + ("" if named else "-compare"))
        self.seeds = list(options.seeds) or [config.train.seed]
        self.loaded = load(config)
        # now, so that rows which cannot be read are told before anything is trained
        self.rows = self._prepared(config.data)
        self.test = None
        if options.test is not None:
            given: dict[str, Any] = {"path": options.test, "eval_path": None, "limit": None}
            given["eval_fraction"] = 0.0
            self.test = self._prepared(replace(config.data, **given))
        self.results: list[Result] = []

    def _prepared(self, data: DataConfig) -> Prepared:
        fits = fitting(data, self.loaded.base, self.config.objective)
        return prepare(fits, self.loaded.tokenizer)

    def go(self, listed: Sequence[Contender]) -> Comparison | None:
        """Train what is not trained yet: each rate with the first seed, then the best with all."""
        plans = {one.name: self._plan(one) for one in listed}
        again = len(listed) * (len(self.seeds) - 1)
        self.view.begin(sum(map(len, plans.values())) + again)
        for one in listed:
            found = []
            for rate, resolved in plans[one.name].items():
                result = self._trial(one, resolved, rate, self.seeds[0])
                if result is None:
                    return None
                found.append(result)
            best = max(found, key=lambda result: result.order)
            for seed in self.seeds[1:] if best.scores else ():
                if self._trial(one, plans[one.name][best.rate], best.rate, seed) is None:
                    return None
        if not any(result.scores for result in self.results):
            raise UserError(f"no method could be trained: {self.results[0].failed}")
        if self.test is not None:
            self._test()
        comparison = self._report(listed)
        self.view.result(comparison)
        return comparison

    def _plan(self, one: Contender) -> dict[float, Resolved]:
        """Return learning rate -> settings of a contender, before any is trained."""
        own, objective = own_method(self.resolved)
        resolved = settings_of(one, self.recipe, self.words, own, objective)
        rate = resolved.config.train.learning_rate
        if not one.own_rate:
            rate *= one.rate / Contender(own, own).rate
        rates = [_rate(word, rate) for word in self.options.rates] or [rate]
        return {rate: resolved for rate in sorted({float(f"{rate:.3g}") for rate in rates})}

    def _trial(self, one: Contender, resolved: Resolved, rate: float, seed: int) -> Result | None:
        """Return how a contender did with one rate and seed; None where it was told to stop.

        What the model or the data cannot take is a result too: it says why.
        """
        place = self.folder / f"{one.name}-lr{_short(rate)}-seed{seed}"
        values: dict[str, Any] = {"train.learning_rate": rate, "train.seed": seed}
        values |= {"output_dir": str(place), "train.save_total_limit": 1}
        label = f"{one.name} lr {_short(rate)} seed {seed}"
        failed = ""
        try:
            if self.options.seconds is not None:
                given = (one.name, self.folder, resolved, self.loaded)
                values["train.max_steps"] = steps_in(self.options.seconds, *given)
            settings = changed(resolved, values)
        except UserError as error:
            failed = str(error)
        else:
            look(Run(place), settings, overwrite=self.options.overwrite)
            if place.is_dir() and is_held(place):
                raise UserError(f"another process is training in {place}; wait for it to end")
            watched = Watched(self.view, label, Peak(device_of(self.loaded.base)))
            try:
                run = start(
                    settings,
                    overwrite=self.options.overwrite,
                    report=watched,
                    loaded=self.loaded,
                )
            except UserError as error:
                failed = str(error)
            else:
                if not run.is_finished:
                    self.view.notice(f"stopped at {label}; the same command goes on from there")
                    return None
                if watched.peak_mb is not None:
                    told = {"memory_mb": watched.peak_mb}
                    write_text(place / MEASURED, json.dumps(told) + "\n")
                if (place / CHECKPOINTS).is_dir():
                    remove_folder(place / CHECKPOINTS)
        result = self._read(one, rate, seed, place, failed)
        self.results.append(result)
        self.view.done(label, result)
        return result

    def _read(self, one: Contender, rate: float, seed: int, place: Path, failed: str) -> Result:
        result = Result(one.name, one.method, rate, seed, str(place), failed=failed)
        if failed:
            return result
        run = Run(place)
        outcome, evaluation = run.outcome, run.evaluation or {}
        begun = next(event for event in run.events() if event["event"] in ("start", "resume"))
        measured = json.loads((place / MEASURED).read_text()) if (place / MEASURED).exists() else {}
        assert outcome is not None
        return replace(
            result,
            trainable=begun["trainable"],
            steps=outcome.step,
            tokens=outcome.tokens,
            seconds=outcome.seconds,
            memory_mb=measured.get("memory_mb"),
            scores=_numbers(evaluation["adapter"]),
            base=_numbers(evaluation["base"] or {}),
        )

    def _test(self) -> None:
        """Measure what was chosen, with every seed, on the rows kept for the end."""
        chosen = {(best.name, best.rate) for best in self._comparison([]).best()}
        for i, result in enumerate(self.results):
            if result.failed or (result.name, result.rate) not in chosen:
                continue
            place = Path(result.folder) / MEASURED
            told = json.loads(place.read_text("utf-8")) if place.exists() else {}
            if told.get("test_file") != self.options.test or "test" not in told:
                self.view.notice(f"measuring {result.label} on {self.options.test}")
                told |= {"test_file": self.options.test, "test": self._measure(result)}
                write_text(place, json.dumps(told) + "\n")
            self.results[i] = replace(result, test=told["test"])

    def _measure(self, result: Result) -> dict[str, float]:
        run, rows = Run(result.folder), self.test
        assert rows is not None
        model, tokenizer = run.load()
        config: RunConfig = run.config
        precision = choose(config.train.precision, model)
        objective = self.loaded.objective(config)
        found = measure(
            model,
            tokenizer,
            objective,
            rows.train,
            rows.train_rows,
            config,
            precision,
            rows.template,
        )
        return _numbers(found)

    def _comparison(self, order: Sequence[str]) -> Comparison:
        plain, config = self.loaded.base, self.config
        total = sum(parameter.numel() for parameter in plain.parameters())
        return Comparison(
            # of a folder its end: where it lies on this machine says nothing to a reader
            base="/".join(Path(getattr(plain, "name_or_path", "") or "a model").parts[-2:]),
            total=total,
            held_out=len(self.rows.eval),
            train_rows=len(self.rows.train),
            results=tuple(self.results),
            settings={
                key: value
                for key, value in flatten(config).items()
                if self.resolved.origins[key] != "default" and key != "output_dir"
            },
            seconds=self.options.seconds,
            test=self.options.test,
            order=tuple(order),
            folder=str(self.folder),
        )

    def _report(self, listed: Sequence[Contender]) -> Comparison:
        from inlay.run.compare_report import write_report

        comparison = self._comparison([one.name for one in listed])
        write_report(comparison, self.folder)
        return comparison


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, int | float)}


def _rate(word: str, own: float) -> float:
    """Return a learning rate of the command line: a number, or `x3` times a method's own.

    >>> _rate("x2", 1e-4), _rate("0.01", 1e-4)
    (0.0002, 0.01)
    """
    factor = word.startswith("x")
    try:
        value = float(word[1:] if factor else word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(
            f"--learning_rates names {word!r}; give numbers above 0, such as 1e-4,3e-4, or "
            "multiples of each method's own, such as x0.3,x1,x3"
        )
    return value * own if factor else value


def _short(rate: float) -> str:
    """Return a learning rate as a name.

    >>> _short(0.0003), _short(0.005)
    ('3e-4', '5e-3')
    """
    digits, _, power = f"{rate:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


__all__ = ["Options", "compare"]
