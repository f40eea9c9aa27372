"""Load recipe, checkpoint and model of a run folder, and identify its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_dist.data.dataset import DIGEST, OFFICIAL_DIGEST, data_digest, read_digest
from cifar_dist.data.ingest.archive import CIFAR_10, CIFAR_100
from cifar_dist.data.ingest.preparation import SYNTHETIC
from cifar_dist.models.classifier import Classifier, build_model
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder.checkpoint import (
    checkpoints,
    digest_of,
    find_corruption,
    latest_valid,
    load_tensors,
)
from cifar_dist.utils.errors import UserError


def load_run(folder: Path, checkpoint: str | None = None) -> tuple[Recipe, Path]:
    """Return a run's recipe and a checkpoint: by name, otherwise the newest valid one."""
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} is not a run folder (it has no recipe.yaml): train it first")
    recipe = load_recipe(folder / "recipe.yaml")
    if checkpoint is None:
        saved = latest_valid(folder / "checkpoints")
        if saved is None:
            raise UserError(f"{folder} has no checkpoint yet: train it first")
        return recipe, saved
    saved = folder / "checkpoints" / checkpoint
    if not saved.is_dir():
        names = ", ".join(path.name for path in checkpoints(folder / "checkpoints")) or "none"
        raise UserError(f"{folder} has no checkpoint {checkpoint}; it has: {names}")
    reason = find_corruption(saved)
    if reason is not None:
        raise UserError(f"{saved}: {reason}; choose another with --checkpoint")
    return recipe, saved


def eval_weights_file(recipe: Recipe, saved: Path) -> str:
    """Return the name of the evaluated weights' file: those of the average if the recipe has one."""
    name = "average.safetensors" if recipe.averaging else "model.safetensors"
    if not (saved / name).exists():  # the checkpoint is valid, so it was written without an average
        raise UserError(
            f"{saved} has no average, but the recipe of its run has `averaging`; restore the run's "
            "recipe.yaml"
        )
    return name


def training_data(recipe: Recipe, environment: dict[str, Any], data: Path) -> str:
    """Return what a run was trained on: `CIFAR-100`, or a description of other data or labels.

    `environment` is its environment.json, and `data` the folder of its data, which may be absent.
    """
    digest = environment.get("data")
    name = "unknown data" if digest is None else _data_name(recipe, digest, data)
    return name if recipe.data.labels == "fine" else f"the superclasses of {name}"


def _data_name(recipe: Recipe, digest: str, data: Path) -> str:
    if digest == OFFICIAL_DIGEST:
        return CIFAR_100.name
    is_present = (data / DIGEST).exists() and data_digest(data) == digest
    content = read_digest(data)["content"] if is_present else recipe.data.source
    if content == SYNTHETIC:
        return "synthetic data, not CIFAR-100"
    return CIFAR_10.name if content in (CIFAR_10.content, CIFAR_10.url) else "other data"


def weights_digest(recipe: Recipe, saved: Path) -> str:
    """Return the SHA-256 of the evaluated weights of an intact checkpoint."""
    return digest_of(saved, eval_weights_file(recipe, saved))


def load_model(recipe: Recipe, saved: Path, num_classes: int) -> Classifier:
    """Return the evaluated model of a checkpoint."""
    name = eval_weights_file(recipe, saved).removesuffix(".safetensors")
    return build_model(recipe.model, num_classes, load_tensors(saved, name))
