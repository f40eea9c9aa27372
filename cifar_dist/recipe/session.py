"""Start the processes of a launch with the settings of a recipe, and end them together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator

from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.error_propagation import propagate_errors
from cifar_dist.distributed.launch import init_distributed
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log
from cifar_dist.utils.precision import (
    Precision,
    auto_precision,
    check_precision,
    emulation_warning,
    is_native,
)


@contextmanager
def distributed_session(recipe: Recipe, *, threads: int | None = None) -> Iterator[Accelerator]:
    """Join the launcher's process group, or run alone; leave it at the end.

    An error that one rank meets alone ends all ranks with one message. `threads` replaces the
    recipe's number of CPU threads.
    """
    accelerator = init_distributed(
        timeout_seconds=recipe.run.timeout_seconds,
        threads=recipe.run.threads or threads,
        deterministic=recipe.run.deterministic,
    )
    with propagate_errors(accelerator):
        check_precision(recipe.run.precision, accelerator.device)
        yield accelerator


def with_precision(recipe: Recipe, precision: Precision) -> Recipe:
    return replace(recipe, run=replace(recipe.run, precision=precision))


def format_precision(asked: Precision, resolved: Precision) -> str:
    return f"auto ({resolved} here)" if asked == "auto" else resolved


def keep_precision(recipe: Recipe) -> Recipe:
    """Replace `run.precision: auto` by the precision of the run folder, if the run has started."""
    saved = recipe.folder / "recipe.yaml"
    if recipe.run.precision != "auto" or not saved.exists():
        return recipe
    try:
        return with_precision(recipe, load_recipe(saved).run.precision)
    except UserError:  # written by a version with other keys
        return recipe


def resolve_precision(recipe: Recipe, context: DistContext, device: torch.device) -> Recipe:
    """Replace `run.precision: auto` by the run folder's precision or the device's. Collective.

    Logs a warning if a rank only emulates the precision. UserError if the ranks' devices differ.
    """
    recipe = keep_precision(recipe)
    if recipe.run.precision == "auto":
        choices = context.all_gather_object(auto_precision(device))
        other = next((rank for rank, one in enumerate(choices) if one != choices[0]), None)
        if other is not None:
            raise UserError(
                f"run.precision=auto is {choices[0]} on rank 0 and {choices[other]} on rank {other}, "
                "whose processors differ; set run.precision=fp32, or start on equal machines"
            )
        recipe = with_precision(recipe, choices[0])
    precision = recipe.run.precision
    check_precision(precision, device)
    emulated = device.type == "cpu" and not is_native(precision, device)
    if any(context.all_gather_object(emulated)) and context.is_main:
        log.warning(emulation_warning(precision))
    return recipe
