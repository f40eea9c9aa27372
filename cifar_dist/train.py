"""Train one recipe: set up, fit, finish. Read it top to bottom.

A run is a fold over the step. All that is random is derived from (seed, step, row), so stopping,
resuming and another number of processes are one thing: start again at the checkpoint's step.
"""

from __future__ import annotations

from cifar_dist.distributed import signals

if __name__ == "__main__":
    signals.install()  # before torch: a signal kills a Python process that has no handler yet

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cifar_dist import __version__
from cifar_dist.data.augment.albumentations_pipeline import Pipeline
from cifar_dist.data.dataset import read_digest
from cifar_dist.distributed.error_propagation import propagate_errors
from cifar_dist.distributed.launch import init_distributed, set_slurm_env
from cifar_dist.distributed.watchdog import watchdog
from cifar_dist.evaluation.evaluator import EvalResult, update_bn
from cifar_dist.models.backbones import pretrained_cfg
from cifar_dist.models.freeze import freeze, frozen_parameters
from cifar_dist.optim.optimizer import build_optimizer, max_lr, set_learning_rate
from cifar_dist.recipe.dry_run import describe
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.training.finish import Outcome, finish
from cifar_dist.training.graphed_step import build_step
from cifar_dist.training.log_record import log_record
from cifar_dist.training.resume import SYNTHETIC_NOTE, ensure_data, find_finished_run, log_finished
from cifar_dist.training.setup import Run, setup
from cifar_dist.training.state import TrainState, poll_ranks
from cifar_dist.utils.cli import add_recipe, command_parser
from cifar_dist.utils.errors import run_command
from cifar_dist.utils.host import peak_memory_bytes
from cifar_dist.utils.log import log, log_to_terminal


def train(recipe: Recipe, accelerator: Accelerator, *, force: bool = False) -> dict[str, Any]:
    """Train, evaluate, log and save one recipe, and return what summary.json contains.

    Resumes where an earlier start stopped; `finished` is False when a signal stopped this one.
    """
    with ExitStack() as stack:
        run, state = setup(recipe, accelerator, stack, force=force)
        seconds = recipe.run.timeout_seconds
        with watchdog(
            run.context, state, seconds=seconds, micro_batches=run.micro_batches
        ) as unwatch:
            outcome = fit(run, state)
            unwatch()
            return finish(run, state, outcome)


def fit(run: Run, state: TrainState) -> Outcome:
    """Train to the recipe's end, an early stop or a signal; between two steps do what is due.

    What is due is decided anew after a restart, and nothing happens twice at a step.
    """
    settings, evaluation = run.recipe.run, None
    while True:
        step, early_stop = state.step, early_stop_reason(run, state)
        at_end = step == run.total_steps or early_stop is not None
        polled = state.steps_to_poll == 0
        stop, save_now = poll(run, state) if polled else (0, False)
        stop = 0 if at_end else stop
        log_due = should_log(
            step, pending=state.window.steps, every=settings.log_every_steps, at_end=at_end
        )
        eval_due = should_evaluate(
            step,
            evaluated=state.evaluated_step,
            every=settings.eval_every_epochs * run.steps_per_epoch,
            at_end=at_end,
            stopping=stop > 0,
        )
        save_due = should_save(
            step, saved=state.saved_step, at_end=at_end, stopping=stop > 0, save_now=save_now
        )
        if log_due or eval_due or save_due:
            state.check_finite(run.context, most_skips=settings.max_consecutive_skips, warn=log_due)
        if log_due:
            log_training(run, state)
        if eval_due:
            evaluation, is_best = evaluate(run, state)
            if not at_end and early_stop_reason(run, state):
                continue  # this step is the end, and more is due
            save_due |= is_best
        if save_due:
            save(run, state)
        if stop or at_end:
            state.finish_saving(run.context)
            return Outcome(evaluation, stop, early_stop)
        if images_ready(run, state, polled=polled):
            train_one_step(run, state)


def should_log(step: int, *, pending: int, every: int, at_end: bool) -> bool:
    """Whether to log after `step` updates; `pending`: updates since the last report."""
    return pending > 0 and (at_end or step % every == 0)


def should_evaluate(step: int, *, evaluated: int, every: int, at_end: bool, stopping: bool) -> bool:
    """Whether to evaluate after `step` updates; `evaluated`: after how many it was done last.

    A run that is asked to stop evaluates when it is resumed.
    """
    return step > evaluated and not stopping and (at_end or step % every == 0)


def should_save(step: int, *, saved: int, at_end: bool, stopping: bool, save_now: bool) -> bool:
    """Whether to save a checkpoint after `step` updates; `saved`: the last one's number."""
    return step > saved and (at_end or stopping or save_now)


def early_stop_reason(run: Run, state: TrainState) -> str | None:
    """Return why training ends before the recipe's last step, or None."""
    if state.step == run.total_steps:
        return None
    return state.why_no_more(
        epochs_without_gain=run.recipe.run.early_stopping_patience,
        steps_per_epoch=run.steps_per_epoch,
    )


def poll(run: Run, state: TrainState) -> tuple[int, bool]:
    """Agree with the other ranks on a stop signal, or 0, and on whether to save now."""
    stop, save_now, state.steps_to_poll = poll_ranks(
        state, run.context, save_every_minutes=run.recipe.run.save_every_minutes
    )
    return stop, save_now


def log_training(run: Run, state: TrainState) -> None:
    """Log the means since the last report, and begin the next ones."""
    settings = run.recipe.run
    numbers = state.window.report(batch_size=settings.batch_size, may_skip=settings.may_skip)
    numbers |= {"lr": max_lr(state.optimizer, run.learning_rate(state.step - 1))}
    record(run, state, "train", numbers | {"memory_bytes": peak_memory_bytes(run.device)})
    state.window.clear()


def record(run: Run, state: TrainState, kind: str, values: dict[str, Any]) -> None:
    """Write a record to metrics.jsonl, W&B and the terminal."""
    about = {"kind": kind, "step": state.step, "epoch": state.step / run.steps_per_epoch}
    epochs = run.recipe.run.epochs
    run.context.run_on_main(
        log_record, about | values, run.metrics_file, run.tracker, epochs=epochs
    )


def evaluate(run: Run, state: TrainState) -> tuple[EvalResult, bool]:
    """Evaluate on the test and validation rows, and log it; whether validation top-1 is the best yet."""
    is_best, epoch = False, state.step // run.steps_per_epoch
    with state.window.timer_paused():
        if state.average and state.average.needs_bn_update(state.step):
            update_bn(
                state.average.model,
                run.objective.augment.clone(),  # workers are further on
                run.train_split,
                run.rows,
                seed=run.recipe.run.seed,
                epoch=epoch - 1,  # the last one
                precision=run.recipe.run.precision,
                context=run.context,
                frozen=frozen_parameters(run.unfreeze_epochs, epoch - 1),
            )
        evaluation = run.evaluate(state, run.test_split)
        numbers = dict(evaluation.metrics)
        if run.val_rows is not None:
            validation = run.evaluate(state, run.train_split, run.val_rows).metrics
            numbers |= {f"val_{name}": value for name, value in validation.items()}
            is_best = state.update_best(validation["top1"])
        record(run, state, "eval", numbers)
        state.evaluated_step = state.step
    return evaluation, is_best


def save(run: Run, state: TrainState) -> None:
    """Save a checkpoint, after all records that it has seen."""
    with state.window.timer_paused():
        run.context.run_on_main(run.metrics_file.sync)
        keep = run.recipe.run.keep_checkpoints
        state.save(run.folder / "checkpoints", run.context, keep=keep, metadata=run.metadata)


def images_ready(run: Run, state: TrainState, *, polled: bool) -> bool:
    """Whether the host's workers, if there are any, have this epoch's images; False: poll first."""
    new_epoch = state.step % run.steps_per_epoch == 0
    if (
        run.albumentations_workers
        and (polled or new_epoch)
        and not run.albumentations_workers.wait_for_epoch(state.step // run.steps_per_epoch)
    ):
        state.steps_to_poll = 0
        return False
    return True


def train_one_step(run: Run, state: TrainState) -> None:
    """The life of a sample: rows -> augmented images -> outputs -> losses -> gradient -> weights."""
    epoch = state.step // run.steps_per_epoch
    if state.step_fn is None or state.step % run.steps_per_epoch == 0:
        prepare_step(run, state, epoch)
    assert state.step_fn
    set_learning_rate(state.optimizer, run.learning_rate(state.step))
    state.model.train_size = run.recipe.model.train_size(epoch)
    state.window.add(state.step_fn(next(run.batches), step=state.step))
    state.step += 1
    state.steps_to_poll -= 1
    if state.average:
        state.average.update(state.model, state.step)
    run.bar.update()


def prepare_step(run: Run, state: TrainState, epoch: int) -> None:
    """Let learn what learns in this epoch; where that changes, build the step again.

    DDP reduces the parameters that required a gradient when it was built, and no others.
    """
    changed = freeze(state.model, run.recipe.model.freeze, epoch=epoch)
    if state.step_fn is not None and not changed:
        return
    state.step_fn = None  # its recordings' memory is free for the next ones
    settings = run.recipe.run
    state.step_fn = build_step(
        run.accelerator,
        state.model,
        run.objective,
        state.optimizer,
        state.scaler,
        cuda_graphs=settings.cuda_graphs,
        micro_batches=run.micro_batches,
        precision=settings.precision,
        seed=settings.seed,
        batch_size=settings.batch_size,
        max_grad_norm=run.recipe.optim.max_grad_norm,
        sam=run.recipe.optim.sam,
        grad_reduce_dtype=settings.grad_reduce_dtype,
        restore_buffers=settings.may_skip,
    )


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "train",
        "Train a recipe on one process or many; start it again to go on.",
        "python -m cifar_dist.train recipes/debug.yaml",
        "accelerate launch -m cifar_dist.train recipes/r50_224.yaml run.epochs=20",
        "accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml -m cifar_dist.train "
        "recipes/r50_224.yaml name=r50_224_s1 run.seed=1",
    )
    add_recipe(parser, "a YAML file, see recipes/")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and its cost"
    )
    parser.add_argument("--json", action="store_true", help="print --dry-run as JSON")
    parser.add_argument(
        "--force", action="store_true", help="go on although the recipe has changed"
    )
    parser.add_argument("--version", action="version", version=f"cifar_dist {__version__}")
    options = parser.parse_intermixed_args(arguments)

    set_slurm_env()
    log_to_terminal()
    recipe = load_recipe(options.recipe, options.overrides)
    if options.dry_run:
        plan = describe(recipe)
        print(json.dumps(asdict(plan)) if options.json else plan)
        return 0
    pretrained_cfg(recipe.model.backbone)  # all refuse a wrong name before anything is downloaded
    build_optimizer(recipe.optim, torch.nn.Linear(1, 1))
    if recipe.augment.albumentations:
        Pipeline(recipe.augment.albumentations)
    path, source = Path(recipe.data.path), recipe.data.source
    has_data = (path / "digest.json").exists()
    is_sample = read_digest(path)["content"] == "sample" if has_data else source == "sample"
    if is_sample:
        log.info(SYNTHETIC_NOTE)
    if not has_data and not ensure_data(path, source):
        return signals.STOPPED
    summary = find_finished_run(recipe)
    if summary is not None and not options.force:
        log_finished(recipe, summary, is_synthetic=is_sample)
        return 0
    accelerator = init_distributed(
        timeout_seconds=recipe.run.timeout_seconds,
        threads=recipe.run.threads,
        deterministic=recipe.run.deterministic,
    )
    log.info(
        f"cifar_dist {__version__}: {accelerator.num_processes} process(es) train on "
        f"{accelerator.device.type}, {recipe.run.precision}, {torch.get_num_threads()} CPU thread(s) each"
    )
    with propagate_errors(accelerator):
        summary = train(recipe, accelerator, force=options.force)
    if not summary["finished"]:
        log.info(
            f"{recipe.name}: stopped by {summary['stopped_by']} at step "
            f"{summary['steps']}, all saved in {recipe.folder}; start it again to go on"
        )
        return signals.STOPPED
    log_finished(recipe, summary, is_synthetic=is_sample)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
