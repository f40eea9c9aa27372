"""The Python API: train, evaluate and use models from a notebook or a script.

    from cifar_dist.api import evaluate, load_model, load_recipe, train

See docs/api.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_dist.distributed.context import DistContext
from cifar_dist.evaluate import check_robustness_options
from cifar_dist.inference.evaluate_run import (
    EvalSplit,
    evaluate_run,
    plan_evaluation,
    store_evaluation,
)
from cifar_dist.inference.trained_model import TrainedModel, load_trained_model
from cifar_dist.recipe import load
from cifar_dist.recipe.schema import Recipe
from cifar_dist.recipe.session import distributed_session
from cifar_dist.train import run_training
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log_to_terminal

__all__ = ["Recipe", "TrainedModel", "UserError", "evaluate", "load_model", "load_recipe", "train"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a YAML recipe; `overrides` are like `run.epochs=2`. UserError if it is invalid."""
    return load.load_recipe(Path(path), list(overrides))


def train(recipe: Recipe, *, fork: str | Path | None = None) -> dict[str, Any]:
    """Train a recipe, or resume its run, and return the content of summary.json.

    A finished run is returned without training. In a plain script or notebook it uses one process;
    under `accelerate launch` or `accelerate.notebook_launcher` all processes call it. `fork` is the
    folder of another run, from whose newest checkpoint a new run starts.
    """
    log_to_terminal()
    summary = run_training(recipe, fork=Path(fork) if fork else None)
    if summary is None:
        raise UserError("stopped by a signal before the data were prepared")
    return summary


def load_model(
    run: str | Path, checkpoint: str | None = None, *, data: str | Path | None = None
) -> TrainedModel:
    """Load the newest checkpoint of a run, or one by name, on the accelerator or the CPU.

    `logits` takes uint8 images [N, 3, S, S], S = `data_size`; `probabilities` uses the temperature that
    `evaluate` chose on the validation rows, if there are any. `data` is the folder of the run's data, if it has moved.
    """
    return load_trained_model(Path(run), checkpoint, Path(data) if data else None)


def evaluate(
    run: str | Path,
    *,
    checkpoint: str | None = None,
    split: EvalSplit = "test",
    tta_flip: bool = False,
    corruptions: str | Path | None = None,
    ood: str | Path | None = None,
    data: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a run and return its report: accuracies in percent, scores per class, calibration.

    The test split at the newest checkpoint is also written to RUN/evaluation, as by
    `python -m cifar_dist.evaluate`. `corruptions` is "generated" or the folder of CIFAR-100-C, `ood` a
    folder of out-of-distribution data. `data` is the folder of the run's data, if it has moved.
    """
    log_to_terminal()
    corruptions, ood = str(corruptions) if corruptions else None, Path(ood) if ood else None
    check_robustness_options(corruptions, ood, split)
    job = plan_evaluation(
        Path(run),
        checkpoint=checkpoint,
        split=split,
        tta_flip=tta_flip,
        corruptions=corruptions,
        ood=ood,
        data=Path(data) if data else None,
    )
    with distributed_session(job.recipe, threads=job.threads) as accelerator:
        context = DistContext.of(accelerator)
        evaluation = evaluate_run(
            job, cifair=None, near_duplicates=None, context=context, device=accelerator.device
        )
        context.run_on_main(store_evaluation, job, evaluation)
    return evaluation.report
