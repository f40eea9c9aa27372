"""Floor 5. Run folders as commands meet them: to go on in, to evaluate, to learn from."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cifar_dist import signals
from cifar_dist.data.arrow import class_names, data_digest, read_digest
from cifar_dist.engine import results
from cifar_dist.engine.checkpoint import (
    checkpoints,
    damage,
    digest_of,
    load_progress,
    load_tensors,
    newest_valid,
)
from cifar_dist.engine.runtime import log
from cifar_dist.errors import UserError, is_main_rank
from cifar_dist.files import remove_folder, rename, sha256, write_file, write_json
from cifar_dist.learn.logit_cache import check_cache
from cifar_dist.learn.losses import logit_scale
from cifar_dist.learn.teacher import TeacherConfig, Trained
from cifar_dist.nets.backbones import Classifier, build_model
from cifar_dist.prepare import prepare
from cifar_dist.recipe import Recipe, load_recipe, recipe_changes, to_yaml, validate

OWN_EXPORT = "cifar_dist.json"  # in a folder of `export --to teacher`: how to build the model
TOLD = {"top1", "epochs", "seconds"}  # of a finished run
SAMPLE_NOTE = (
    "This is the drawn sample, not CIFAR-100. The real thing: "
    "accelerate launch -m cifar_dist.train recipes/r18_32.yaml"
)


def wait_for_data(path: Path, source: str | None) -> bool:
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
        if signals.received():
            return False
        time.sleep(0.2)
        waited += 1
        if waited % 300 == 0:
            log.warning(
                f"waiting for rank 0 to prepare {path}; is this folder shared by all nodes?"
            )
    return True


def say_finished(recipe: Recipe, summary: dict[str, Any], *, is_sample: bool) -> None:
    log.info(
        f"{recipe.name}: finished, top1 {summary['top1']:.2f} % after epoch {summary['epochs']:g} "
        f"in {summary['seconds']:.0f} s; see {recipe.folder}"
        + (f" ({summary['ended_early']})" if "ended_early" in summary else "")
    )
    if is_sample:
        log.info(SAMPLE_NOTE)


def open_run(
    recipe: Recipe, *, data: str, teachers: list[str], force: bool
) -> tuple[Path | None, int | None]:
    """Rank 0 looks into the run folder: (checkpoint to go on from, its shards), both None for a new run.

    A changed recipe, data set or teacher (the latter two by digest) is refused with the difference,
    unless forced. Where not a step was done, it begins anew.
    """
    folder = recipe.folder
    saved = newest_valid(folder / "checkpoints")
    facts = load_progress(saved) if saved else {}
    if saved and not force:
        changed = recipe_changes(recipe)
        if facts["data"] != data:
            changed.append(f"the data set: {facts['data'][:12]} -> {data[:12]}")
        taught = zip(recipe.taught_by, facts.get("teachers", []), teachers, strict=False)
        changed += [
            f"the weights of teacher {teacher.run}: {before[:12]} -> {after[:12]}"
            for teacher, before, after in taught  # of other lengths: that is in the recipe
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
    return saved, None if force and recipe.run.shards else facts.get("shards")


def take_over(recipe: Recipe, surroundings: dict[str, Any], saved: Path | None) -> None:
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
    write_file(folder / "recipe.yaml", to_yaml(recipe))
    write_json(folder / "environment.json", surroundings)


def check_world(recipe: Recipe, *, shards: int, world_size: int) -> None:
    """Refuse more processes than shards, and ranks that would call a sharded teacher unequally often."""
    if world_size > shards:
        raise UserError(
            f"{world_size} processes for {shards} shards of the batch would leave some "
            f"idle; start at most {shards}, or cut the batch anew: run.shards={world_size}"
        )
    if shards % world_size and "sharded" in (t.placement for t in recipe.taught_by):
        raise UserError(
            f"{shards} shards of the batch on {world_size} processes would call the sharded "
            "teacher more often on some; start a number that divides the shards, or give every "
            "process the whole teacher (placement: whole)"
        )


def finished_before(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of this very recipe with these very data and teachers when it is finished, else None."""
    folder = recipe.folder
    summary = results.read_summary(folder)
    if not summary or not summary.get("finished") or not summary.keys() >= TOLD:
        return None
    surroundings = results.read_json(folder / "environment.json")
    if not isinstance(surroundings, dict) or recipe_changes(recipe):
        return None
    same = surroundings.get("data") == data_digest(Path(recipe.data.path))
    teachers = [find_teacher(teacher).digest for teacher in recipe.taught_by]
    return summary if same and surroundings.get("teachers", []) == teachers else None


def load_run(folder: Path, checkpoint: str | None = None) -> tuple[Recipe, Path]:
    """A run's resolved recipe and one of its checkpoints: the newest valid one, or by name."""
    if not (folder / "recipe.yaml").exists():
        raise UserError(
            f"{folder} is no run folder (no recipe.yaml in it); train it first, or give another"
        )
    recipe = load_recipe(folder / "recipe.yaml")
    if checkpoint is None:
        saved = newest_valid(folder / "checkpoints")
        if saved is None:
            raise UserError(f"{folder} has no checkpoint yet; train it first")
        return recipe, saved
    saved = folder / "checkpoints" / checkpoint
    if not saved.is_dir():
        there = ", ".join(path.name for path in checkpoints(folder / "checkpoints")) or "none"
        raise UserError(f"{folder} has no checkpoint {checkpoint}; those it has: {there}")
    reason = damage(saved)
    if reason is not None:
        raise UserError(f"{saved}: {reason}; choose another with --checkpoint")
    return recipe, saved


def judged_file(recipe: Recipe, saved: Path) -> str:
    """The file of the weights that a checkpoint is judged by: the average's where the recipe has one."""
    name = "ema.safetensors" if recipe.ema else "model.safetensors"
    if not (saved / name).exists():  # checked as a whole: it never was there
        raise UserError(
            f"{saved} has no average yet, as the run was forced on with `ema` since; let it save once more"
        )
    return name


def load_model(recipe: Recipe, saved: Path, num_classes: int) -> Classifier:
    """The model that a checkpoint is judged by."""
    name = judged_file(recipe, saved).removesuffix(".safetensors")
    return build_model(recipe.model, num_classes, load_tensors(saved, name))


def exported_teacher(folder: Path) -> Trained:
    """What `export --to teacher` wrote."""
    said, weights = results.read_json(folder / OWN_EXPORT), folder / "model.safetensors"
    if (
        not isinstance(said, dict)
        or said.keys() != {"model", "logit_scale"}
        or not isinstance(said["logit_scale"], int | float)
        or not weights.is_file()
    ):
        raise UserError(f"{folder} is damaged; export the teacher again")
    recipe = validate({"name": "teacher", "model": said["model"]}, where=str(folder / OWN_EXPORT))
    return Trained(
        model=recipe.model,
        weights=weights,
        digest=sha256(weights),
        logit_scale=float(said["logit_scale"]),
    )


def find_teacher(asked: TeacherConfig) -> Trained:
    """The weights that a run is judged by, at its newest checkpoint, or those of an export or a file."""
    path = Path(asked.run)
    if asked.model is not None:
        if not path.is_file():
            raise UserError(f"teacher.run: there is no file {path}")
        scale = asked.logit_scale or 1.0
        return Trained(model=asked.model, weights=path, digest=sha256(path), logit_scale=scale)
    if (path / OWN_EXPORT).exists():
        return exported_teacher(path)
    recipe, saved = load_run(path)
    name = judged_file(recipe, saved)
    return Trained(
        model=recipe.model,
        weights=saved / name,
        digest=digest_of(saved, name),
        logit_scale=logit_scale(recipe.losses.values()),
    )


def cache_origin(recipe: Recipe, teacher: Trained) -> dict[str, Any]:
    """All that decides a teacher's logits for the recipe's views; `run.seed` does not."""
    data, augment = Path(recipe.data.path), asdict(recipe.augment)
    rows, classes = read_digest(data)["train"]["rows"], len(class_names(data))
    del augment["repeats"]  # copies are views like any other
    del augment["host_workers"]  # whoever makes a picture, it is the same
    if recipe.augment.views == "all":
        del augment["seed"]  # whatever is drawn, it is one of them
    if recipe.augment.mixes:  # partners are rows that are trained on
        augment["holdout"] = recipe.data.holdout
    model = asdict(teacher.model)
    del model["freeze"]  # what it says was frozen is no part of a trained model
    made_of = {
        "shape": [recipe.augment.num_views, rows, classes],
        "data": data_digest(data),
        "precision": recipe.run.precision,
        "teacher": teacher.digest,
        "teacher.logit_scale": teacher.logit_scale,
        **{f"teacher.model.{name}": value for name, value in model.items()},
        **{f"augment.{name}": value for name, value in augment.items()},
    }
    return json.loads(json.dumps(made_of))  # as a manifest has it


def check_caches(recipe: Recipe, teachers: Sequence[Trained]) -> None:
    """Refuse a cache of logits that is not exactly that of this recipe and this teacher."""
    for asked, found in zip(recipe.taught_by, teachers, strict=True):
        if asked.placement == "cached":
            check_cache(asked.cache_folder, cache_origin(recipe, found))
