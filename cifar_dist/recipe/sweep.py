"""The definition of a sweep: which values of a recipe to try, and how to compare them."""

from __future__ import annotations

import itertools
import json
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from cifar_dist.recipe.load import ALIASES, load_recipe, validate_with
from cifar_dist.recipe.schema import Recipe
from cifar_dist.utils.config import Count, Index, config
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.recipe_files import find_recipe, read_yaml
from cifar_dist.utils.suggest import refuse_unknown_keys

METRICS = ("val_top1", "val_top5", "val_loss")
# With several values of them, or of keys below them, trials could not be compared.
FIXED_KEYS = (
    "name",
    "run.output_dir",
    "run.epochs",
    "data.val_size",
    "data.fraction",
    "data.long_tail",
    "data.label_noise",
    "data.path",
    "tracking.group",
)


@config
class Values:
    """The values of one key: a range, or a list of choices."""

    low: int | float | None = None  # with `high`: a range; whole numbers if both are
    high: int | float | None = None
    log: bool = False  # search the logarithm
    choices: tuple[bool | int | float | str | None, ...] | None = None

    def __post_init__(self) -> None:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("give either choices, or low and high")
        if self.choices is not None and (not self.choices or self.log):
            raise ValueError("choices need at least one value, and no log")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(
                    f"the range is empty: low {self.low} must be below high {self.high}"
                )
            if self.log and self.low <= 0:
                raise ValueError("log needs low above 0")

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values that must be valid in a recipe."""
        return (self.low, self.high) if self.choices is None else self.choices


@config
class SamplerConfig:
    name: Literal["tpe", "random", "grid"] = "tpe"
    seed: Index = 0


@config
class PrunerConfig:
    """Successive halving: of the trials that reach a rung, the best 1 / reduction_factor go further."""

    name: Literal["successive_halving"] = "successive_halving"
    min_epochs: Count = 1  # epochs before the first rung
    reduction_factor: Count = 3  # of the trials at a rung, and of the epochs between rungs


@config
class Sweep:
    recipe: str  # a YAML file, or a name that `cifar-dist recipes` lists
    search: dict[str, Values]  # by recipe key, like optim.lr
    set: dict[str, Any] = field(default_factory=dict)  # recipe overrides of all trials
    metric: str = "val_top1"  # of the last evaluation, on validation rows
    sampler: SamplerConfig = SamplerConfig()
    pruner: PrunerConfig | None = None
    trials: Count | None = None  # null, only with sampler grid: all combinations

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(
                f"metric must be one of {', '.join(METRICS)} (got {self.metric!r}): "
                "hyper-parameters chosen on the test split overestimate the accuracy"
            )
        if not self.search:
            raise ValueError("search is empty; name at least one key, like optim.lr")
        if fixed := [key for key in self.search if key.startswith(FIXED_KEYS)]:
            raise ValueError(f"search cannot contain {fixed[0]}")
        if self.sampler.name == "grid":
            if any(values.choices is None for values in self.search.values()):
                raise ValueError("sampler grid needs choices for each key, not a range")
        elif self.trials is None:
            raise ValueError("trials is missing: the number of trials to train")
        if self.pruner and self.pruner.reduction_factor < 2:
            raise ValueError("pruner.reduction_factor must be at least 2")

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return "minimize" if self.metric == "val_loss" else "maximize"

    @property
    def grid(self) -> list[dict[str, Any]]:
        """All combinations of the choices, for the sampler grid."""
        columns = [values.choices or () for values in self.search.values()]
        return [dict(zip(self.search, row, strict=True)) for row in itertools.product(*columns)]

    @property
    def num_trials(self) -> int:
        if self.sampler.name == "grid":
            return min(self.trials or len(self.grid), len(self.grid))
        assert self.trials is not None
        return self.trials

    def overrides(self, values: dict[str, Any]) -> list[str]:
        """Return `section.key=value` for `set` and a trial's values."""
        return [f"{key}={format_value(value)}" for key, value in (self.set | values).items()]

    def trial_recipe(self, values: dict[str, Any]) -> Recipe:
        return load_recipe(find_recipe(self.recipe), self.overrides(values))


def format_value(value: Any) -> str:
    """Return a value as it is written in an override."""
    return json.dumps(value)


ADAPTER = TypeAdapter(Sweep)


def load_sweep(path: Path) -> tuple[Sweep, Recipe]:
    """Read the definition of a sweep; return it and the recipe of one trial.

    UserError if the definition, or the recipe with an extreme value of a key, is wrong.
    """
    raw = read_yaml(path)
    refuse_unknown_keys(raw, Sweep, where=str(path), aliases=ALIASES)
    sweep = validate_with(ADAPTER, raw, where=str(path))
    first = {key: values.extremes[0] for key, values in sweep.search.items()}
    for key, values in sweep.search.items():
        for value in values.extremes:
            try:
                recipe = sweep.trial_recipe(first | {key: value})
            except UserError as error:
                raise UserError(f"{path}: with {key}={format_value(value)}: {error}") from None
    if not recipe.data.val_size:
        raise UserError(
            f"{path}: {sweep.metric} needs validation rows: add `set: {{data.val_size: 5000}}`"
        )
    return sweep, recipe
