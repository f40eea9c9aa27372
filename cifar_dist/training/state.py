"""The state of a run at a step: what a checkpoint holds.

It has no random state, sampler or loader: those are functions of the step.
"""

from __future__ import annotations

import copy
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist.distributed import signals
from cifar_dist.distributed.context import DistContext
from cifar_dist.optim.averaging import WeightAverage
from cifar_dist.optim.optimizer import load_portable_state_dict, portable_state_dict
from cifar_dist.recipe.schema import RunConfig
from cifar_dist.run_folder import checkpoint
from cifar_dist.training.fork import Fork
from cifar_dist.training.graphed_step import StepFn
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.training.pace import Pace
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log

NOT_FINITE = "not finite"  # in the error of a training that diverged
POLL_SECONDS = 1.0  # how often ranks agree on stopping and saving


@dataclass
class TrainState:
    model: Any  # an nn.Module without DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    window: MetricWindow
    step: int = 0  # completed updates
    step_fn: StepFn | None = None
    pace: Pace = field(default_factory=Pace)
    steps_to_poll: int = 0  # counted separately, so that a desynchronized rank still joins the poll
    saved_step: int = -1  # -1: a signal before the first step saves, too
    evaluated_step: int = 0
    best: dict[str, Any] | None = None  # {"val_top1", "checkpoint", "step"}
    seconds_before: float = 0.0  # of earlier starts
    device_seconds_before: float = 0.0  # of earlier starts, each times its number of processes
    started: float = field(default_factory=time.perf_counter)
    last_save: float = field(default_factory=time.perf_counter)
    writer: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    writing: Future[None] | None = None  # the newest checkpoint, on rank 0

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run over all starts."""
        return self.seconds_before + time.perf_counter() - self.started

    def device_seconds(self, world_size: int) -> float:
        """Return the time of all starts, each times its number of processes."""
        return self.device_seconds_before + world_size * (time.perf_counter() - self.started)

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged model if there is one, otherwise the model."""
        return self.average.model if self.average else self.model

    def update_best(self, val_top1: float) -> bool:
        """Return whether this validation accuracy is the best so far; its checkpoint is then kept."""
        is_best = self.best is None or val_top1 > self.best["val_top1"]
        if is_best:
            name = f"step_{self.step:08d}"
            self.best = {"val_top1": val_top1, "checkpoint": name, "step": self.step}
        return is_best

    def check_finite(self, context: DistContext, *, max_skips: int, warn: bool) -> None:
        """Raise UserError after `max_skips` skipped steps in a row, on all ranks.

        The weights are those before the skipped steps. With `warn`, log what was skipped since the
        last log.
        """
        in_a_row, skipped, before = self.window.skips.tolist()  # the only host read of a log
        fatal = in_a_row >= max_skips or (skipped and max_skips == 1)
        if not fatal and not (warn and skipped):
            return
        first = self.step - self.window.steps + before + 1
        terms = self.window.nonfinite_terms(context)
        if not fatal:
            log.warning(f"step {first}: not finite: {terms}; skipped {skipped} step(s)")
            return
        raise UserError(
            f"step {first}: {NOT_FINITE}: {terms}; {skipped} step(s) since then changed no weight and "
            "nothing of it was saved. Lower optim.lr, set optim.max_grad_norm, try "
            "run.precision=fp32, or skip single steps with run.on_nonfinite=skip"
        )

    def save(
        self, folder: Path, context: DistContext, *, keep: int, metadata: dict[str, Any]
    ) -> None:
        """Copy the state; rank 0 writes it as a checkpoint in a thread while training continues.

        Waits for the checkpoint before. `metadata` is stored with it and compared at the next start.
        """
        self.finish_saving(context)
        sums, nonfinite = self.window.read(), self.window.read_nonfinite()  # collective
        self.saved_step, self.last_save = self.step, time.perf_counter()
        if not context.is_main:
            return
        progress = {
            **metadata,
            "seconds": self.seconds,
            "device_seconds": self.device_seconds(context.world_size),
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "optimizer": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict(),
            "window": {
                "names": self.window.names,
                "sums": sums,
                "steps": self.window.steps,
                "seconds": self.window.elapsed(),
                "skips": self.window.skips.tolist(),
                "nonfinite": nonfinite,
            },
        }
        tensors = {"model": self.model.state_dict()}
        if self.average:
            tensors["average"] = self.average.model.state_dict()
        self.writing = self.writer.submit(
            write_checkpoint,
            folder,
            self.step,
            checkpoint.to_cpu(tensors),
            checkpoint.to_cpu(portable_state_dict(self.optimizer)),
            copy.deepcopy(progress),
            keep,
        )

    def finish_saving(self, context: DistContext) -> None:
        """Wait until the last checkpoint is complete; all ranks raise its error."""
        context.run_on_main(wait_for, self.writing)

    @property
    def checkpoint_failed(self) -> bool:
        """Whether writing the last checkpoint raised an error (known on rank 0)."""
        writing = self.writing
        return bool(writing and writing.done() and writing.exception())

    def restore(self, saved: Path, context: DistContext) -> None:
        """Load a checkpoint of this run that was verified before."""
        progress = checkpoint.load_progress(saved)
        self.model.load_state_dict(checkpoint.load_tensors(saved, "model"))
        fits = load_portable_state_dict(self.optimizer, checkpoint.load_optimizer(saved))
        assert fits, "a changed recipe is refused"
        if progress["scaler"]:  # empty for bf16 and fp32
            self.scaler.load_state_dict(progress["scaler"])
        if self.average:
            self.average.model.load_state_dict(checkpoint.load_tensors(saved, "average"))
        self.window.restore(**progress["window"], context=context)
        self.step = self.saved_step = progress["step"]
        self.evaluated_step, self.best = progress["evaluated_step"], progress["best"]
        self.seconds_before = progress["seconds"]
        self.device_seconds_before = progress["device_seconds"]

    def start_fork(self, fork: Fork) -> None:
        """Take from the origin's checkpoint what fits this run, whose model has its weights already."""
        saved = fork.checkpoint
        progress, fits = checkpoint.load_progress(saved), False
        if progress["optimizer"] == type(self.optimizer).__name__:
            fits = load_portable_state_dict(self.optimizer, checkpoint.load_optimizer(saved))
        if fits and self.scaler.is_enabled() and progress["scaler"]:
            self.scaler.load_state_dict(progress["scaler"])
        if self.average and fork.keeps_average:
            self.average.model.load_state_dict(checkpoint.load_tensors(saved, "average"))
        self.step = self.evaluated_step = fork.start_step
        log.info(
            f"forked from {fork.run} at step {fork.step}, starting at step {fork.start_step}"
            + ("" if fits else " with a new optimizer state")
            + f"; differences: {'; '.join(fork.differences) or 'none'}"
        )


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    optimizer: dict[str, Any],
    progress: dict[str, Any],
    keep: int,
) -> None:
    """Write a checkpoint, then delete all but the newest `keep` and the best one."""
    checkpoint.save_checkpoint(
        folder, step=step, tensors=tensors, optimizer=optimizer, progress=progress
    )
    best = progress["best"]["checkpoint"] if progress["best"] else None
    checkpoint.prune(folder, keep=keep, best=best)


def wait_for(writing: Future[None] | None) -> None:
    if writing:
        writing.result()


def early_stop_reason(config: RunConfig, state: TrainState, steps_per_epoch: int) -> str | None:
    """Return why training stops before the last step, or None to continue.

    It stops when validation top-1 has not improved for `run.early_stopping_patience` epochs, which all
    ranks and every restart know from the checkpoint.
    """
    if config.early_stopping_patience is None or state.best is None:
        return None
    if state.step == config.epochs * steps_per_epoch:
        return None
    steps = state.evaluated_step - state.best["step"]
    if steps < config.early_stopping_patience * steps_per_epoch:
        return None
    return (
        f"val top1 has not improved for {steps / steps_per_epoch:g} epochs, since "
        f"{state.best['val_top1']:.2f} % after epoch {state.best['step'] / steps_per_epoch:g}"
    )


def poll_ranks(
    state: TrainState, context: DistContext, *, save_every_minutes: float
) -> tuple[int, bool, int]:
    """Agree on (stop signal or 0, whether to save now, steps until the next poll).

    Ranks poll about once per second of the slowest rank's step time; a single process at every step.
    """
    steps = state.window.steps
    minutes = (time.perf_counter() - state.last_save) / 60
    save_due = context.is_main and (minutes >= save_every_minutes or state.checkpoint_failed)
    step_seconds = state.window.elapsed() / steps if steps else POLL_SECONDS
    stop, save, slowest, latest, earliest = context.all_reduce_max(
        [
            float(signals.stop_signal()),
            float(save_due),
            step_seconds,
            float(state.step),
            float(-state.step),
        ]
    )
    if latest != -earliest:
        gathered = context.all_gather_object(state.step)
        steps_of = ", ".join(f"{rank}: {step}" for rank, step in enumerate(gathered))
        raise RuntimeError(f"ranks are at different steps (rank: step): {steps_of}")
    until_next = 1 if context.world_size == 1 else int(POLL_SECONDS / max(slowest, 1e-6))
    return int(stop), save > 0, min(max(until_next, 1), 1000)
