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

from cifar_dist.data.arrow import Hierarchy, data_digest
from cifar_dist.engine.metrics import accuracy
from cifar_dist.engine.results import read_facts, read_object
from cifar_dist.engine.runtime import log
from cifar_dist.engine.scores import (
    bootstrap_interval,
    class_scores,
    confusion,
    fit_temperature,
    fold,
    percent,
    reliability,
    superclass_scores,
)
from cifar_dist.errors import UserError
from cifar_dist.files import write_file, write_json

# What is shown of an evaluation; an older one may lack some.
NEEDED = {
    *("top1", "top5", "top1_interval", "superclass_top1", "errors_inside_superclass"),
    *("errors_outside_superclass", "calibration", "classes"),
}
FOLDER = "evaluation"  # in a run's folder: that of the test split at the newest checkpoint


def numbers(logits: Tensor, labels: Tensor, hierarchy: Hierarchy) -> dict[str, Any]:
    """Every number about predictions: f32 [N, C] logits, int64 [N] labels; accuracies in percent."""
    predicted = logits.argmax(1)
    right = predicted == labels
    low, high = bootstrap_interval(right)
    table = confusion(labels, predicted, logits.shape[1])
    calibration = reliability(logits, labels)
    return {
        **accuracy(logits, labels),
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
                "mistaken_for": name_of(hierarchy.fine, scores.mistaken_for),
            }
            for name, coarse, scores in zip(
                hierarchy.fine, hierarchy.coarse_of_fine, class_scores(table), strict=True
            )
        ],
    }


def name_of(names: Sequence[str], place: int | None) -> str | None:
    return None if place is None or place < 0 else names[place]


def tempered(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
    """How calibrated the same predictions are after a division by the temperature."""
    calibration = reliability(logits / temperature, labels)
    return {
        "loss": accuracy(logits / temperature, labels)["loss"],
        "ece": calibration.ece,
        **asdict(calibration),
    }


def fitted_temperature(held_logits: Tensor, held_labels: Tensor) -> dict[str, Any]:
    """The temperature that fits held-out rows best, and how many there were."""
    value = fit_temperature(held_logits, held_labels)
    return {"value": value, "fitted_on": "held-out rows", "rows": len(held_labels)}


def without_rows(logits: Tensor, labels: Tensor, rows: Iterable[int]) -> dict[str, Any]:
    """Accuracy on all rows but these, and on these alone; None for one that has no rows."""
    left_out = torch.zeros(len(labels), dtype=torch.bool)
    left_out[list(rows)] = True
    right = logits.argmax(1) == labels
    return {
        "top1": percent(right[~left_out]) if (~left_out).any() else None,
        "rows_left_out": int(left_out.sum()),
        "top1_of_those": percent(right[left_out]) if left_out.any() else None,
    }


# ----------------------------------------------------------------------------- files


def write_findings(
    folder: Path, found: dict[str, Any], logits: Tensor, labels: Tensor, hierarchy: Hierarchy
) -> None:
    """evaluation.json, classes.csv, confusion.csv and superclass_confusion.csv in `folder`."""
    table = confusion(labels, logits.argmax(1), logits.shape[1])
    coarse = fold(table, hierarchy.coarse_of_fine, len(hierarchy.coarse))
    rows = found["classes"]
    write_file(folder / "classes.csv", to_csv(list(rows[0]), [list(row.values()) for row in rows]))
    write_file(folder / "confusion.csv", confusion_csv(table, hierarchy.fine))
    write_file(folder / "superclass_confusion.csv", confusion_csv(coarse, hierarchy.coarse))
    write_json(folder / "evaluation.json", found)


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


HELD_OUT = "held_out.safetensors"


def write_held_out(folder: Path, logits: Tensor, labels: Tensor) -> None:
    """What the run says about its held-out rows, for those who choose by them (`ensemble`)."""
    write_file(folder / HELD_OUT, save({"logits": logits.contiguous(), "labels": labels}))


def trained_on(environment: dict[str, Any], data: Path) -> bool:
    """Whether `data` are, by digest, those of a run's environment.json, as far as it says."""
    return environment.get("data") in (None, data_digest(data))


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """What lies in a run's folder of its evaluation, whenever it was made; None where there is none."""
    remedy = f"`python -m cifar_dist.evaluate {run}` writes it anew"
    path = run / FOLDER / "evaluation.json"
    found = read_object(path, remedy)
    if found is not None and not (
        _are_rows(found.get("classes", [])) and _is_fit(found.get("temperature"))
    ):
        raise UserError(f"{path} is damaged; {remedy}")
    return found


def _are_rows(classes: Any) -> bool:
    """Whether it is a list of what `numbers` says about a class."""
    return isinstance(classes, list) and all(
        isinstance(row, dict) and {"class", "superclass"} <= row.keys() for row in classes
    )


def _is_fit(temperature: Any) -> bool:
    """Whether it is what `fitted_temperature` says, or None, where nothing was held out."""
    return temperature is None or (
        isinstance(temperature, dict) and isinstance(temperature.get("value"), int | float)
    )


def read_findings(run: Path, checkpoint: str) -> dict[str, Any] | None:
    """What `evaluate` wrote about a run's test split at this checkpoint.

    None where it has not run; with a warning, where what it wrote is of something else.
    """
    found = read_evaluation(run)
    if found is None:
        return None
    data = read_facts(run, "environment.json").get("data")
    wanted = {"checkpoint": checkpoint, "split": "test", "test_time": "one view", "data": data}
    others = [
        f"{name} {found.get(name)}, not {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if others:
        log.warning(
            f"{run / FOLDER} is left out, as it is of another evaluation ({'; '.join(others)}); "
            f"`python -m cifar_dist.evaluate {run}` makes that of the newest checkpoint"
        )
        return None
    if missing := NEEDED - found.keys():
        raise UserError(
            f"{run / FOLDER}/evaluation.json lacks {', '.join(sorted(missing))}; "
            f"`python -m cifar_dist.evaluate {run}` writes it anew"
        )
    return found
