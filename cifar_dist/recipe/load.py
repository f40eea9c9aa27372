"""Read a YAML recipe, apply overrides, and validate it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cifar_dist.data.training_rows import DataConfig
from cifar_dist.recipe.schema import ADAPTER, Recipe
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.recipe_files import apply_override, read_yaml
from cifar_dist.utils.suggest import refuse_unknown_keys

T = TypeVar("T")

# Keys of other trainers and of earlier versions -> the key here.
ALIASES = {
    "gradient_accumulation_steps": "run.micro_batches (parts of the global batch)",
    "accumulate_grad_batches": "run.micro_batches (parts of the global batch)",
    "shards": "run.micro_batches",
    "mixed_precision": "run.precision",
    "amp": "run.precision",
    "num_epochs": "run.epochs",
    "num_processes": "nothing: the launcher decides the number of processes",
    "num_gpus": "nothing: the launcher decides the number of processes",
    "learning_rate": "optim.lr",
    "wd": "optim.weight_decay",
    "scheduler": "optim.schedule",
    "name_or_path": "model.backbone",
    "per_device_train_batch_size": "run.batch_size (the global batch)",
    "wandb": "tracking.mode",
    "graph": "run.cuda_graphs",
    "output": "run.output_dir",
    "report_every_steps": "run.log_every_steps",
    "stop_after_epochs_without_gain": "run.early_stopping_patience",
    "reduce_precision": "run.grad_reduce_dtype",
    "holdout": "data.val_size",
    "ema": "averaging",
    "growing": "model.progressive_resize",
    "second_size": "model.mixed_resolution",
    "host": "augment.albumentations (a list of {Name: {arguments}})",
    "host_workers": "augment.workers",
    "repeats": "augment.repeated",
    "flip": "augment.hflip",
    "vertical_flip": "augment.vflip",
    "probability": "p",
    "target": "alpha",
    "others": "beta",
    "softness": "lambda_",
}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe and apply `section.key=value` overrides; UserError with path and remedy.

    An override of `data.path` alone removes `data.source`.
    """
    raw = read_yaml(path)
    overrides = overrides or []
    path_in_file = data_path(raw)
    for override in overrides:
        apply_override(raw, override)
    if data_path(raw) != path_in_file and not any(
        override.startswith(("data.source=", "data=")) for override in overrides
    ):
        raw["data"]["source"] = None  # a mistyped path must not be filled with new data
    return validate(raw, where=str(path))


def data_path(raw: dict[str, Any]) -> Any:
    """Return `data.path` of a recipe that has not been validated."""
    data = raw.get("data")
    return data.get("path", DataConfig.path) if isinstance(data, dict) else DataConfig.path


def validate(raw: dict[str, Any], *, where: str) -> Recipe:
    """Build a recipe from plain data; types are strict and unknown keys are an error."""
    refuse_unknown_keys(raw, Recipe, where=where, aliases=ALIASES)
    return validate_with(ADAPTER, raw, where=where)


def validate_with(adapter: TypeAdapter[T], raw: dict[str, Any], *, where: str) -> T:
    """Build the adapter's config class from plain data; UserError with the keys at fault."""
    try:
        text = json.dumps(raw, allow_nan=False)
    except ValueError:
        raise UserError(f"{where}: contains a number that is not finite") from None
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        problems = describe_errors(error.errors(), raw)
        raise UserError(f"{where}: {'; '.join(problems[:4])}") from None


def describe_errors(errors: Sequence[Mapping[str, Any]], raw: dict[str, Any]) -> list[str]:
    """Return one message per key; pydantic reports each alternative of a union separately."""
    messages: dict[str, str] = {}
    values: dict[str, str] = {}
    for error in errors:
        key, message = dotted_key(error, raw), error["msg"].removeprefix("Value error, ")
        if error["type"] == "bool_type":
            message = "write true or false"
        if key in messages:
            message = f"{messages[key]}, or {message.removeprefix('Input should be ')}"
        messages[key] = message
        if error["type"] not in ("missing", "value_error"):
            values[key] = f" (got {error['input']!r})"
    return [f"{key}: {message}{values.get(key, '')}" for key, message in messages.items()]


def dotted_key(error: Mapping[str, Any], raw: dict[str, Any]) -> str:
    """Return the key of a pydantic error, like `optim.lr`.

    Its location also names the alternatives of unions, like `literal['alternate']`, which are left out.
    """
    value: Any = raw
    keys = []
    for part in error["loc"]:
        with suppress(LookupError, TypeError):  # not a key of the recipe
            value = value[part]
            keys.append(str(part))
    if error["type"] == "missing":
        keys.append(str(error["loc"][-1]))
    return ".".join(keys) or "recipe"
