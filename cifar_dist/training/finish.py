"""Write the results of a training whose loop has ended: predictions, summary.json, the W&B run."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.models.classifier import num_parameters
from cifar_dist.recipe.runs import weights_digest
from cifar_dist.recipe.schema import Recipe
from cifar_dist.run_folder import results
from cifar_dist.training.fork import describe_fork
from cifar_dist.training.setup import Run
from cifar_dist.training.start import SYNTHETIC_NOTE, is_synthetic
from cifar_dist.training.state import TrainState
from cifar_dist.utils.files import atomic_write, remove_folder
from cifar_dist.utils.host import peak_memory_bytes, peak_reserved_bytes
from cifar_dist.utils.log import log


@dataclass(frozen=True)
class Outcome:
    """How the training loop ended."""

    result: EvalResult | None  # the last evaluation; None if this process made none
    stop_signal: int  # 0: none
    early_stop: str | None  # reason

    @property
    def finished(self) -> bool:
        return not self.stop_signal

    @property
    def signal_name(self) -> str:
        return signal.Signals(self.stop_signal).name


def finish(run: Run, state: TrainState, outcome: Outcome) -> dict[str, Any]:
    """Write the results and return the summary, the same on all ranks."""
    local = (peak_memory_bytes(run.device), peak_reserved_bytes(run.device))
    peaks, reserved = zip(*run.context.all_gather_object(local), strict=True)
    log.info(
        f"peak memory of each rank, MiB: {' '.join(str(peak >> 20) for peak in peaks)}"
        + (f" (reserved: {max(reserved) >> 20})" if max(reserved) else "")
    )
    summary: dict[str, Any] = {
        "name": run.recipe.name,
        "micro_batches": run.micro_batches,
        "world_size": run.context.world_size,
        "parameters": num_parameters(state.model),
        "peak_memory_bytes": max(peaks),
        **({"peak_reserved_bytes": max(reserved)} if max(reserved) else {}),
        "epochs": state.step / run.steps_per_epoch,
        "steps": state.step,
        "seconds": state.seconds,
        "device_seconds": state.device_seconds(run.context.world_size),
        "finished": outcome.finished,
        **({"ended_early": outcome.early_stop} if outcome.early_stop else {}),
        **({"stopped_by": outcome.signal_name} if outcome.stop_signal else {}),
    }
    result = outcome.result
    if outcome.finished and result is None:  # only the summary was missing
        result = run.evaluate(state, run.test_split)
    return run.context.run_on_main(write_results, run, summary, outcome, result)


def write_results(
    run: Run, summary: dict[str, Any], outcome: Outcome, result: EvalResult | None
) -> dict[str, Any]:
    """Write the files on rank 0, and return the summary with the accuracies of the last evaluation."""
    run.metrics_file.sync()
    summary = results.summarize(summary, run.metrics_file.read())
    saved = run.folder / "checkpoints" / results.last_checkpoint(summary)
    summary["weights"] = weights_digest(run.recipe, saved)
    if result is not None and outcome.finished:
        path = run.folder / "predictions.safetensors"
        results.write_predictions(path, result, weights=summary["weights"])
    results.write_summary(run.folder, summary)
    if outcome.stop_signal:  # slurm/train.sh reads it to decide whether to requeue the job
        atomic_write(run.folder / "stopped", f"{outcome.signal_name}\n")
    run.tracker.finish(summary, result if outcome.finished else None)
    if summary["steps"] == 0 and outcome.stop_signal == signal.SIGINT and run.is_new_folder:
        remove_folder(run.folder)
    return summary


def log_summary(recipe: Recipe, summary: dict[str, Any]) -> None:
    """Log the outcome of a run, on the last lines of the terminal."""
    if not summary["finished"] and not recipe.folder.exists():
        log.info(f"{recipe.name}: stopped before the first step; nothing was saved")
        return
    if not summary["finished"]:
        log.info(
            f"{recipe.name}: stopped by {summary['stopped_by']} at step {summary['steps']}; "
            f"checkpoint saved in {recipe.folder}; the same command resumes"
        )
        return
    early = f" ({summary['ended_early']})" if "ended_early" in summary else ""
    origin = results.read_metadata(recipe.folder, "environment.json").get("origin")
    forked = f" ({describe_fork(origin)})" if origin else ""
    log.info(
        f"{recipe.name}{forked}: finished, top1 {summary['top1']:.2f} % after epoch {summary['epochs']:g} "
        f"in {summary['seconds']:.0f} s; results in {recipe.folder}{early}"
    )
    if is_synthetic(recipe):
        log.info(next_steps())


def next_steps() -> str:
    """Return what to do after a run on synthetic data, with commands that work in this shell."""
    rows = [
        (
            "cifar-dist train quick --processes auto",
            "CIFAR-100 itself (169 MB), 10 minutes on two CPU cores",
        ),
        ("cifar-dist train r18_32", "78 %: 3 minutes on a large GPU, days on a CPU"),
    ]
    if shutil.which("cifar-dist") is None:
        activate = os.path.relpath(Path(sys.prefix, "bin", "activate"))
        rows.insert(0, (f". {activate}", "once in each shell"))
    width = max(len(command) for command, _ in rows)
    lines = [f"  {command:<{width}}  # {comment}" for command, comment in rows]
    return "\n".join([f"{SYNTHETIC_NOTE} Next:", *lines])
