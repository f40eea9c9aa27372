"""The actions of the training loop: log, evaluate, save, take a step. `cifar_dist/train.py` calls them."""

from __future__ import annotations

import time
from typing import Any

from cifar_dist.evaluation.evaluator import EvalResult, update_bn
from cifar_dist.models.freeze import freeze, frozen_parameters
from cifar_dist.optim.optimizer import max_lr, set_learning_rate
from cifar_dist.training.graphed_step import build_step
from cifar_dist.training.log_record import log_record
from cifar_dist.training.setup import Run
from cifar_dist.training.state import TrainState, poll_ranks
from cifar_dist.training.step import StepConfig
from cifar_dist.utils.host import peak_memory_bytes
from cifar_dist.utils.log import log
from cifar_dist.utils.units import format_duration


def poll(run: Run, state: TrainState) -> tuple[int, bool]:
    """Agree with the other ranks: return the stop signal (0: none) and whether to save now.

    Once, a few seconds after the start, log the time left.
    """
    stop, save_now, state.steps_to_poll = poll_ranks(
        state, run.context, save_every_minutes=run.recipe.run.save_every_minutes
    )
    if speed := state.pace.steps_per_second(state.step, time.monotonic()):
        left = format_duration((run.total_steps - state.step) / speed)
        images = speed * run.recipe.run.batch_size
        log.info(f"about {left} left at {images:,.0f} images/s, without evaluations")
    return stop, save_now


def log_train_metrics(run: Run, state: TrainState) -> None:
    """Log the means since the last log, and reset them."""
    config = run.recipe.run
    values = state.window.report(batch_size=config.batch_size, may_skip=config.may_skip)
    values |= {"lr": max_lr(state.optimizer, run.learning_rate(state.step - 1))}
    log_values(run, state, "train", values | {"memory_bytes": peak_memory_bytes(run.device)})
    state.window.clear()


def log_values(run: Run, state: TrainState, kind: str, values: dict[str, Any]) -> None:
    """Write a record to metrics.jsonl, W&B and the terminal."""
    record = {"kind": kind, "step": state.step, "epoch": state.step / run.steps_per_epoch, **values}
    epochs, losses = run.recipe.run.epochs, list(run.recipe.losses)
    run.context.run_on_main(
        log_record, record, run.metrics_file, run.tracker, epochs=epochs, losses=losses
    )


def evaluate(run: Run, state: TrainState) -> tuple[EvalResult, bool]:
    """Evaluate and log; return the test result, and whether validation top-1 is the best so far.

    A stop signal raises EvaluationStoppedError; the evaluation is repeated after the restart.
    """
    is_best, epoch = False, state.step // run.steps_per_epoch
    with state.window.timer_paused():
        if state.average and state.average.needs_bn_update(state.step):
            update_bn(
                state.average.model,
                run.objective.augment.clone(),  # the original is ahead by an epoch
                run.train_split,
                run.rows,
                seed=run.recipe.run.seed,
                epoch=epoch - 1,
                precision=run.recipe.run.precision,
                context=run.context,
                frozen=frozen_parameters(run.unfreeze_epochs, epoch - 1),
                stoppable=True,
            )
        result = run.evaluate(state, run.test_split, stoppable=True)
        metrics = dict(result.metrics)
        if run.val_rows is not None:
            validation = run.evaluate(state, run.train_split, run.val_rows, stoppable=True).metrics
            metrics |= {f"val_{name}": value for name, value in validation.items()}
            is_best = state.update_best(validation["top1"])
        log_values(run, state, "eval", metrics)
        state.evaluated_step = state.step
    return result, is_best


def save(run: Run, state: TrainState) -> None:
    """Save a checkpoint, after all records of the steps before it are on disk."""
    with state.window.timer_paused():
        run.context.run_on_main(run.metrics_file.sync)
        keep, folder = run.recipe.run.keep_checkpoints, run.folder / "checkpoints"
        state.save(folder, run.context, keep=keep, metadata=run.metadata)


def images_ready(run: Run, state: TrainState, *, polled: bool) -> bool:
    """Wait for this epoch's images of the albumentations workers; False: poll the ranks first."""
    new_epoch = state.step % run.steps_per_epoch == 0
    workers = run.albumentations_workers
    if workers is None or not (polled or new_epoch):
        return True
    if workers.wait_for_epoch(state.step // run.steps_per_epoch):
        return True
    state.steps_to_poll = 0
    return False


def train_one_step(run: Run, state: TrainState) -> None:
    """Rows -> augmented images -> outputs -> losses -> gradients -> weights."""
    epoch = state.step // run.steps_per_epoch
    if state.step_fn is None or state.step % run.steps_per_epoch == 0:
        update_trainable_parameters(run, state, epoch)
    assert state.step_fn
    set_learning_rate(state.optimizer, run.learning_rate(state.step))
    state.model.train_size = run.recipe.model.train_size(epoch)
    state.window.add(state.step_fn(next(run.batches), step=state.step))
    state.step += 1
    state.steps_to_poll -= 1
    if state.average:
        state.average.update(state.model, state.step)
    run.bar.update()


def update_trainable_parameters(run: Run, state: TrainState, epoch: int) -> None:
    """Freeze and unfreeze what the recipe says, and build the step again if that changes anything.

    DDP reduces only the parameters that required a gradient when it was built.
    """
    changed = freeze(state.model, run.recipe.model.freeze, epoch=epoch)
    if state.step_fn is not None and not changed:
        return
    state.step_fn = None  # frees the memory of its CUDA graphs
    config = run.recipe.run
    state.step_fn = build_step(
        run.accelerator,
        state.model,
        run.objective,
        state.optimizer,
        state.scaler,
        StepConfig(
            precision=config.precision,
            seed=config.seed,
            batch_size=config.batch_size,
            max_grad_norm=run.recipe.optim.max_grad_norm,
            sam=run.recipe.optim.sam,
            reduction=config.reduction,
            grad_reduce_dtype=config.grad_reduce_dtype,
        ),
        cuda_graphs=config.cuda_graphs,
        micro_batches=run.micro_batches,
        restore_buffers=config.may_skip,
    )
