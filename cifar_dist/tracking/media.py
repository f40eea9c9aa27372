"""Predictions for W&B: tables, pictures, confusions, reliability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.dataset import Hierarchy, Split, load_split, read_hierarchy
from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.evaluation.scores import class_scores, confusion, merge_classes

NUM_IMAGES = (
    32  # of each kind in the table: the most certain mistakes, and rows of the split in order
)


def select_rows(logits: Tensor, labels: Tensor) -> list[int]:
    """The most certain mistakes first, then the first rows of the split, each once."""
    sure, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[sure[wrong].argsort(descending=True, stable=True)][:NUM_IMAGES].tolist()
    return list(dict.fromkeys(worst + list(range(min(NUM_IMAGES, len(labels))))))


def log_predictions(run: Any, evaluation: EvalResult, data: Path) -> None:
    """Log tables of predictions with pictures, of classes, and confusions of both levels."""
    hierarchy, test = read_hierarchy(data), load_split(data, "test")
    if len(evaluation.labels) != len(test.labels):
        return
    table = confusion(evaluation.labels, evaluation.logits.argmax(1), len(hierarchy.fine))
    coarse = merge_classes(table, hierarchy.coarse_of_fine, len(hierarchy.coarse))
    run.log(
        {
            "predictions": predictions_table(evaluation, test, hierarchy),
            "classes": classes_table(table, hierarchy),
            "confusion": confusion_table(table, hierarchy.fine),
            "superclass_confusion": confusion_table(coarse, hierarchy.coarse),
        }
    )


def predictions_table(evaluation: EvalResult, test: Split, hierarchy: Hierarchy) -> Any:
    import wandb

    probabilities = evaluation.logits.softmax(1)
    columns = ["test row", "picture", "true", "predicted", "confidence, %", "right"]
    rows = []
    for row in select_rows(evaluation.logits, evaluation.labels):
        truth, said = int(evaluation.labels[row]), int(probabilities[row].argmax())
        picture = wandb.Image(test.images[row].permute(1, 2, 0).cpu().numpy())
        confidence = round(100 * float(probabilities[row, said]), 2)
        names = hierarchy.fine
        rows.append([row, picture, names[truth], names[said], confidence, truth == said])
    return wandb.Table(columns=columns, data=rows)


def classes_table(table: Tensor, hierarchy: Hierarchy) -> Any:
    import wandb

    columns = ["class", "pictures", "top-1, %", "precision, %", "most often taken for", "times"]
    rows = []
    for name, one in zip(hierarchy.fine, class_scores(table), strict=True):
        other = "" if one.most_confused_with is None else hierarchy.fine[one.most_confused_with]
        rows.append([name, one.count, one.recall, one.precision, other, one.confused_count])
    return wandb.Table(columns=columns, data=rows)


def confusion_table(table: Tensor, names: tuple[str, ...]) -> Any:
    """W&B's own chart of a confusion, from counts rather than from a row for each picture."""
    import wandb

    cells = torch.cartesian_prod(torch.arange(len(names)), torch.arange(len(names))).tolist()
    rows = [[names[i], names[j], int(table[i, j])] for i, j in cells]
    columns = ["Actual", "Predicted", "nPredictions"]
    return wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=columns, data=rows),
        fields={name: name for name in columns},
        string_fields={"title": "Confusion matrix"},
    )


def reliability_table(calibration: dict[str, Any]) -> Any:
    """The lists of a calibration as columns, a row for each bin of confidence."""
    import wandb

    columns = [name for name, values in calibration.items() if isinstance(values, list)]
    rows = zip(*(calibration[name] for name in columns), strict=True)
    return wandb.Table(columns=["bin", *columns], data=[[i, *row] for i, row in enumerate(rows)])
