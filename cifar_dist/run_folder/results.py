"""What a finished run says: summary.json, predictions.safetensors, and a line for the terminal."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from safetensors.torch import save

from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.run_folder.records import Record
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_write, read_json, read_json_object, write_json


def write_predictions(folder: Path, evaluation: EvalResult) -> None:
    """logits f32 [N_test, C] and labels int64 [N_test], in the order of the test split."""
    tensors = {"logits": evaluation.logits.contiguous(), "labels": evaluation.labels}
    atomic_write(folder / "predictions.safetensors", save(tensors))


def summarize(facts: dict[str, Any], lines: list[Record]) -> dict[str, Any]:
    """summary.json: the headline is the last evaluation; the best test epoch only bears that name.

    Before the first evaluation there is no accuracy in it.
    """
    summary = dict(facts)
    speeds = [line["images_per_second"] for line in lines if line["kind"] == "train"]
    summary["images_per_second"] = statistics.median(speeds) if speeds else None
    evaluations = [line for line in lines if line["kind"] == "eval"]
    if evaluations:
        last = evaluations[-1]
        best = max(evaluations, key=lambda line: line["top1"])
        summary |= {
            name: last[name] for name in ("top1", "top5", "loss", "val_top1") if name in last
        }
        summary |= {"best_test_top1": best["top1"], "best_test_epoch": best["epoch"]}
    return summary


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_json(folder / "summary.json", summary)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The run's summary for who can make it anew, or None where there is none that can be read."""
    summary = read_json(folder / "summary.json")
    return summary if isinstance(summary, dict) else None


def last_checkpoint(summary: dict[str, Any]) -> str:
    """The name of the checkpoint that a summary's numbers are of."""
    return f"step_{summary.get('steps', -1):08d}"


def read_facts(folder: Path, name: str) -> dict[str, Any]:
    """A run's summary.json or environment.json; empty where there is none, UserError for a damaged one."""
    remedy = "start the run's training again to write it anew"
    facts = read_json_object(folder / name, remedy) or {}
    for key in ("steps", "world_size", "seconds", "epochs", "top1", "top5", "parameters"):
        if not isinstance(facts.get(key, 0), int | float):
            raise UserError(f"{folder / name} is damaged ({key} is no number); {remedy}")
    return facts
