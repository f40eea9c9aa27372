"""Start the processes of a launch with the settings of a recipe, and end them together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from cifar_dist.distributed.error_propagation import propagate_errors
from cifar_dist.distributed.launch import init_distributed
from cifar_dist.recipe.schema import Recipe
from cifar_dist.utils.precision import check_precision


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
