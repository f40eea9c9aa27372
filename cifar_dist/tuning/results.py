"""Read the results of a sweep from its trials' run folders: a table, and the best recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from cifar_dist.recipe.schema import to_yaml
from cifar_dist.recipe.sweep import format_value
from cifar_dist.run_folder.records import MetricsFile
from cifar_dist.tuning.study import SweepFolder, values_of
from cifar_dist.utils.files import atomic_write

BEST_RECIPE = "best.yaml"


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The validation results of a trial so far."""

    name: str
    metric: str
    epochs: int  # of the recipe
    evaluations: dict[int, float]  # the metric by epoch

    @property
    def value(self) -> float | None:
        """The metric of the last evaluation; None before the first one."""
        return next(reversed(self.evaluations.values()), None)

    @property
    def last_epoch(self) -> int:
        return next(reversed(self.evaluations), 0)

    def __str__(self) -> str:
        value = "not evaluated" if self.value is None else f"{self.metric} {self.value:.4g}"
        return f"{self.name}: {value} at epoch {self.last_epoch} of {self.epochs}"


def read_result(run: SweepFolder, number: int) -> TrialResult:
    path, metric = run.trial_folder(number), run.sweep.metric
    return TrialResult(
        name=path.name,
        metric=metric,
        epochs=run.epochs,
        evaluations={
            round(record["epoch"]): record[metric]
            for record in MetricsFile(path / "metrics.jsonl").read()
            if record["kind"] == "eval" and record.get(metric) is not None
        },
    )


def ranking(run: SweepFolder) -> list[tuple[FrozenTrial, TrialResult]]:
    """Return the trials that were evaluated, the longest first, and of those the best first."""
    sign = -1 if run.sweep.direction == "maximize" else 1
    trials = [
        (trial, result)
        for trial in run.trials
        if (result := read_result(run, trial.number)).value is not None
    ]
    return sorted(trials, key=lambda pair: (-pair[1].last_epoch, sign * (pair[1].value or 0.0)))


def format_table(run: SweepFolder) -> str:
    """Return the trials with their values, in the order of `ranking`."""
    header = ["trial", "state", "epoch", run.sweep.metric, *run.sweep.search]
    rows = [
        [
            result.name,
            trial.state.name.lower(),
            f"{result.last_epoch}/{result.epochs}",
            short(result.value),
            *(short(values_of(trial)[key]) for key in run.sweep.search),
        ]
        for trial, result in ranking(run)
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def write_best(run: SweepFolder) -> Path | None:
    """Write the recipe of the best trial of full length, without validation rows; None if there is none."""
    ranked = ranking(run)
    if not ranked or ranked[0][1].last_epoch < run.epochs:
        return None
    trial, result = ranked[0]
    recipe = run.sweep.trial_recipe(values_of(trial))
    recipe = replace(
        recipe,
        name=f"{run.path.name}_best",
        data=replace(recipe.data, val_size=0),
        run=replace(recipe.run, early_stopping_patience=None),
    )
    path = run.path / BEST_RECIPE
    head = (
        f"# Best of {len(ranked)} trials, on {run.val_size} validation rows: {result}.\n"
        "# It trains on all rows; measure it under several seeds:\n"
        f"#   cifar-dist train {path} name={recipe.name}_s0 run.seed=0\n"
    )
    atomic_write(path, head + to_yaml(recipe))
    return path
