"""Decide how a training starts: from step 0, from a checkpoint, or not at all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cifar_dist.data.dataset import data_digest
from cifar_dist.data.ingest.preparation import prepare
from cifar_dist.distributed import signals
from cifar_dist.recipe.diff import recipe_diff
from cifar_dist.recipe.schema import Recipe, to_yaml
from cifar_dist.recipe.teachers import find_teacher
from cifar_dist.run_folder import results
from cifar_dist.run_folder.checkpoint import (
    checkpoints,
    latest_valid,
    load_progress,
)
from cifar_dist.utils.errors import UserError, is_main_rank
from cifar_dist.utils.files import atomic_write, read_json, remove_folder, rename, write_json
from cifar_dist.utils.log import log

REQUIRED_KEYS = {"top1", "epochs", "seconds"}  # of a finished run


SYNTHETIC_NOTE = (
    "This is the drawn sample, not CIFAR-100. The real thing: "
    "accelerate launch -m cifar_dist.train recipes/r18_32.yaml"
)


def ensure_data(path: Path, source: str | None) -> bool:
    """Get the missing Arrow data: rank 0 prepares them, the others wait for the file.

    False where a signal came first.
    """
    if is_main_rank():
        if source is None:
            raise UserError(
                f"{path} has no data; run `python -m cifar_dist.prepare --output {path}`"
            )
        prepare(source, path)
    waited = 0
    while not (path / "digest.json").exists():
        if signals.stop_signal():
            return False
        time.sleep(0.2)
        waited += 1
        if waited % 300 == 0:
            log.warning(
                f"waiting for rank 0 to prepare {path}; is this folder shared by all nodes?"
            )
    return True


def log_finished(recipe: Recipe, summary: dict[str, Any], *, is_synthetic: bool) -> None:
    log.info(
        f"{recipe.name}: finished, top1 {summary['top1']:.2f} % after epoch {summary['epochs']:g} "
        f"in {summary['seconds']:.0f} s; see {recipe.folder}"
        + (f" ({summary['ended_early']})" if "ended_early" in summary else "")
    )
    if is_synthetic:
        log.info(SYNTHETIC_NOTE)


def find_start(
    recipe: Recipe, *, data: str, teachers: list[str], force: bool
) -> tuple[Path | None, int | None]:
    """Rank 0 looks into the run folder: (checkpoint to go on from, its micro-batches), both None for a new run.

    A changed recipe, data set or teacher (the latter two by digest) is refused with the difference,
    unless forced. Where not a step was done, it begins anew.
    """
    folder = recipe.folder
    saved = latest_valid(folder / "checkpoints")
    facts = load_progress(saved) if saved else {}
    if saved and not force:
        changed = recipe_diff(recipe)
        if facts["data"] != data:
            changed.append(f"the data set: {facts['data'][:12]} -> {data[:12]}")
        needs_teacher = zip(recipe.all_teachers, facts.get("teachers", []), teachers, strict=False)
        changed += [
            f"the weights of teacher {teacher.run}: {before[:12]} -> {after[:12]}"
            for teacher, before, after in needs_teacher  # of other lengths: that is in the recipe
            if before != after
        ]
        if changed and facts["step"] == 0:
            remove_folder(saved)
            saved, facts = None, {}
        elif changed:
            raise UserError(
                f"{folder} was trained with another recipe ({'; '.join(changed)}); "
                "give this one a name (name=...), or go on all the same with --force"
            )
    return saved, None if force and recipe.run.micro_batches else facts.get("micro_batches")


def claim_folder(recipe: Recipe, environment: dict[str, Any], saved: Path | None) -> None:
    """Make the folder this recipe's, from `saved` on: what says otherwise makes room.

    A damaged checkpoint that is newer is renamed, since it would be kept as one of the newest.
    """
    folder = recipe.folder
    for newer in checkpoints(folder / "checkpoints"):
        if newer == saved:
            break
        aside = newer.with_name(f"damaged_{newer.name}")
        remove_folder(aside)
        rename(newer, aside)
    summary = results.read_summary(folder)
    if summary and summary.get("finished"):  # a forced run is not, until it ends
        (folder / "summary.json").unlink()
    (folder / "stopped").unlink(missing_ok=True)
    atomic_write(folder / "recipe.yaml", to_yaml(recipe))
    write_json(folder / "environment.json", environment)


def check_world_size(recipe: Recipe, *, micro_batches: int, world_size: int) -> None:
    """Refuse more processes than shards, and ranks that would call a sharded teacher unequally often."""
    if world_size > micro_batches:
        raise UserError(
            f"{world_size} processes for {micro_batches} micro-batches of the batch would leave some "
            f"idle; start at most {micro_batches}, or cut the batch anew: run.micro_batches={world_size}"
        )
    if micro_batches % world_size and "sharded" in (t.placement for t in recipe.all_teachers):
        raise UserError(
            f"{micro_batches} shards of the batch on {world_size} processes would call the sharded "
            "teacher more often on some; start a number that divides the shards, or give every "
            "process the whole teacher (placement: replicated)"
        )


def find_finished_run(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of this very recipe with these very data and teachers when it is finished, else None."""
    folder = recipe.folder
    summary = results.read_summary(folder)
    if not summary or not summary.get("finished") or not summary.keys() >= REQUIRED_KEYS:
        return None
    surroundings = read_json(folder / "environment.json")
    if not isinstance(surroundings, dict) or recipe_diff(recipe):
        return None
    same = surroundings.get("data") == data_digest(Path(recipe.data.path))
    teachers = [find_teacher(teacher).digest for teacher in recipe.all_teachers]
    return summary if same and surroundings.get("teachers", []) == teachers else None
