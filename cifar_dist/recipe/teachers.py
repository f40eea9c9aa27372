"""Find the weights of teachers, and what their cached logits depend on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cifar_dist.data.dataset import class_names, data_digest, read_digest
from cifar_dist.distill.logit_cache import check_cache
from cifar_dist.distill.teacher import TeacherConfig, Trained
from cifar_dist.losses.classification import logit_scale
from cifar_dist.recipe.load import validate
from cifar_dist.recipe.runs import judged_file, load_run
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder.checkpoint import (
    digest_of,
)
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import read_json, sha256

OWN_EXPORT = "cifar_dist.json"  # in a folder of `export --to teacher`: how to build the model


def exported_teacher(folder: Path) -> Trained:
    """What `export --to teacher` wrote."""
    said, weights = read_json(folder / OWN_EXPORT), folder / "model.safetensors"
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
