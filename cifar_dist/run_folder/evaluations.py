"""Read the stored evaluation of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_dist.data.dataset import data_digest
from cifar_dist.run_folder.results import read_metadata
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import read_json
from cifar_dist.utils.log import log

EVALUATION_FOLDER = "evaluation"  # in a run folder: the newest checkpoint on the test split
REQUIRED_KEYS = {  # used by the report page; evaluations by older versions may lack some
    *("top1", "top5", "top1_interval", "calibration", "classes"),
}


def same_data(environment: dict[str, Any], data: Path) -> bool:
    """Return whether `data` has the digest in a run's environment.json, or that has no digest."""
    return environment.get("data") in (None, data_digest(data))


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """Return the stored evaluation.json of any checkpoint, or None; UserError if damaged."""
    remedy = f"`python -m cifar_dist.evaluate {run}` rewrites it"
    path = run / EVALUATION_FOLDER / "evaluation.json"
    evaluation = read_json(path, remedy)
    if evaluation is not None and not (
        _is_class_list(evaluation.get("classes", []))
        and _is_temperature(evaluation.get("temperature"))
    ):
        raise UserError(f"{path} is damaged; {remedy}")
    return evaluation


def _is_class_list(classes: Any) -> bool:
    return isinstance(classes, list) and all(
        isinstance(row, dict) and "class" in row for row in classes
    )


def _is_temperature(temperature: Any) -> bool:
    """Return whether the value is a fitted temperature, or None as in runs without validation."""
    return temperature is None or (
        isinstance(temperature, dict) and isinstance(temperature.get("value"), int | float)
    )


def read_matching_evaluation(
    run: Path, checkpoint: str, *, weights: str | None
) -> dict[str, Any] | None:
    """Return the stored evaluation of `checkpoint` on the test split, or None.

    An evaluation of another checkpoint, other weights (a digest), split or data set is ignored with
    a warning.
    """
    evaluation = read_evaluation(run)
    if evaluation is None:
        return None
    folder, command = run / EVALUATION_FOLDER, f"`python -m cifar_dist.evaluate {run}`"
    data = read_metadata(run, "environment.json").get("data")
    expected = {"checkpoint": checkpoint, "split": "test", "tta": "none", "data": data}
    if weights is not None:
        expected["weights"] = weights
    differences = [
        f"{name} is {evaluation.get(name)}, not {value}"
        for name, value in expected.items()
        if evaluation.get(name) != value
    ]
    if differences:
        log.warning(
            f"ignoring {folder}, which does not match ({'; '.join(differences)}); "
            f"{command} evaluates the newest checkpoint"
        )
        return None
    if missing := REQUIRED_KEYS - evaluation.keys():
        raise UserError(
            f"{folder}/evaluation.json lacks {', '.join(sorted(missing))}; {command} rewrites it"
        )
    return evaluation
