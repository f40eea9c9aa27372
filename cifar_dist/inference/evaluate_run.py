"""Evaluate a checkpoint of a run again and store the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cifar_dist.data.dataset import (
    DIGEST,
    Hierarchy,
    Split,
    classes_digest,
    data_digest,
    load_split,
    read_digest,
    read_hierarchy,
    read_image_size,
)
from cifar_dist.data.ingest.cifair import cifair_split
from cifar_dist.data.ingest.near_duplicates import read_list
from cifar_dist.data.training_rows import TrainingData, training_data
from cifar_dist.distributed.context import DistContext
from cifar_dist.evaluation.evaluator import EvalResult, FlipTTA, evaluate
from cifar_dist.evaluation.report import build_report, log_report, write_evaluation
from cifar_dist.evaluation.robustness import (
    evaluate_corruptions,
    log_robustness,
    ood_scores,
)
from cifar_dist.losses.registry import logit_scale
from cifar_dist.recipe.runs import load_model, load_run, weights_digest
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder.checkpoint import load_progress
from cifar_dist.run_folder.evaluations import EVALUATION_FOLDER, same_data
from cifar_dist.run_folder.results import (
    last_checkpoint,
    read_metadata,
    read_predictions,
    write_predictions,
)
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log

EvalSplit = Literal["test", "train", "val"]


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """What to evaluate, and where to write the result."""

    run: Path
    recipe: Recipe
    checkpoint: Path
    data: Path
    split: EvalSplit
    tta_flip: bool
    corruptions: str | None  # "generated", or the folder of CIFAR-100-C
    ood: Path | None  # the folder of out-of-distribution data
    output: Path | None  # None: log the metrics only
    to_run_folder: bool  # whether `output` is RUN/evaluation
    is_default: bool  # the newest checkpoint on the test split, without test-time augmentation
    is_same_data: bool  # whether `data` is what the run was trained on
    is_finished: bool
    can_repair: bool  # whether lost predictions of the run may be replaced by the result
    threads: int | None  # as in training: another number changes the last bits


@dataclass(frozen=True, kw_only=True)
class RunEvaluation:
    result: EvalResult
    val: EvalResult | None  # on the validation rows
    report: dict[str, Any]
    hierarchy: Hierarchy


def plan_evaluation(
    run: Path,
    *,
    checkpoint: str | None = None,
    split: EvalSplit = "test",
    tta_flip: bool = False,
    data: Path | None = None,
    corruptions: str | None = None,
    ood: Path | None = None,
    output: Path | None = None,
) -> EvalJob:
    """Read the run and decide where to write the result.

    RUN/evaluation is reserved for the default evaluation on the run's own data; UserError if
    `output` is that folder and anything else is to be evaluated, or if `ood` is the data itself.
    """
    recipe, checkpoint_path = load_run(run, checkpoint)
    data = data or Path(recipe.data.path)
    environment = read_metadata(run, "environment.json")
    summary = read_metadata(run, "summary.json")
    is_same_data = same_data(environment, data)
    if corruptions is not None and (size := read_image_size(data)) != 32:
        raise UserError(
            f"--corruptions: are defined for images of 32 px, but {data} has images of {size} px"
        )
    if ood is not None:
        check_ood(ood, {environment.get("data"), data_digest(data)}, data)
    is_default = checkpoint is None and split == "test" and not tta_flip
    default_output = run / EVALUATION_FOLDER
    if output is None and is_default:
        output = default_output
    to_run_folder = output is not None and output.resolve() == default_output.resolve()
    if to_run_folder and not is_same_data:
        raise UserError(
            f"{data} is not the data that {run} was trained on; to evaluate on it anyway, choose "
            "another --output"
        )
    if to_run_folder and not is_default:
        raise UserError(
            f"{default_output} is reserved for the newest checkpoint on the test split without "
            "--tta-flip; choose another --output"
        )
    is_last = checkpoint_path.name == last_checkpoint(summary)
    return EvalJob(
        run=run,
        recipe=recipe,
        checkpoint=checkpoint_path,
        data=data,
        split=split,
        tta_flip=tta_flip,
        corruptions=corruptions,
        ood=ood,
        output=output,
        to_run_folder=to_run_folder,
        is_default=is_default,
        is_same_data=is_same_data,
        is_finished=bool(summary.get("finished")),
        can_repair=is_last and bool(summary.get("finished")),
        threads=recipe.run.threads or environment.get("threads"),
    )


def check_ood(ood: Path, known: set[str | None], data: Path) -> None:
    """Raise UserError if `ood` is no data set, has a `known` digest, or the test split of `data`."""
    if not (ood / DIGEST).exists():
        raise UserError(f"--ood {ood}: has no data; give a folder written by cifar_dist.prepare")
    test_digests = {read_digest(root)["test"]["sha256"] for root in (ood, data)}
    if data_digest(ood) in known or len(test_digests) == 1:
        raise UserError(
            f"--ood {ood}: is the data of the run, not out of distribution; give another data set"
        )


def evaluate_run(
    job: EvalJob,
    *,
    cifair: Path | None,
    near_duplicates: Path | None,
    context: DistContext,
    device: torch.device,
) -> RunEvaluation:
    """Evaluate the requested rows exactly as training does, and the validation rows if there are any."""
    recipe = job.recipe
    if cifair is not None and job.split == "val":
        raise UserError("--cifair cannot be combined with --split val; use --split test")
    if near_duplicates is not None and job.split != "test":
        raise UserError(
            f"--near-duplicates lists rows of the test split; remove it, or --split {job.split}"
        )
    hierarchy = read_hierarchy(job.data, recipe.data.labels)
    classes = load_progress(job.checkpoint).get("classes")
    if classes not in (None, classes_digest(hierarchy.fine)):
        raise UserError(
            f"{job.data} has other classes than the data that {job.run} was trained on, so its accuracy "
            "would mean nothing; evaluate it on data with the same classes"
        )
    model = load_model(recipe, job.checkpoint, len(hierarchy.fine)).to(device)
    model = model.to(memory_format=torch.channels_last)

    def evaluate_rows(split: Split, rows: torch.Tensor) -> EvalResult:
        return evaluate(
            FlipTTA(model) if job.tta_flip else model,
            split,
            rows,
            precision=recipe.run.precision,
            logit_scale=logit_scale(recipe.losses.values()),
            context=context,
            show_progress=True,
        )

    if job.split == "val" and not recipe.data.val_size:
        raise UserError("this run has no validation rows (data.val_size is 0); use --split test")
    val = None
    if recipe.data.val_size:
        train = load_training_data(job, device)
        assert train.val_rows is not None
        val = evaluate_rows(train.split, train.val_rows)
    if job.split == "val":
        assert val is not None
        report = build_report(val, hierarchy)
        return RunEvaluation(result=val, val=val, report=report, hierarchy=hierarchy)
    split, rows = rows_of_split(job, device)
    result = evaluate_rows(split, rows)
    cifair_result = None
    if cifair is not None:
        cifair_images, published = cifair_split(cifair, job.data, device, recipe.data.labels)
        cifair_rows = torch.arange(len(cifair_images.labels))
        cifair_result = evaluate_rows(cifair_images, cifair_rows), published
    report = build_report(
        result,
        hierarchy,
        val=val,
        near_duplicates=read_list(job.data, near_duplicates)
        if job.split == "test" and (near_duplicates or job.is_same_data)
        else None,
        cifair=cifair_result,
    )
    if job.corruptions is not None:
        report["corruptions"] = evaluate_corruptions(
            job.corruptions,
            split,
            lambda corrupted: evaluate_rows(corrupted, rows).metrics["top1"],
            show_progress=context.is_main,
        )
    if job.ood is not None:
        other = load_split(job.ood, "test", device, recipe.data.place)
        other = replace(other, labels=torch.zeros_like(other.labels))  # it may have more classes
        other_result = evaluate_rows(other, torch.arange(len(other.labels)))
        report["ood"] = {
            "data": str(job.ood),
            "digest": data_digest(job.ood),
            "rows": len(other.labels),
            **ood_scores(result.logits, other_result.logits),
        }
    return RunEvaluation(result=result, val=val, report=report, hierarchy=hierarchy)


def load_training_data(job: EvalJob, device: torch.device) -> TrainingData:
    """Return the rows of `job.data` that its recipe trains and validates on, with its labels."""
    data = job.recipe.data
    split = load_split(job.data, "train", device, data.place, data.labels)
    return training_data(data, split)


def rows_of_split(job: EvalJob, device: torch.device) -> tuple[Split, torch.Tensor]:
    """Return the training rows of the run, or all rows of the test split."""
    if job.split == "train":
        train = load_training_data(job, device)
        return train.split, train.rows
    data = job.recipe.data
    split = load_split(job.data, "test", device, data.place, data.labels)
    return split, torch.arange(len(split.labels))


def log_evaluation(job: EvalJob, evaluation: RunEvaluation) -> None:
    step, unfinished = job.checkpoint.name, "" if job.is_finished else " (unfinished)"
    title = f"{job.run}{unfinished} at {step}, {job.split}, {len(evaluation.result.labels):,} rows"
    if not job.is_same_data:
        title += f" of other data ({job.data})"
    if job.tta_flip:
        title += ", mean of each image and its mirror image"
    log_report(evaluation.report, title)
    log_robustness(evaluation.report)


def store_evaluation(job: EvalJob, evaluation: RunEvaluation) -> None:
    """Compare the default evaluation with the run's own predictions, and write all to `job.output`."""
    weights = weights_digest(job.recipe, job.checkpoint)
    if job.is_default and job.is_same_data:
        check_predictions(job.run, evaluation.result, weights, repair=job.can_repair)
    if job.output is None:
        return
    header = {
        "run": job.recipe.name,
        "checkpoint": job.checkpoint.name,
        "weights": weights,
        "split": job.split,
        "tta": "flip" if job.tta_flip else "none",
        "data": data_digest(job.data),
    }
    report = header | evaluation.report
    write_evaluation(job.output, report, evaluation.result, evaluation.hierarchy, evaluation.val)
    log.info(f"saved to {job.output}")


def check_predictions(run: Path, result: EvalResult, weights: str, *, repair: bool) -> None:
    """Log whether the stored predictions have the same bits; replace lost ones if `repair`."""
    path = run / "predictions.safetensors"
    try:
        stored = read_predictions(path, weights=weights if repair else None)
    except UserError:
        stored = None
    if stored is not None:
        same = torch.equal(stored[0], result.logits)
        log.info(f"logits {'have the same bits as' if same else 'differ from'} {path}")
    elif repair:
        write_predictions(path, result, weights=weights)
        log.info(f"{path} was missing, damaged or of other weights; rewritten")
