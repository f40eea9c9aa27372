"""Find the weights of teachers, and what their cached logits depend on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cifar_dist.data.dataset import Labels, class_names, classes_digest, data_digest, read_digest
from cifar_dist.distill.logit_cache import check_cache
from cifar_dist.distill.teacher import TeacherConfig, TeacherWeights
from cifar_dist.losses.registry import logit_scale
from cifar_dist.recipe.load import validate
from cifar_dist.recipe.runs import eval_weights_file, load_run
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder.checkpoint import digest_of, load_progress
from cifar_dist.run_folder.results import read_summary
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import read_json, sha256
from cifar_dist.utils.log import log

TEACHER_EXPORT = "cifar_dist.json"  # in a folder of `export --to teacher`: how to build the model


def exported_teacher(folder: Path) -> TeacherWeights:
    """Load a folder of `export --to teacher`."""
    weights = folder / "model.safetensors"
    content = read_json(folder / TEACHER_EXPORT, "export the teacher again")
    if (
        content is None
        or content.keys() != {"model", "logit_scale", "data", "classes"}
        or not isinstance(content["logit_scale"], int | float)
        or not weights.is_file()
    ):
        raise UserError(f"{folder} is damaged; export the teacher again")
    model = content["model"]
    is_cosine = isinstance(model, dict) and model.get("head") == "cosine"
    loss = "arcface" if is_cosine else "cross_entropy"  # one that fits the head
    recipe = validate(
        {"name": "teacher", "model": model, "losses": {loss: {}}},
        where=str(folder / TEACHER_EXPORT),
    )
    return TeacherWeights(
        model=recipe.model,
        weights=weights,
        digest=sha256(weights),
        logit_scale=float(content["logit_scale"]),
        data=content["data"],
        classes=content["classes"],
    )


def find_teacher(config: TeacherConfig) -> TeacherWeights:
    """Return the evaluated weights of a run's newest checkpoint, of an export, or of a file."""
    path = Path(config.run)
    if config.model is not None:
        if not path.is_file():
            raise UserError(f"teacher.run: {path} does not exist")
        scale = config.logit_scale or 1.0
        return TeacherWeights(
            model=config.model, weights=path, digest=sha256(path), logit_scale=scale
        )
    if (path / TEACHER_EXPORT).exists():
        return exported_teacher(path)
    recipe, saved = load_run(path)
    name = eval_weights_file(recipe, saved)
    progress, summary = load_progress(saved), read_summary(path) or {}
    is_finished = bool(summary.get("finished")) and summary.get("steps") == progress["step"]
    return TeacherWeights(
        model=recipe.model,
        weights=saved / name,
        digest=digest_of(saved, name),
        logit_scale=logit_scale(recipe.losses.values()),
        data=progress.get("data"),
        classes=progress.get("classes"),
        step=progress["step"],
        top1=summary.get("top1") if is_finished else None,
        is_finished=is_finished,
    )


def check_teacher(
    config: TeacherConfig, teacher: TeacherWeights, data: Path, labels: Labels
) -> None:
    """Log what a teacher is; warn of other data and an unfinished training.

    UserError if its classes are not these labels of `data`, in the same order.
    """
    if teacher.classes not in (None, classes_digest(class_names(data, labels))):
        raise UserError(
            f"teacher.run={config.run}: was trained on other classes than the {labels} labels of "
            f"{data}, or in another order, so it would teach wrong labels; train a teacher on them"
        )
    accuracy = "" if teacher.top1 is None else f", top1 {teacher.top1:.2f} %"
    step = "" if teacher.step is None else f" at step {teacher.step}"
    log.info(f"teacher {config.run}: {teacher.weights.name}{step}{accuracy}")
    if teacher.data not in (None, data_digest(data)):
        log.warning(
            f"teacher {config.run} was trained on other images of these classes than {data}"
        )
    if teacher.is_finished is False:
        log.warning(f"teacher {config.run} has not finished its training")


def cache_fingerprint(recipe: Recipe, teacher: TeacherWeights) -> dict[str, Any]:
    """Return everything that a teacher's logits for the recipe's views depend on."""
    data, augment = Path(recipe.data.path), asdict(recipe.augment)
    rows, classes = read_digest(data)["train"]["rows"], len(class_names(data, recipe.data.labels))
    del augment["repeated"]  # repeated copies are views like any other
    del augment["workers"]  # images do not depend on who makes them
    if recipe.augment.views == "all":
        del augment["seed"]  # every draw is one of the enumerated views
    if recipe.augment.uses_mixing:  # partners are training rows; no image depends on a label
        augment["val_size"] = recipe.data.val_size
        fraction, long_tail = recipe.data.subset
        if fraction != 1:
            augment["fraction"] = fraction
        if long_tail:
            augment["long_tail"] = long_tail.imbalance
    model = asdict(teacher.model)
    del model["freeze"]  # does not change a trained model
    fingerprint = {
        "shape": [recipe.augment.num_views, rows, classes],
        "data": data_digest(data),
        "precision": recipe.run.precision,
        "teacher": teacher.digest,
        "teacher.logit_scale": teacher.logit_scale,
        **{f"teacher.model.{name}": value for name, value in model.items()},
        **{f"augment.{name}": value for name, value in augment.items()},
    }
    return json.loads(json.dumps(fingerprint))  # as a manifest stores it


def check_caches(recipe: Recipe, teachers: Sequence[TeacherWeights]) -> None:
    """UserError for a cache of logits that was made for another recipe or teacher."""
    for config, weights in zip(recipe.all_teachers, teachers, strict=True):
        if config.placement == "cached":
            check_cache(config.cache_folder, cache_fingerprint(recipe, weights))
