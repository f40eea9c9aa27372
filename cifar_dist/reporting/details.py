"""Collect where a run is wrong: classes, confused pairs, confident mistakes, calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import Tensor

from cifar_dist.data.dataset import Hierarchy, load_split, read_hierarchy
from cifar_dist.data.training_rows import training_data
from cifar_dist.evaluation.report import compute_metrics, describe_temperature
from cifar_dist.evaluation.robustness import corruption_table
from cifar_dist.evaluation.scores import confusion, merge_classes
from cifar_dist.inference.stored_run import Run
from cifar_dist.reporting.charts import reliability_chart
from cifar_dist.reporting.images import (
    ConfusedPair,
    Mistake,
    augmented_views,
    confident_mistakes,
    confused_pairs,
)

NUM_PAIRS, PAIR_EXAMPLES = 20, 2
NUM_MISTAKES = 18
NUM_VIEWS, VIEW_EPOCHS = 3, 7
MIN_BIN_IMAGES = 10  # with fewer, the accuracy of a bin is mostly noise
FULL_COLOR = 30.0  # percent of a class's images at which a cell of the confusion map is opaque


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the confusion map of superclasses, or of the map of corruptions."""

    share: float  # percent of the images of the row's superclass; top-1 under a corruption
    opacity: float
    is_correct: bool


@dataclass(frozen=True, kw_only=True)
class Details:
    """What the page shows of one run's predictions and images."""

    run: Run
    num_images: int
    metrics: list[tuple[str, str]]
    has_evaluation: bool
    superclasses: list[tuple[str, list[Cell]]]  # empty if the data have none
    corruptions: list[tuple[str, list[Cell]]]
    pairs: list[ConfusedPair]
    classes: list[dict[str, Any]]  # of evaluation.json, the lowest recall first
    reliability: Markup
    calibration_note: str
    mistakes: list[Mistake]
    views: list[list[str]]


def run_details(run: Run, data: Path) -> Details:
    """Return the details of a run with predictions; `data` is the folder of its data."""
    assert run.predictions is not None
    logits, labels = run.predictions
    of = run.recipe.data.labels
    hierarchy, test = read_hierarchy(data, of), load_split(data, "test", labels=of)
    train = training_data(run.recipe.data, load_split(data, "train", labels=of))
    evaluation = run.evaluation or compute_metrics(logits, labels, hierarchy)
    chart, note = calibration(evaluation)
    classes = [
        {key: words(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in evaluation["classes"]
        if row["recall"] is not None
    ]
    names = [words(name) for name in hierarchy.fine]
    return Details(
        run=run,
        num_images=len(labels),
        metrics=headline_metrics(evaluation),
        has_evaluation=run.evaluation is not None,
        superclasses=superclass_map(logits, labels, hierarchy),
        corruptions=corruption_map(evaluation.get("corruptions")),
        pairs=confused_pairs(
            logits,
            labels,
            test.images,
            names,
            hierarchy.coarse_of_fine,
            count=NUM_PAIRS,
            examples=PAIR_EXAMPLES,
        ),
        classes=sorted(classes, key=lambda row: (row["recall"], row["class"])),
        reliability=chart,
        calibration_note=note,
        mistakes=confident_mistakes(logits, labels, test.images, names, count=NUM_MISTAKES),
        views=augmented_views(
            run.recipe.augment,
            train.split,
            train.rows,
            num_images=NUM_VIEWS,
            epochs=min(VIEW_EPOCHS, run.recipe.run.epochs),
        ),
    )


def words(name: str) -> str:
    """Return a class name for readers: `maple tree`."""
    return name.replace("_", " ")


def headline_metrics(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the (name, value) pairs at the top of a run's details."""
    without = evaluation.get("without_near_duplicates")
    metrics = [("top-5", f"{evaluation['top5']:.2f} %")]
    if "superclass_top1" in evaluation:
        metrics += [
            ("superclass top-1", f"{evaluation['superclass_top1']:.2f} %"),
            ("wrong class, right superclass", f"{evaluation['errors_inside_superclass']:.2f} %"),
            ("wrong superclass", f"{evaluation['errors_outside_superclass']:.2f} %"),
        ]
    metrics.append(("expected calibration error", f"{evaluation['calibration']['ece']:.2f} %"))
    if without and without["top1"] is not None:
        name = f"top-1 without {without['num_excluded']} near-duplicates of training images"
        metrics.append((name, f"{without['top1']:.2f} %"))
    if evaluation.get("cifair"):
        metrics.append(("ciFAIR-100 top-1", f"{evaluation['cifair']['top1']:.2f} %"))
    if corruptions := evaluation.get("corruptions"):
        metrics.append(("mean corruption error", f"{corruptions['mean_corruption_error']:.2f} %"))
    if ood := evaluation.get("ood"):
        name = f"AUROC against {Path(ood['data']).name} (energy score)"
        metrics.append((name, f"{ood['energy']['auroc']:.2f} %"))
    return metrics


def superclass_map(
    logits: Tensor, labels: Tensor, hierarchy: Hierarchy
) -> list[tuple[str, list[Cell]]]:
    """Return the confusion of superclasses in percent, a (name, cells) pair per true superclass.

    The scale is the same for all models: relative to the largest cell, a weak model would look as
    wrong as a good one.
    """
    table = confusion(labels, logits.argmax(1), logits.shape[1])
    coarse = merge_classes(table, hierarchy.coarse_of_fine, len(hierarchy.coarse))
    shares = 100 * coarse.double() / coarse.sum(1, keepdim=True).clamp(min=1)
    return [
        (
            words(name),
            [
                Cell(share=share, opacity=min(1.0, share / full), is_correct=i == j)
                for j, share in enumerate(row)
                for full in (100.0 if i == j else FULL_COLOR,)
            ],
        )
        for i, (name, row) in enumerate(zip(hierarchy.coarse, shares.tolist(), strict=True))
    ]


def corruption_map(corruptions: dict[str, Any] | None) -> list[tuple[str, list[Cell]]]:
    """Return top-1 of severities 1 to 5 and its mean, a (name, cells) pair per corruption.

    The opacity is the error, on the same scale for all models.
    """
    return [
        (words(kind), [Cell(share=top1, opacity=1 - top1 / 100, is_correct=False) for top1 in row])
        for kind, row in (corruption_table(corruptions) if corruptions else ())
    ]


def calibration(evaluation: dict[str, Any]) -> tuple[Markup, str]:
    """Return the reliability chart, and a sentence about the calibration."""
    before, temperature = evaluation["calibration"], evaluation.get("temperature")
    lines = [("the model", before)]
    note = f"Expected calibration error {before['ece']:.2f} %"
    if temperature:
        text = describe_temperature(temperature["value"])
        if temperature["value"] == 1:
            note += f" at {text}"
        else:
            lines.append((f"logits divided by {temperature['value']:.3f}", temperature))
            note += f"; {temperature['ece']:.2f} % with the logits divided by {text}"
    drawn = [
        (
            name,
            [
                top1 if count >= MIN_BIN_IMAGES else None
                for count, top1 in zip(bins["counts"], bins["top1"], strict=True)
            ],
        )
        for name, bins in lines
    ]
    chart = reliability_chart(drawn, before["counts"], "reliability")
    return chart, f"{note}. Bins with fewer than {MIN_BIN_IMAGES} images have no point."
