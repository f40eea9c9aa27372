"""Rebuild one W&B run from a run's metrics.jsonl, and upload it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from cifar_dist.data.dataset import data_digest
from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.evaluation.metrics import classification_metrics
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe, to_dict
from cifar_dist.run_folder import results
from cifar_dist.run_folder.records import MetricsFile
from cifar_dist.tracking.tracker import Tracker, decide_mode, offline_folders, wandb_run_id
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import read_json, sha256, write_json
from cifar_dist.utils.log import log

UPLOAD_SECONDS = 600


def rebuild(folder: Path) -> Path:
    """Replace the run's offline folders by one with all records, and return it."""
    recipe = load_recipe(folder / "recipe.yaml")
    lines = MetricsFile(folder / "metrics.jsonl").read()
    summary = results.read_metadata(folder, "summary.json")
    environment = results.read_metadata(folder, "environment.json")
    if (folder / "wandb_id").exists():
        for old in offline_folders(folder, wandb_run_id(folder)):
            shutil.rmtree(old)
    tracker = Tracker()
    offline = replace(recipe.tracking, mode="offline")
    tracker.start(offline, folder, to_dict(recipe), environment, recipe.all_teachers)
    for line in lines:
        tracker.log(line)
    alive = tracker.run is not None
    tracker.finish(summary, stored(folder, recipe, environment.get("data")))
    made = offline_folders(folder, wandb_run_id(folder)) if alive else []
    if len(made) != 1:
        raise UserError(f"{folder}: W&B wrote no offline run; see the warning above")
    return made[0]


def stored(folder: Path, recipe: Recipe, digest: str | None) -> EvalResult | None:
    """Return the final predictions; None before the end, or if the data are not available."""
    weights = results.read_metadata(folder, "summary.json").get("weights")
    predictions = results.read_predictions(folder / "predictions.safetensors", weights=weights)
    data = Path(recipe.data.path)
    if predictions is None or not (data / "digest.json").exists() or data_digest(data) != digest:
        return None
    logits, labels = predictions
    return EvalResult(metrics=classification_metrics(logits, labels), logits=logits, labels=labels)


def upload(offline: Path) -> bool:
    """Upload a run, which replaces that of the same id on the server; return whether it succeeded."""
    mode, reason = decide_mode("online")
    if mode != "online":
        log.info(f"not uploaded: {reason}; run this again later, or `wandb sync {offline}`")
        return False
    command = [sys.executable, "-m", "wandb", "sync", str(offline)]
    try:
        done = subprocess.run(command, timeout=UPLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"W&B took longer than {UPLOAD_SECONDS} s; try again later") from None
    if done.returncode:
        raise UserError(f"`wandb sync` failed with code {done.returncode}; see its output above")
    return True


def sync(folder: Path) -> None:
    """Rebuild the run of a run folder and upload it, if it has changed since the last upload."""
    metrics = folder / "metrics.jsonl"
    for needed in (folder / "recipe.yaml", metrics):
        if not needed.exists():
            raise UserError(f"{folder} is not a run folder with records (it has no {needed.name})")
    now = {path.name: sha256(path) for path in (metrics, folder / "summary.json") if path.exists()}
    uploaded = folder / "wandb_synced.json"
    if read_json(uploaded, "remove it and start this again") == now:
        log.info(f"{folder}: nothing new since the last upload")
        return
    offline = rebuild(folder)
    log.info(f"{offline}: all of {metrics}")
    if upload(offline):
        write_json(uploaded, now)
