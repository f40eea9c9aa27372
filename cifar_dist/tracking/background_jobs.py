"""Evaluations and caches of logits for W&B: runs of their own, that say which artifacts they were made of.

Their ids are those of what they are about, and W&B replaces a run of the same id: so there is one
evaluation of a run, the newest, however often it was made, offline or not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cifar_dist.distill.logit_cache import MANIFEST
from cifar_dist.distill.teacher import TeacherConfig
from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.tracking.artifacts import (
    dataset_artifact,
    log_input_artifacts,
    logits_artifact,
    model_artifact,
)
from cifar_dist.tracking.media import log_predictions, reliability_table
from cifar_dist.tracking.tracker import (
    Tracker,
    TrackingConfig,
    init_run,
    offline_folders,
    resolve_mode,
    wandb_run_id,
)


def open_job(config: TrackingConfig, folder: Path, mode: Any, identity: str, **about: Any) -> Any:
    """The W&B run of a job; it replaces what an earlier one of this id left in FOLDER/wandb."""
    for old in offline_folders(folder, identity):
        shutil.rmtree(old)
    return init_run(config, folder, mode, identity=identity, resume=None, **about)


def without_lists(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers and texts of evaluation.json, nested as they are there."""
    return {
        name: without_lists(value) if isinstance(value, dict) else value
        for name, value in found.items()
        if not isinstance(value, list)
    }


def track_evaluation(
    config: TrackingConfig,
    folder: Path,
    *,
    name: str,
    found: dict[str, Any],
    evaluation: EvalResult,
    data: Path,
) -> None:
    """All of evaluation.json as a summary and tables, made of the data and the run's checkpoint."""
    mode = resolve_mode(config)
    if mode == "off":
        return
    with Tracker().disable_on_error():
        run = open_job(
            config,
            folder,
            mode,
            f"{wandb_run_id(folder)}-evaluation",
            name=f"{name} evaluation",
            group=name,
            job_type="evaluate",
            said={"run": name, "checkpoint": found["checkpoint"], "data": found["data"]},
        )
        log_input_artifacts(run, [dataset_artifact(data), model_artifact(folder)])
        log_predictions(run, evaluation, data)
        run.log({"reliability": reliability_table(found["calibration"])})
        run.summary.update(without_lists(found))
        run.finish()


def track_cache(config: TrackingConfig, *, name: str, teacher: TeacherConfig, data: Path) -> None:
    """The finished cache of a teacher as an artifact, made of the data and the teacher's checkpoint."""
    mode = resolve_mode(config)
    if mode == "off":
        return
    cache = teacher.cache_folder
    with Tracker().disable_on_error():
        said = json.loads((cache / MANIFEST).read_text())
        run = open_job(
            config,
            cache.parent,
            mode,
            f"logits-{said['sha256'][:12]}",
            name=f"logits of {teacher.run}",
            group=name,
            job_type="cache_logits",
            said=said,
        )
        log_input_artifacts(run, [dataset_artifact(data), model_artifact(Path(teacher.run))])
        run.log_artifact(logits_artifact(cache))
        run.finish()
