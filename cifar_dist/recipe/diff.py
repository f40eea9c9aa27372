"""Compare recipes: which differences make it another run."""

from __future__ import annotations

from typing import Any

from cifar_dist.recipe.load import read_yaml, validate
from cifar_dist.recipe.schema import Recipe, to_dict
from cifar_dist.utils.errors import UserError

# Where it is written, how often it reports, where the data lie: never "a changed recipe".
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


TEACHER_PLACEMENT_KEYS = (
    ".placement",
    ".shard_over",
    ".cache",
)  # of a teacher: other costs, the same numbers


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as {"run.epochs": 200, ...}; lists of numbers are values, others are numbered."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(place): inner for place, inner in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    pairs: dict[str, Any] = {}
    for name, inner in value.items():
        pairs |= flatten(inner, f"{prefix}.{name}".lstrip("."))
    return pairs


def non_semantic_keys(recipe: Recipe) -> tuple[str, ...]:
    """NOT_THE_RECIPE, but for how often it looks, where that decides when it ends."""
    looks = "run.eval_every_epochs" if recipe.run.early_stopping_patience else None
    return tuple(name for name in NON_SEMANTIC_KEYS if name != looks)


def recipe_diff(recipe: Recipe) -> list[str]:
    """How it differs from the one that its run folder was trained with: `run.epochs: 200 -> 300`."""
    path = recipe.folder / "recipe.yaml"
    if not path.exists():
        return []
    raw = read_yaml(path)
    try:
        before = flatten(to_dict(validate(raw, where=str(path))))  # with today's defaults
    except UserError:
        before = flatten(raw)  # of a version that had other keys or allowed more
    return [
        f"{name}: {old} -> {new}"
        for name, old, new in config_diff(before, flatten(to_dict(recipe)))
        if not name.startswith(non_semantic_keys(recipe))
        and not name.endswith(TEACHER_PLACEMENT_KEYS)
    ]


def config_diff(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, old, new) wherever two flat recipes differ.

    What one of them does not name, since it is older or a section is not there, has its default.
    """
    default = flatten(to_dict(Recipe(name="default")))
    for name in [name for name in default if name.startswith("losses.")]:
        del default[name]  # a loss that is not named is none
    return [
        (name, old, new)
        for name in sorted(before.keys() | after.keys())
        if (old := before.get(name, default.get(name)))
        != (new := after.get(name, default.get(name)))
    ]


SEED_KEYS = ("name", "run.seed", "run.micro_batches", "augment.seed")


def seed_free_config(recipe: Recipe) -> dict[str, Any]:
    """What two runs have in common that differ in their seeds alone; `run.micro_batches` is the run's to say."""
    return {
        name: value
        for name, value in flatten(to_dict(recipe)).items()
        if not name.startswith((*non_semantic_keys(recipe), *SEED_KEYS))
        and not name.endswith(TEACHER_PLACEMENT_KEYS)
    }
