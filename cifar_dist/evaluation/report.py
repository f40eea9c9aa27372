"""Floor 5. Logits -> evaluation.json and its tables: how good a run is, and where it is wrong."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from cifar_dist.data.dataset import Hierarchy
from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.evaluation.scores import (
    bootstrap_interval,
    class_scores,
    confusion,
    fit_temperature,
    merge_classes,
    percent,
    reliability,
    superclass_scores,
)
from cifar_dist.utils.files import atomic_write, write_json


def compute_metrics(logits: Tensor, labels: Tensor, hierarchy: Hierarchy) -> dict[str, Any]:
    """Every number about predictions: f32 [N, C] logits, int64 [N] labels; accuracies in percent."""
    predicted = logits.argmax(1)
    right = predicted == labels
    low, high = bootstrap_interval(right)
    table = confusion(labels, predicted, logits.shape[1])
    calibration = reliability(logits, labels)
    return {
        **classification_metrics(logits, labels),
        "top1_interval": {
            "low": 100 * low,
            "high": 100 * high,
            "confidence": 0.95,
            "method": "percentile bootstrap over the rows, in the limit of many resamples",
        },
        **superclass_scores(labels, predicted, hierarchy.coarse_of_fine),
        "rows": len(labels),
        "calibration": {"ece": calibration.ece, **asdict(calibration)},
        "classes": [
            {
                "class": name,
                "superclass": name_of(hierarchy.coarse, int(coarse)),
                **asdict(scores),
                "most_confused_with": name_of(hierarchy.fine, scores.most_confused_with),
            }
            for name, coarse, scores in zip(
                hierarchy.fine, hierarchy.coarse_of_fine, class_scores(table), strict=True
            )
        ],
    }


def name_of(names: Sequence[str], place: int | None) -> str | None:
    return None if place is None or place < 0 else names[place]


def after_temperature(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
    """How calibrated the same predictions are after a division by the temperature."""
    calibration = reliability(logits / temperature, labels)
    return {
        "loss": classification_metrics(logits / temperature, labels)["loss"],
        "ece": calibration.ece,
        **asdict(calibration),
    }


def fitted_temperature(val_logits: Tensor, val_labels: Tensor) -> dict[str, Any]:
    """The temperature that fits held-out rows best, and how many there were."""
    value = fit_temperature(val_logits, val_labels)
    return {"value": value, "fitted_on": "validation rows", "rows": len(val_labels)}


def excluding_rows(logits: Tensor, labels: Tensor, rows: Iterable[int]) -> dict[str, Any]:
    """Accuracy on all rows but these, and on these alone; None for one that has no rows."""
    left_out = torch.zeros(len(labels), dtype=torch.bool)
    left_out[list(rows)] = True
    right = logits.argmax(1) == labels
    return {
        "top1": percent(right[~left_out]) if (~left_out).any() else None,
        "num_excluded": int(left_out.sum()),
        "top1_excluded": percent(right[left_out]) if left_out.any() else None,
    }


# ----------------------------------------------------------------------------- files


def write_evaluation(
    folder: Path, report: dict[str, Any], logits: Tensor, labels: Tensor, hierarchy: Hierarchy
) -> None:
    """evaluation.json, classes.csv, confusion.csv and superclass_confusion.csv in `folder`."""
    table = confusion(labels, logits.argmax(1), logits.shape[1])
    coarse = merge_classes(table, hierarchy.coarse_of_fine, len(hierarchy.coarse))
    rows = report["classes"]
    atomic_write(
        folder / "classes.csv", to_csv(list(rows[0]), [list(row.values()) for row in rows])
    )
    atomic_write(folder / "confusion.csv", confusion_csv(table, hierarchy.fine))
    atomic_write(folder / "superclass_confusion.csv", confusion_csv(coarse, hierarchy.coarse))
    write_json(folder / "evaluation.json", report)


def confusion_csv(table: Tensor, names: Sequence[str]) -> str:
    """A row for each true class, a column for each predicted one."""
    rows = [[name, *counts] for name, counts in zip(names, table.tolist(), strict=True)]
    return to_csv(["true \\ predicted", *names], rows)


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


VAL_PREDICTIONS = "held_out.safetensors"


def write_val_predictions(folder: Path, logits: Tensor, labels: Tensor) -> None:
    """What the run says about its held-out rows, for those who choose by them (`ensemble`)."""
    atomic_write(folder / VAL_PREDICTIONS, save({"logits": logits.contiguous(), "labels": labels}))
