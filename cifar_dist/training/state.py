"""The state of a run at a step, and nothing else: what a checkpoint holds.

No random state, no sampler, no loader: those are functions of the step.
"""

from __future__ import annotations

import copy
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar_dist.distributed import signals
from cifar_dist.distributed.context import DistContext
from cifar_dist.optim.averaging import WeightAverage
from cifar_dist.optim.optimizer import load_portable_state_dict, portable_state_dict
from cifar_dist.run_folder import checkpoint
from cifar_dist.training.graphed_step import StepFn
from cifar_dist.training.metric_window import MetricWindow
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.log import log

POLL_SECONDS = 1.0  # how often ranks agree on stopping and saving


@dataclass
class TrainState:
    model: Any  # the bare one, an nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    window: MetricWindow
    step: int = 0  # updates done
    step_fn: StepFn | None = None  # how to do the next one
    steps_to_poll: int = 0  # counted separately, so that a desynchronised rank still joins the poll
    saved_step: int = -1  # nothing: a signal before the first step saves, too
    evaluated_step: int = 0
    best: dict[str, Any] | None = None  # by held-out accuracy: {"val_top1", "checkpoint", "step"}
    seconds_before: float = 0.0  # of earlier starts
    started: float = field(default_factory=time.perf_counter)
    last_save: float = field(default_factory=time.perf_counter)
    writer: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    writing: Future[None] | None = None  # the newest checkpoint, on rank 0

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run, all starts together."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def evaluated_model(self) -> nn.Module:
        """What is judged: the average where there is one."""
        return self.average.model if self.average else self.model

    def update_best(self, top1: float) -> bool:
        """Whether this held-out accuracy is the best so far; then this step's checkpoint is kept."""
        is_best = self.best is None or top1 > self.best["val_top1"]
        if is_best:
            self.best = {"val_top1": top1, "checkpoint": f"step_{self.step:08d}"}
            self.best["step"] = self.step
        return is_best

    def why_no_more(self, *, epochs_without_gain: int | None, steps_per_epoch: int) -> str | None:
        """Why training ends early: held-out accuracy has not risen for so long; None: it goes on.

        Known from what all ranks share and a checkpoint keeps, so a restart finds the same.
        """
        if epochs_without_gain is None or self.best is None:
            return None
        steps = self.evaluated_step - self.best["step"]
        if steps < epochs_without_gain * steps_per_epoch:
            return None
        return (
            f"val top1 has not risen for {steps / steps_per_epoch:g} epochs, since its "
            f"{self.best['val_top1']:.2f} % after epoch {self.best['step'] / steps_per_epoch:g}"
        )

    def check_finite(self, context: DistContext, *, most_skips: int, warn: bool) -> None:
        """Stop when `most_skips` steps in a row were not finite; the weights are those before them.

        `warn`: name what was left out since the last report. All ranks find the same.
        """
        in_a_row, skipped, before = self.window.skips.tolist()  # the one host read of a report
        stops = in_a_row >= most_skips or (skipped and most_skips == 1)
        if not stops and not (warn and skipped):
            return
        first = self.step - self.window.steps + before + 1
        what = f"step {first}: not finite: {self.window.nonfinite_terms(context)}"
        if not stops:
            log.warning(f"{what}; {skipped} step(s) left out since the last report")
            return
        raise UserError(
            f"{what}; {skipped} step(s) since then changed no weight and nothing of it was saved. "
            "Lower optim.lr, set optim.max_grad_norm, try run.precision=fp32, or leave single steps "
            "out with run.on_nonfinite=skip"
        )

    def save(
        self, folder: Path, context: DistContext, *, keep: int, metadata: dict[str, Any]
    ) -> None:
        """Copy the state of this step; rank 0 writes it as a checkpoint while training goes on.

        One is written at a time, so this waits for the one before. `facts` (micro-batches, digest of the
        data) are kept beside, to be compared on the next start.
        """
        self.finish_saving(context)
        sums, broken = self.window.read(), self.window.read_nonfinite()  # all ranks take part
        self.saved_step, self.last_save = self.step, time.perf_counter()
        if not context.is_main:
            return
        progress = {
            **metadata,
            "seconds": self.seconds,
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
                "nonfinite": broken,
            },
        }
        tensors = {"model": self.model.state_dict()}
        if self.average:
            tensors["average"] = self.average.model.state_dict()
        write = partial(
            checkpoint.save_checkpoint,
            folder,
            step=self.step,
            tensors=checkpoint.to_cpu(tensors),
            optimizer=checkpoint.to_cpu(portable_state_dict(self.optimizer)),
            progress=copy.deepcopy(progress),
        )
        best = self.best["checkpoint"] if self.best else None

        def write_and_prune() -> None:
            write()
            checkpoint.prune(folder, keep=keep, best=best)

        self.writing = self.writer.submit(write_and_prune)

    def finish_saving(self, context: DistContext) -> None:
        """Wait until the last checkpoint is complete; all ranks raise the error that it met."""
        context.run_on_main(lambda: self.writing.result() if self.writing else None)

    @property
    def checkpoint_failed(self) -> bool:
        """Whether the last checkpoint met an error already (on rank 0, which writes)."""
        writing = self.writing
        return bool(writing and writing.done() and writing.exception())

    def restore(self, saved: Path, context: DistContext, *, total_steps: int) -> None:
        """Become the state that `saved` (checked before) holds, on every rank.

        UserError for what a forced recipe cannot go on from.
        """
        progress = checkpoint.load_progress(saved)
        if progress["step"] > total_steps:
            raise UserError(
                f"the run has done {progress['step']} steps and this recipe ends after {total_steps}; "
                "raise run.epochs, or give it a name (name=...)"
            )
        before, now = progress.get("optimizer"), type(self.optimizer).__name__
        if before and before != now:
            raise UserError(
                f"{now} cannot go on from the state of {before}; give the run a name (name=...)"
            )
        self.model.load_state_dict(checkpoint.load_tensors(saved, "model"))
        load_portable_state_dict(self.optimizer, checkpoint.load_optimizer(saved))
        if progress["scaler"]:  # not of bf16 or fp32
            self.scaler.load_state_dict(progress["scaler"])
        if self.average:
            average = checkpoint.load_tensors(
                saved, "average"
            )  # none: asked for only now, by force
            self.average.model.load_state_dict(average or self.model.state_dict())
        self.window.restore(**{"names": self.window.names} | progress["window"], context=context)
        self.step = self.saved_step = progress["step"]
        self.evaluated_step, self.best = progress["evaluated_step"], progress["best"]
        self.seconds_before = progress["seconds"]


def poll_ranks(
    state: TrainState, context: DistContext, *, save_every_minutes: float
) -> tuple[int, bool, int]:
    """What ranks agree on: a stop signal or 0, save now? (rank 0's clock), steps to the next vote.

    Votes come about once a second of the slowest rank's measured step time; alone, at every step.
    """
    steps = state.window.steps
    minutes = (time.perf_counter() - state.last_save) / 60
    stop, save, slowest, latest, earliest = context.all_reduce_max(
        [
            float(signals.stop_signal()),
            float(context.is_main and (minutes >= save_every_minutes or state.checkpoint_failed)),
            state.window.elapsed() / steps if steps else POLL_SECONDS,
            float(state.step),
            float(-state.step),
        ]
    )
    if latest != -earliest:
        done = ", ".join(
            f"{rank}: {step}" for rank, step in enumerate(context.all_gather_object(state.step))
        )
        raise RuntimeError(f"ranks have lost each other; steps they have done: {done}")
    until_next = 1 if context.world_size == 1 else int(POLL_SECONDS / max(slowest, 1e-6))
    return int(stop), save > 0, min(max(until_next, 1), 1000)
