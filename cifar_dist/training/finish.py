"""What a training leaves when its loop has ended: predictions, summary.json, the end of the W&B run."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from cifar_dist.evaluation.evaluator import EvalResult
from cifar_dist.models.backbones import num_parameters
from cifar_dist.run_folder import results
from cifar_dist.training.setup import Run
from cifar_dist.training.state import TrainState
from cifar_dist.utils.files import atomic_write
from cifar_dist.utils.host import peak_memory_bytes, peak_reserved_bytes
from cifar_dist.utils.log import log


@dataclass(frozen=True)
class Outcome:
    """How a training's loop ended."""

    evaluation: EvalResult | None  # the last one; None where this process made none
    stop_signal: int  # 0: it ended by itself
    early_stop: str | None  # why it ended before the recipe's last epoch

    @property
    def finished(self) -> bool:
        return not self.stop_signal


def finish(run: Run, state: TrainState, outcome: Outcome) -> dict[str, Any]:
    """Write what the run leaves and return the summary, which is equal on all ranks.

    The last evaluation is the headline, whatever an earlier epoch had.
    """
    here = (peak_memory_bytes(run.device), peak_reserved_bytes(run.device))
    peaks, reserved = zip(*run.context.all_gather_object(here), strict=True)
    log.info(
        f"peak memory of each rank, MiB: {' '.join(str(peak >> 20) for peak in peaks)}"
        + (f" (reserved: {max(reserved) >> 20})" if max(reserved) else "")
    )
    facts: dict[str, Any] = {
        "name": run.recipe.name,
        "micro_batches": run.micro_batches,
        "world_size": run.context.world_size,
        "parameters": num_parameters(state.model),
        "peak_memory_bytes": max(peaks),
        **({"peak_reserved_bytes": max(reserved)} if max(reserved) else {}),
        "epochs": state.step / run.steps_per_epoch,
        "steps": state.step,
        "seconds": state.seconds,
        "finished": outcome.finished,
        **({"ended_early": outcome.early_stop} if outcome.early_stop else {}),
        **({"stopped_by": stop_name(outcome)} if outcome.stop_signal else {}),
    }
    evaluation = outcome.evaluation
    if outcome.finished and evaluation is None:  # all was done but the summary
        evaluation = run.evaluate(state, run.test_split)
    return run.context.run_on_main(write_results, run, facts, outcome, evaluation)


def write_results(
    run: Run, metadata: dict[str, Any], outcome: Outcome, evaluation: EvalResult | None
) -> dict[str, Any]:
    """Write the files of a run's end, on rank 0, and return the summary."""
    run.metrics_file.sync()
    summary = results.summarize(metadata, run.metrics_file.read())
    if evaluation is not None and outcome.finished:
        results.write_predictions(run.folder, evaluation)
    results.write_summary(run.folder, summary)
    if outcome.stop_signal:  # slurm/train.sh reads it to know whether to queue the job again
        atomic_write(run.folder / "stopped", f"{stop_name(outcome)}\n")
    run.tracker.finish(summary, evaluation if outcome.finished else None)
    return summary


def stop_name(outcome: Outcome) -> str:
    return signal.Signals(outcome.stop_signal).name
