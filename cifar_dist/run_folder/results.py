"""Read and write the results of a run: summary.json, environment.json and predictions.safetensors."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.run_folder.records import Record
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_write, read_json, try_read_json, write_json
from cifar_dist.utils.log import log


def write_predictions(path: Path, evaluation: EvalResult, *, weights: str) -> None:
    """Write logits f32 [N, C] and labels int64 [N], with the SHA-256 of the weights that made them."""
    tensors = {"logits": evaluation.logits.contiguous(), "labels": evaluation.labels}
    atomic_write(path, save(tensors, metadata={"weights": weights}))


def read_predictions(path: Path, *, weights: str | None) -> tuple[Tensor, Tensor] | None:
    """Return stored logits f32 [N, C] and labels int64 [N], or None if there is no such file.

    Predictions of weights with another digest are ignored with a warning; `weights` is None if the
    run has not recorded it.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            made_by = (file.metadata() or {}).get("weights")
        if weights is not None and made_by != weights:
            log.warning(
                f"ignoring {path}: other weights than the run's made it; "
                "`python -m cifar_dist.evaluate RUN` rewrites it"
            )
            return None
        tensors = load_file(path)
        logits, labels = tensors["logits"], tensors["labels"]
        if logits.ndim != 2 or labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
            raise ValueError("expected logits [N, C] and int64 labels [N]")
        if not logits.isfinite().all():
            raise ValueError("some logits are not finite")
        return logits, labels
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}); for a finished run, "
            "`python -m cifar_dist.evaluate RUN` rewrites it"
        ) from None


def summarize(metadata: dict[str, Any], records: list[Record]) -> dict[str, Any]:
    """Return the content of summary.json.

    The accuracies are those of the last evaluation, and are absent before the first one; the best
    test epoch is reported only as `best_test_*`. `images_per_second` is a median over the run.
    """
    summary = dict(metadata)
    speeds = [record["images_per_second"] for record in records if record["kind"] == "train"]
    summary["images_per_second"] = statistics.median(speeds) if speeds else None
    evaluations = [record for record in records if record["kind"] == "eval"]
    if evaluations:
        last = evaluations[-1]
        best = max(evaluations, key=lambda record: record["top1"])
        summary |= {
            name: last[name] for name in ("top1", "top5", "loss", "val_top1") if name in last
        }
        summary |= {"best_test_top1": best["top1"], "best_test_epoch": best["epoch"]}
    return summary


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_json(folder / "summary.json", summary)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return summary.json, or None if it is absent or damaged (for callers that can rewrite it)."""
    return try_read_json(folder / "summary.json")


def last_checkpoint(summary: dict[str, Any]) -> str:
    """Return the name of the checkpoint that the summary describes."""
    return f"step_{summary.get('steps', -1):08d}"


def read_metadata(folder: Path, name: str) -> dict[str, Any]:
    """Return summary.json or environment.json, empty if absent; UserError if damaged."""
    remedy = "start the training again to rewrite it"
    metadata = read_json(folder / name, remedy) or {}
    numbers = ("steps", "world_size", "seconds", "device_seconds", "epochs", "parameters")
    for key in (*numbers, "top1", "top5"):
        if not isinstance(metadata.get(key, 0), int | float):
            raise UserError(f"{folder / name} is damaged ({key} is not a number); {remedy}")
    return metadata
