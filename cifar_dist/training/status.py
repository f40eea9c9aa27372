"""The status of runs, read from their folders without writing to them. Imports nothing slow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import add
from pathlib import Path
from typing import Any, Literal

from cifar_dist.run_folder.records import MetricsFile, Record
from cifar_dist.training.lock import lock_holder
from cifar_dist.utils.errors import UserError, user_message
from cifar_dist.utils.files import read_json
from cifar_dist.utils.recipe_files import read_yaml
from cifar_dist.utils.units import format_duration

COLUMNS = ("run", "state", "epoch", "step", "loss", "top1", "val top1", "updated", "left")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    run: str  # its folder
    state: Literal["training", "stopped", "finished", "damaged"]
    error: str | None = None  # why it is damaged; the numbers are None then
    epoch: float | None = None
    epochs: int | None = None  # of the recipe
    step: int | None = None
    loss: float | None = None  # the last one of a run in training
    top1: float | None = None  # of the last evaluation, in percent
    val_top1: float | None = None
    seconds_since_update: float  # age of the last record, before the first one of recipe.yaml
    seconds_left: float | None = None  # of a run in training, without evaluations


def read_statuses(folders: Iterable[Path]) -> list[RunStatus]:
    """Return the status of each run, the last updated first, without those removed meanwhile."""
    statuses = filter(None, map(read_status, folders))
    return sorted(statuses, key=lambda status: status.seconds_since_update)


def read_status(folder: Path) -> RunStatus | None:
    """Return the status of a run, or None if its folder is removed meanwhile."""
    try:
        values = _read(folder)
    except (UserError, OSError) as error:
        values = {"state": "damaged", "error": user_message(error) or str(error)}
    try:
        updated = (folder / "recipe.yaml").stat().st_mtime
    except OSError:
        return None
    with suppress(OSError):
        updated = (folder / "metrics.jsonl").stat().st_mtime
    age = max(0.0, time.time() - updated)
    return RunStatus(run=str(folder), seconds_since_update=age, **values)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    recipe = read_yaml(path)
    try:
        epochs, batch_size = int(recipe["run"]["epochs"]), int(recipe["run"]["batch_size"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path} lacks run.epochs or run.batch_size; restore the file") from None
    is_training = lock_holder(folder) is not None  # first: at its end, a run writes the summary
    summary = read_json(folder / "summary.json", "start the training again to rewrite it") or {}
    newest = MetricsFile(folder / "metrics.jsonl").newest("train", "eval")
    train, evaluation = newest.get("train", {}), newest.get("eval", {})
    last = max(train, evaluation, key=lambda record: record.get("step", 0))
    ended = "finished" if summary.get("finished") else "stopped"
    values = {
        "state": "training" if is_training else ended,
        "epoch": last.get("epoch", 0.0),
        "epochs": epochs,
        "step": last.get("step", 0),
        "top1": _number(evaluation, "top1"),
        "val_top1": _number(evaluation, "val_top1"),
    }
    if is_training:
        values["loss"] = _number(train, "loss")
        epoch, speed = _number(train, "epoch"), _number(train, "images_per_second")
        if epoch and speed:
            steps_left = epochs * train["step"] / epoch - last["step"]
            values["seconds_left"] = steps_left * batch_size / speed
    return values


def _number(record: Record, name: str) -> float | None:
    """Return a value of a record; None if it is absent, or no number in a file from elsewhere."""
    value = record.get(name)
    return value if isinstance(value, int | float) else None


def format_table(statuses: Sequence[RunStatus]) -> str:
    """Return a header and a line for each run, without columns that are empty for all runs."""
    rows = [COLUMNS, *map(_cells, statuses)]
    columns = [
        column for column in zip(*rows, strict=True) if column[0] == "run" or any(column[1:])
    ]
    for index, column in enumerate(columns):
        width, align = max(map(len, column)), str.ljust if index < 2 else str.rjust
        columns[index] = tuple(align(cell, width) for cell in column)
    header, *lines = ("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
    errors = (f"  {status.error}" if status.error else "" for status in statuses)
    return "\n".join([header, *map(add, lines, errors)])


def _cells(status: RunStatus) -> tuple[str, ...]:
    if status.error:
        return (status.run, status.state, *[""] * (len(COLUMNS) - 2))
    left = status.seconds_left
    return (
        status.run,
        status.state,
        f"{status.epoch:.1f}/{status.epochs}",
        str(status.step),
        "" if status.loss is None else f"{status.loss:.4f}",
        "" if status.top1 is None else f"{status.top1:.2f} %",
        "" if status.val_top1 is None else f"{status.val_top1:.2f} %",
        f"{format_duration(status.seconds_since_update)} ago",
        "" if left is None else format_duration(left),
    )
