"""Build evaluation.json and its CSV tables from logits and labels."""

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

from cifar_dist.data.corruptions import SEVERITIES
from cifar_dist.data.dataset import OFFICIAL_DIGEST, Hierarchy
from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.evaluation.robustness import corruption_table
from cifar_dist.evaluation.scores import (
    bootstrap_interval,
    choose_temperature,
    class_scores,
    confusion,
    merge_classes,
    percent,
    reliability,
    superclass_scores,
)
from cifar_dist.utils.files import atomic_write, write_json
from cifar_dist.utils.log import log

VAL_PREDICTIONS = "val_predictions.safetensors"
CORRUPTIONS_CSV = "corruptions.csv"


def build_report(
    evaluation: EvalResult,
    hierarchy: Hierarchy,
    *,
    val: EvalResult | None = None,
    near_duplicates: dict[str, Any] | None = None,
    cifair: tuple[EvalResult, bool] | None = None,
) -> dict[str, Any]:
    """Return the metrics of evaluation.json; parts without input are None.

    `val` is used to choose the temperature. `near_duplicates` is a stored list of rows. `cifair` is a
    result on ciFAIR-100 and whether that is the published file.
    """
    logits, labels = evaluation.logits, evaluation.labels
    report = compute_metrics(logits, labels, hierarchy)
    report |= {"temperature": None, "without_near_duplicates": None, "cifair": None}
    report |= {"corruptions": None, "ood": None}  # see evaluation/robustness.py
    if val is not None:
        value = choose_temperature(val.logits, val.labels)
        report["temperature"] = {
            "value": value,
            "fitted_on": "validation rows",
            "rows": len(val.labels),
            **after_temperature(logits, labels, value),
        }
    if near_duplicates is not None:
        report["without_near_duplicates"] = {
            **excluding_rows(logits, labels, near_duplicates["test_rows"]),
            "found_by": {name: near_duplicates[name] for name in ("min_detail", "min_layout")},
            "note": "found by cifar_dist.near_duplicates; a lower bound"
            + (": ciFAIR lists 891" if near_duplicates["data"] == OFFICIAL_DIGEST else ""),
        }
    if cifair is not None:
        result, published = cifair
        report["cifair"] = {"rows": len(result.labels), "published": published, **result.metrics}
    return report


def compute_metrics(logits: Tensor, labels: Tensor, hierarchy: Hierarchy) -> dict[str, Any]:
    """Return all metrics of f32 [N, C] logits and int64 [N] labels; accuracies in percent.

    Those of superclasses are left out if the data have none.
    """
    predicted = logits.argmax(1)
    low, high = bootstrap_interval(predicted == labels)
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
        **(
            superclass_scores(labels, predicted, hierarchy.coarse_of_fine)
            if hierarchy.coarse
            else {}
        ),
        "rows": len(labels),
        "calibration": {"ece": calibration.ece, **asdict(calibration)},
        "classes": [
            {
                "class": name,
                **(
                    {"superclass": class_name(hierarchy.coarse, int(coarse))}
                    if hierarchy.coarse
                    else {}
                ),
                **asdict(scores),
                "most_confused_with": class_name(hierarchy.fine, scores.most_confused_with),
            }
            for name, coarse, scores in zip(
                hierarchy.fine, hierarchy.coarse_of_fine, class_scores(table), strict=True
            )
        ],
    }


def class_name(names: Sequence[str], index: int | None) -> str | None:
    """Return the name of a class, or None for an index that is None or -1."""
    return None if index is None or index < 0 else names[index]


def after_temperature(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
    """Return loss and calibration after dividing the logits by `temperature`."""
    calibration = reliability(logits / temperature, labels)
    return {
        "loss": classification_metrics(logits / temperature, labels)["loss"],
        "ece": calibration.ece,
        **asdict(calibration),
    }


def describe_temperature(value: float) -> str:
    """Return a temperature of `choose_temperature` and the reason for it."""
    if value == 1:
        return "temperature 1 (that of least loss calibrates the validation rows worse)"
    return f"temperature {value:.3f} (least loss on the validation rows)"


def excluding_rows(logits: Tensor, labels: Tensor, rows: Iterable[int]) -> dict[str, Any]:
    """Return top-1 without `rows` and top-1 of `rows` alone; None for an empty set."""
    excluded = torch.zeros(len(labels), dtype=torch.bool)
    excluded[list(rows)] = True
    correct = logits.argmax(1) == labels
    return {
        "top1": percent(correct[~excluded]) if (~excluded).any() else None,
        "num_excluded": int(excluded.sum()),
        "top1_excluded": percent(correct[excluded]) if excluded.any() else None,
    }


def log_report(report: dict[str, Any], title: str) -> None:
    """Log the headline metrics of an evaluation, calibration and further test sets."""
    interval = report["top1_interval"]
    log.info(
        f"{title}: loss {report['loss']:.4f}  top1 {report['top1']:.2f} %  "
        f"top5 {report['top5']:.2f} %"
    )
    line = f"  95 % interval of top1 {interval['low']:.2f} to {interval['high']:.2f} %"
    if "superclass_top1" in report:
        line += (
            f"  superclass top1 {report['superclass_top1']:.2f} %  errors inside the superclass "
            f"{report['errors_inside_superclass']:.2f} %, outside "
            f"{report['errors_outside_superclass']:.2f} %"
        )
    log.info(line)
    line = f"  expected calibration error {report['calibration']['ece']:.2f} %"
    if temperature := report["temperature"]:
        line += f"; {temperature['ece']:.2f} % at {describe_temperature(temperature['value'])}"
    log.info(line)
    if without := report["without_near_duplicates"]:
        top1 = "no rows left" if without["top1"] is None else f"top1 {without['top1']:.2f} %"
        log.info(f"  without {without['num_excluded']} near-duplicates of training images: {top1}")
    if cifair := report["cifair"]:
        published = "" if cifair["published"] else " (not the published file)"
        log.info(f"  ciFAIR-100{published}: top1 {cifair['top1']:.2f} %")


# ----------------------------------------------------------------------------- files


def write_evaluation(
    folder: Path,
    report: dict[str, Any],
    evaluation: EvalResult,
    hierarchy: Hierarchy,
    val: EvalResult | None = None,
) -> None:
    """Write evaluation.json, classes.csv, the confusion tables and the predictions for `val`.

    corruptions.csv is written if the report has them, and otherwise removed, as it would be outdated.
    `ensemble` chooses its weights from the predictions for the validation rows.
    """
    if val is not None:
        tensors = {"logits": val.logits.contiguous(), "labels": val.labels}
        metadata = {"weights": report["weights"]}
        atomic_write(folder / VAL_PREDICTIONS, save(tensors, metadata=metadata))
    table = confusion(evaluation.labels, evaluation.logits.argmax(1), evaluation.logits.shape[1])
    classes = report["classes"]
    atomic_write(
        folder / "classes.csv", to_csv(list(classes[0]), [row.values() for row in classes])
    )
    atomic_write(folder / "confusion.csv", confusion_csv(table, hierarchy.fine))
    if hierarchy.coarse:
        coarse = merge_classes(table, hierarchy.coarse_of_fine, len(hierarchy.coarse))
        atomic_write(folder / "superclass_confusion.csv", confusion_csv(coarse, hierarchy.coarse))
    if corruptions := report["corruptions"]:
        header = ["corruption", *(f"severity {severity}" for severity in SEVERITIES), "mean"]
        lines = ([kind, *values] for kind, values in corruption_table(corruptions))
        atomic_write(folder / CORRUPTIONS_CSV, to_csv(header, lines))
    else:
        (folder / CORRUPTIONS_CSV).unlink(missing_ok=True)
    write_json(folder / "evaluation.json", report)  # last: it names the checkpoint of the others


def confusion_csv(table: Tensor, names: Sequence[str]) -> str:
    """Return a confusion matrix as CSV: a row per true class, a column per predicted class."""
    rows = [[name, *counts] for name, counts in zip(names, table.tolist(), strict=True)]
    return to_csv(["true \\ predicted", *names], rows)


def to_csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
