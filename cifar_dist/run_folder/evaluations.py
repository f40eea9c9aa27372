"""Read the evaluation files of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_dist.data.dataset import data_digest
from cifar_dist.run_folder.results import read_facts
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import read_json_object
from cifar_dist.utils.log import log

# What is shown of an evaluation; an older one may lack some.
REQUIRED_KEYS = {
    *("top1", "top5", "top1_interval", "superclass_top1", "errors_inside_superclass"),
    *("errors_outside_superclass", "calibration", "classes"),
}


EVALUATION_FOLDER = (
    "evaluation"  # in a run's folder: that of the test split at the newest checkpoint
)


def same_data(environment: dict[str, Any], data: Path) -> bool:
    """Whether `data` are, by digest, those of a run's environment.json, as far as it says."""
    return environment.get("data") in (None, data_digest(data))


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """What lies in a run's folder of its evaluation, whenever it was made; None where there is none."""
    remedy = f"`python -m cifar_dist.evaluate {run}` writes it anew"
    path = run / EVALUATION_FOLDER / "evaluation.json"
    found = read_json_object(path, remedy)
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


def read_matching_evaluation(run: Path, checkpoint: str) -> dict[str, Any] | None:
    """What `evaluate` wrote about a run's test split at this checkpoint.

    None where it has not run; with a warning, where what it wrote is of something else.
    """
    found = read_evaluation(run)
    if found is None:
        return None
    data = read_facts(run, "environment.json").get("data")
    wanted = {"checkpoint": checkpoint, "split": "test", "tta": "none", "data": data}
    others = [
        f"{name} {found.get(name)}, not {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if others:
        log.warning(
            f"{run / EVALUATION_FOLDER} is left out, as it is of another evaluation ({'; '.join(others)}); "
            f"`python -m cifar_dist.evaluate {run}` makes that of the newest checkpoint"
        )
        return None
    if missing := REQUIRED_KEYS - found.keys():
        raise UserError(
            f"{run / EVALUATION_FOLDER}/evaluation.json lacks {', '.join(sorted(missing))}; "
            f"`python -m cifar_dist.evaluate {run}` writes it anew"
        )
    return found
