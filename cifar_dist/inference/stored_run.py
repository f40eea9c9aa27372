"""Read the files of a run folder, finished or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder.evaluations import read_matching_evaluation
from cifar_dist.run_folder.records import MetricsFile, Record
from cifar_dist.run_folder.results import last_checkpoint, read_metadata, read_predictions
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """The stored results of a run."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    records: list[Record]
    environment: dict[str, Any]
    evaluation: dict[str, Any] | None
    predictions: tuple[Tensor, Tensor] | None  # logits f32 [N, C], labels int64 [N]

    @property
    def is_finished(self) -> bool:
        return bool(self.summary.get("finished")) and "top1" in self.summary

    @property
    def origin(self) -> dict[str, Any] | None:
        """The fields of a Fork if this run was forked from another one."""
        return self.environment.get("origin")

    @property
    def device_hours(self) -> float:
        """Hours of training times processes, summed over all starts."""
        seconds = self.summary.get("seconds", 0.0) * self.summary.get("world_size", 1)
        return self.summary.get("device_seconds", seconds) / 3600

    @property
    def correct(self) -> Tensor | None:
        """bool [N]: which test images are predicted correctly."""
        if self.predictions is None:
            return None
        logits, labels = self.predictions
        return logits.argmax(1) == labels


def read_run(folder: Path) -> Run:
    """Read a run folder; UserError if it is none or a file is damaged."""
    if not (folder / "recipe.yaml").exists():
        raise UserError(
            f"{folder} is not a run folder (no recipe.yaml in it); give one, like runs/debug"
        )
    summary = read_metadata(folder, "summary.json")
    checkpoint, weights = last_checkpoint(summary), summary.get("weights")
    return Run(
        folder=folder,
        recipe=load_recipe(folder / "recipe.yaml"),
        summary=summary,
        records=MetricsFile(folder / "metrics.jsonl").read(),
        environment=read_metadata(folder, "environment.json"),
        evaluation=read_matching_evaluation(folder, checkpoint, weights=weights)
        if summary.get("finished")
        else None,
        predictions=read_predictions(folder / "predictions.safetensors", weights=weights),
    )


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read run folders, and skip finished ones whose weights are those of an earlier one.

    A copy of a folder, or the same training again, would count as another seed.
    """
    runs: list[Run] = []
    for folder in folders:
        run = read_run(folder)
        weights = run.summary.get("weights") if run.is_finished else None
        twin = next(
            (one for one in runs if weights and one.summary.get("weights") == weights), None
        )
        if twin is None:
            runs.append(run)
        else:
            log.warning(f"skipped: {folder} has the same weights as {twin.folder}")
    return runs
