"""Floor 5. Run folders as commands meet them: to go on in, to evaluate, to learn from."""

from __future__ import annotations

from pathlib import Path

from cifar_dist.models.backbones import Classifier, build_model
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder.checkpoint import (
    checkpoints,
    find_corruption,
    latest_valid,
    load_tensors,
)
from cifar_dist.utils.errors import UserError


def load_run(folder: Path, checkpoint: str | None = None) -> tuple[Recipe, Path]:
    """A run's resolved recipe and one of its checkpoints: the newest valid one, or by name."""
    if not (folder / "recipe.yaml").exists():
        raise UserError(
            f"{folder} is no run folder (no recipe.yaml in it); train it first, or give another"
        )
    recipe = load_recipe(folder / "recipe.yaml")
    if checkpoint is None:
        saved = latest_valid(folder / "checkpoints")
        if saved is None:
            raise UserError(f"{folder} has no checkpoint yet; train it first")
        return recipe, saved
    saved = folder / "checkpoints" / checkpoint
    if not saved.is_dir():
        there = ", ".join(path.name for path in checkpoints(folder / "checkpoints")) or "none"
        raise UserError(f"{folder} has no checkpoint {checkpoint}; those it has: {there}")
    reason = find_corruption(saved)
    if reason is not None:
        raise UserError(f"{saved}: {reason}; choose another with --checkpoint")
    return recipe, saved


def eval_weights_file(recipe: Recipe, saved: Path) -> str:
    """The file of the weights that a checkpoint is judged by: the average's where the recipe has one."""
    name = "average.safetensors" if recipe.averaging else "model.safetensors"
    if not (saved / name).exists():  # checked as a whole: it never was there
        raise UserError(
            f"{saved} has no average yet, as the run was forced on with `averaging` since; let it save once more"
        )
    return name


def load_model(recipe: Recipe, saved: Path, num_classes: int) -> Classifier:
    """The model that a checkpoint is judged by."""
    name = eval_weights_file(recipe, saved).removesuffix(".safetensors")
    return build_model(recipe.model, num_classes, load_tensors(saved, name))
