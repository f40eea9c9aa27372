"""W&B runs of evaluations and logit caches, linked to what they were made from.

Their ids derive from their subject, so W&B keeps one evaluation per run, the newest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
from cifar_dist.tracking.tables import log_predictions, reliability_table
from cifar_dist.tracking.tracker import (
    Tracker,
    TrackingConfig,
    init_run,
    name_without_seed,
    offline_folders,
    resolve_mode,
    wandb_run_id,
)


@contextmanager
def job(config: TrackingConfig, folder: Path, *, run_id: str, **about: Any) -> Iterator[Any]:
    """Yield the W&B run of a job, which replaces earlier ones of its id; None if W&B is off."""
    mode = resolve_mode(config)
    if mode == "off":
        yield None
        return
    for old in offline_folders(folder, run_id):
        shutil.rmtree(old)
    run = init_run(config, folder, mode, run_id=run_id, resume=None, **about)
    yield run
    run.finish()


def track_evaluation(
    config: TrackingConfig,
    folder: Path,
    *,
    name: str,
    seed: int,
    report: dict[str, Any],
    result: EvalResult,
    data: Path,
) -> None:
    """Log the content of evaluation.json as a summary and tables."""
    about = {"run": name, "checkpoint": report["checkpoint"], "data": report["data"]}
    with (
        Tracker().disable_on_error(),
        job(
            config,
            folder,
            run_id=f"{wandb_run_id(folder)}-evaluation",
            name=f"{name} evaluation",
            group=name_without_seed(name, seed),
            job_type="evaluate",
            settings=about,
        ) as run,
    ):
        if run is not None:
            log_input_artifacts(run, [dataset_artifact(data), model_artifact(folder)])
            log_predictions(run, result, data)
            run.log({"reliability": reliability_table(report["calibration"])})
            run.summary.update(without_lists(report))


def track_cache(
    config: TrackingConfig, *, name: str, seed: int, teacher: TeacherConfig, data: Path
) -> None:
    """Log a finished cache of logits as an artifact."""
    cache = teacher.cache_folder
    with Tracker().disable_on_error():
        manifest = json.loads((cache / MANIFEST).read_text())
        with job(
            config,
            cache.parent,
            run_id=f"logits-{manifest['sha256'][:12]}",
            name=f"logits of {teacher.run}",
            group=name_without_seed(name, seed),
            job_type="cache_logits",
            settings=manifest,
        ) as run:
            if run is not None:
                log_input_artifacts(
                    run, [dataset_artifact(data), model_artifact(Path(teacher.run))]
                )
                run.log_artifact(logits_artifact(cache))


def without_lists(report: dict[str, Any]) -> dict[str, Any]:
    return {
        name: without_lists(value) if isinstance(value, dict) else value
        for name, value in report.items()
        if not isinstance(value, list)
    }
