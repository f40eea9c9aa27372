"""Compare recipes: which differences make it another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_dist.recipe.load import validate
from cifar_dist.recipe.schema import Recipe, to_dict
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.recipe_files import read_yaml

# They do not change the results, so a run may be resumed with other values.
NON_SEMANTIC_KEYS = (
    "run.output_dir",
    "run.threads",
    "run.eval_every_epochs",
    "run.save_every_minutes",
    "run.log_every_steps",
    "run.keep_checkpoints",
    "run.compile",
    "run.cuda_graphs",
    "run.timeout_seconds",
    "run.on_nonfinite",
    "data.path",
    "data.source",
    "data.place",
    "augment.workers",
    "tracking",
)
TEACHER_PLACEMENT_KEYS = (".placement", ".shard_over", ".cache")  # likewise, of each teacher
# Runs that differ only in these are seeds of one experiment.
SEED_KEYS = ("name", "run.seed", "run.micro_batches", "augment.seed", "data.label_noise.seed")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested dict as {"run.epochs": 200, ...}; dicts in lists are numbered."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    pairs: dict[str, Any] = {}
    for name, item in value.items():
        pairs |= flatten(item, f"{prefix}.{name}".lstrip("."))
    return pairs


def non_semantic_keys(recipe: Recipe) -> tuple[str, ...]:
    """Return NON_SEMANTIC_KEYS, without the evaluation interval if early stopping depends on it."""
    semantic = "run.eval_every_epochs" if recipe.run.early_stopping_patience else None
    return tuple(name for name in NON_SEMANTIC_KEYS if name != semantic)


def recipe_diff(recipe: Recipe, folder: Path | None = None) -> list[str]:
    """Return the differences from the recipe in a run folder, like `run.epochs: 200 -> 300`.

    The default folder is the recipe's own.
    """
    path = (folder or recipe.folder) / "recipe.yaml"
    if not path.exists():
        return []
    raw = read_yaml(path)
    try:
        before = flatten(to_dict(validate(raw, where=str(path))))  # with today's defaults
    except UserError:  # of a version with other keys
        before = flatten(raw)
    return [
        f"{name}: {old} -> {new}"
        for name, old, new in config_diff(before, flatten(to_dict(recipe)))
        if not name.startswith(non_semantic_keys(recipe))
        and not name.endswith(TEACHER_PLACEMENT_KEYS)
    ]


def config_diff(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, old, new) where two flattened recipes differ; missing keys have their defaults."""
    default = flatten(to_dict(Recipe(name="default")))
    for name in [name for name in default if name.startswith("losses.")]:
        del default[name]  # a loss without a key is not used
    return [
        (name, old, new)
        for name in sorted(before.keys() | after.keys())
        if (old := before.get(name, default.get(name)))
        != (new := after.get(name, default.get(name)))
    ]


def seed_free_config(recipe: Recipe) -> dict[str, Any]:
    """Return what two runs have in common that differ only in their seeds."""
    return {
        name: value
        for name, value in flatten(to_dict(recipe)).items()
        if not name.startswith((*non_semantic_keys(recipe), *SEED_KEYS))
        and not name.endswith(TEACHER_PLACEMENT_KEYS)
    }
