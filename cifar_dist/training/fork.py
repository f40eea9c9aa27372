"""Fork a run: start a new run from the newest checkpoint of another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_dist.recipe.diff import recipe_diff, seed_free_config
from cifar_dist.recipe.runs import load_run
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder.checkpoint import digest_of, load_progress
from cifar_dist.run_folder.results import read_summary
from cifar_dist.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Where a run was forked from; stored in its checkpoints and in environment.json."""

    run: str  # folder of the origin
    step: int  # of the origin's checkpoint
    weights: str  # SHA-256 of its model.safetensors
    differences: list[str]  # of the recipes, like `optim.lr: 0.1 -> 0.01`
    start_step: int  # of the new run: `step`, or 0 with a schedule of its own
    keeps_average: bool  # whether the average of the weights continues
    # the least validation rows of the origin and its own origins; 0 if they chose other subsets
    val_size: int
    experiment: str  # digest, equal for forks of runs that differ only in their seeds

    @property
    def checkpoint(self) -> Path:
        return Path(self.run) / "checkpoints" / f"step_{self.step:08d}"


def plan_fork(recipe: Recipe, folder: Path, *, data: str) -> Fork:
    """Return how `recipe` starts from the newest checkpoint of the run in `folder`.

    It continues at the checkpoint's step if batch size, rows and epochs are the same, otherwise at
    step 0. `data` is a digest. UserError if the fork would train nothing or give wrong results.
    """
    origin, saved = load_run(folder)
    progress = load_progress(saved)
    if progress["data"] != data:
        raise UserError(
            f"--fork {folder}: was trained on other data ({progress['data'][:12]}, not {data[:12]}); "
            "fork a run on the same data, or use its weights: model.weights"
        )
    if origin.data.labels != recipe.data.labels:
        raise UserError(
            f"--fork {folder}: was trained on the {origin.data.labels} labels, so neither its classes nor "
            f"its validation rows fit data.labels={recipe.data.labels}; use its weights: model.weights"
        )
    parent = Fork(**progress["origin"]) if progress.get("origin") else None
    val_size = min(origin.data.val_size, parent.val_size if parent else origin.data.val_size)
    remedy = ""
    if recipe.data.subset != origin.data.subset:
        # Validation rows of one subset are training rows of another.
        if val_size:
            remedy = ", or data.fraction and data.long_tail as in its recipe"
        val_size = 0
    if recipe.data.val_size > val_size:
        raise UserError(
            f"--fork {folder}: was trained on rows that data.val_size={recipe.data.val_size} uses for "
            f"validation, so the validation accuracy would be wrong; set data.val_size={val_size}{remedy}"
        )
    same_steps = all(
        before == after
        for before, after in (
            (origin.run.batch_size, recipe.run.batch_size),
            (origin.run.epochs, recipe.run.epochs),
            (origin.data.val_size, recipe.data.val_size),
            (origin.data.subset, recipe.data.subset),
        )
    )
    summary = read_summary(folder) or {}
    if same_steps and summary.get("finished"):
        raise UserError(
            f"--fork {folder}: has finished all its {origin.run.epochs} epochs, and a fork with the same "
            "run.epochs, run.batch_size and training rows continues at its step, so nothing would be "
            "trained; another run.epochs starts a new schedule of that many epochs"
        )
    experiment = [seed_free_config(origin), progress["step"], parent and parent.experiment]
    experiment += progress.get("teachers", [])
    return Fork(
        run=str(folder),
        step=progress["step"],
        weights=digest_of(saved, "model.safetensors"),
        differences=[line for line in recipe_diff(recipe, folder) if not line.startswith("name: ")],
        start_step=progress["step"] if same_steps else 0,
        keeps_average=same_steps and origin.averaging == recipe.averaging,
        val_size=val_size,
        experiment=hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()[:12],
    )


def is_fork_of(folder: Path, origin: Mapping[str, Any] | None) -> bool:
    """Return whether the stored fields of a Fork, None for a run from scratch, name this run."""
    return origin is not None and Path(origin["run"]).resolve() == folder.resolve()


def describe_fork(origin: dict[str, object]) -> str:
    """Return `fork of runs/a at step 600` for the stored fields of a Fork."""
    return f"fork of {origin['run']} at step {origin['step']}"
