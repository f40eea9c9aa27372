"""What a finished run says: summary.json, predictions.safetensors, and a line for the terminal."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from safetensors.torch import save

from cifar_dist.engine.evaluation import Evaluation
from cifar_dist.engine.metrics import Line, MetricsFile
from cifar_dist.engine.runtime import log
from cifar_dist.engine.tracking import Tracker
from cifar_dist.errors import UserError
from cifar_dist.files import write_file, write_json


def publish(line: Line, metrics_file: MetricsFile, tracker: Tracker, *, epochs: int) -> None:
    """One line of metrics.jsonl to the file, to W&B and to people."""
    metrics_file.append(line)
    tracker.log(line)
    log.info(sentence(line, epochs=epochs))


def sentence(line: Line, *, epochs: int) -> str:
    """One line of metrics.jsonl for people."""
    head = f"epoch {line['epoch']:6.2f}/{epochs}  step {line['step']:>6}"
    if line["kind"] == "train":
        return (
            f"{head}  loss {line['loss']:.4f}  top1 {line['top1']:5.2f} %  lr {line['lr']:.2e}  "
            f"{line['images_per_second']:,.0f} images/s  {line['memory_bytes'] / 2**30:.2f} GiB"
        )
    held = f"  held-out top1 {line['val_top1']:.2f} %" if "val_top1" in line else ""
    return f"{head}  test: loss {line['loss']:.4f}  top1 {line['top1']:.2f} %  top5 {line['top5']:.2f} %{held}"


def write_predictions(folder: Path, evaluation: Evaluation) -> None:
    """logits f32 [N_test, C] and labels int64 [N_test], in the order of the test split."""
    tensors = {"logits": evaluation.logits.contiguous(), "labels": evaluation.labels}
    write_file(folder / "predictions.safetensors", save(tensors))


def summarize(facts: dict[str, Any], lines: list[Line]) -> dict[str, Any]:
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
    facts = read_object(folder / name, remedy) or {}
    for key in ("steps", "world_size", "seconds", "epochs", "top1", "top5", "parameters"):
        if not isinstance(facts.get(key, 0), int | float):
            raise UserError(f"{folder / name} is damaged ({key} is no number); {remedy}")
    return facts


def read_object(path: Path, remedy: str) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file; UserError with the remedy for a damaged one."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; {remedy}")
    return value


def read_json(path: Path) -> Any:
    """A JSON file's value, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
