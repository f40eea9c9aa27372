"""W&B tables: predictions with images, classes, confusions, reliability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.dataset import Labels, load_split, read_hierarchy
from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.evaluation.scores import class_scores, confusion, merge_classes

NUM_IMAGES = 32  # of each kind: most confident mistakes, and first rows of the split


def select_rows(logits: Tensor, labels: Tensor) -> list[int]:
    """Return the most confident mistakes, then the first rows of the split, each once."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    order = confidence[wrong].argsort(descending=True, stable=True)
    worst = wrong[order][:NUM_IMAGES].tolist()
    return list(dict.fromkeys(worst + list(range(min(NUM_IMAGES, len(labels))))))


def log_predictions(run: Any, result: EvalResult, data: Path, labels: Labels) -> None:
    """Log tables of the test split's predictions, classes and confusions."""
    import wandb

    hierarchy, test = read_hierarchy(data, labels), load_split(data, "test")
    if len(result.labels) != len(test.labels):
        return
    names, probabilities = hierarchy.fine, result.logits.softmax(1)
    rows: list[list[Any]] = []
    for row in select_rows(result.logits, result.labels):
        label, predicted = int(result.labels[row]), int(probabilities[row].argmax())
        image = wandb.Image(test.images[row].permute(1, 2, 0).cpu().numpy())
        confidence = round(100 * float(probabilities[row, predicted]), 2)
        rows.append([row, image, names[label], names[predicted], confidence, label == predicted])
    counts = confusion(result.labels, result.logits.argmax(1), len(names))
    classes = [
        [name, one.count, one.recall, one.precision, other, one.confused_count]
        for name, one in zip(names, class_scores(counts), strict=True)
        for other in ("" if one.most_confused_with is None else names[one.most_confused_with],)
    ]
    columns = ["test row", "image", "true", "predicted", "confidence, %", "correct"]
    class_columns = ["class", "images", "top-1, %", "precision, %", "most confused with", "count"]
    tables = {
        "predictions": wandb.Table(columns=columns, data=rows),
        "classes": wandb.Table(columns=class_columns, data=classes),
        "confusion": confusion_table(counts, names),
    }
    if hierarchy.coarse:
        coarse = merge_classes(counts, hierarchy.coarse_of_fine, len(hierarchy.coarse))
        tables["superclass_confusion"] = confusion_table(coarse, hierarchy.coarse)
    run.log(tables)


def confusion_table(table: Tensor, names: tuple[str, ...]) -> Any:
    """Return W&B's confusion chart, from counts rather than one row per image."""
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
