"""Train a recipe: set up, fit, finish.

Everything random is derived from (seed, step, row). Stopping, resuming and changing the number of
processes are therefore one operation: build everything as at the start, load, continue at step n.
"""

from __future__ import annotations

from cifar_dist.distributed import elastic, signals
from cifar_dist.utils.cli import parse_early, parse_recipe, train_parser

if __name__ == "__main__":  # before importing torch, which takes seconds
    signals.install()  # an unhandled signal would kill the process
    elastic.stop_with_agent()
    parse_early(train_parser())

import json
import logging
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cifar_dist.distributed.launch import set_slurm_env
from cifar_dist.distributed.watchdog import watchdog
from cifar_dist.evaluation.evaluator import EvaluationStoppedError
from cifar_dist.recipe.dry_run import describe
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe
from cifar_dist.recipe.session import distributed_session, keep_precision
from cifar_dist.training.finish import Outcome, finish, log_summary
from cifar_dist.training.loop import (
    evaluate,
    images_ready,
    log_train_metrics,
    poll,
    save,
    train_one_step,
)
from cifar_dist.training.setup import Run, setup
from cifar_dist.training.start import check_names, ensure_data, find_finished_run
from cifar_dist.training.state import TrainState, early_stop_reason
from cifar_dist.training.timing import time_training
from cifar_dist.utils.errors import USER_ERROR, is_main_rank, run_command
from cifar_dist.utils.log import log, log_to_terminal


def run_training(recipe: Recipe, *, fork: Path | None = None) -> dict[str, Any] | None:
    """Prepare the data, start the processes and train; return the summary, None if stopped before."""
    check_names(recipe)
    if not ensure_data(recipe):
        return None
    summary = find_finished_run(keep_precision(recipe), fork=fork)
    if summary is None:
        with distributed_session(recipe) as accelerator:
            summary = train(recipe, accelerator, fork=fork)
    log_summary(recipe, summary)
    return summary


def train(recipe: Recipe, accelerator: Accelerator, *, fork: Path | None = None) -> dict[str, Any]:
    """Train, evaluate, log and save a recipe, and return the content of summary.json.

    Resumes from the newest checkpoint; a new run may start from that of another run, whose folder is
    `fork`. `finished` is False if a signal stopped the run.
    """
    with ExitStack() as stack:
        run, state = setup(recipe, accelerator, stack, fork=fork)
        with watchdog(
            run.context,
            state,
            seconds=recipe.run.timeout_seconds,
            micro_batches=run.micro_batches,
            folder=run.folder,
        ) as stop:
            outcome = fit(run, state)
            stop()
            return finish(run, state, outcome)


def fit(run: Run, state: TrainState) -> Outcome:
    """Train until the last step, an early stop or a signal.

    What is due is decided between two steps from the state alone: after a restart nothing is lost
    and nothing happens twice.
    """
    config, result = run.recipe.run, None
    while True:
        step, early_stop = state.step, early_stop_reason(run.recipe.run, state, run.steps_per_epoch)
        at_end = step == run.total_steps or early_stop is not None
        polled = state.steps_to_poll == 0
        stop, save_now = poll(run, state) if polled else (0, False)
        stop = 0 if at_end and state.evaluated_step == step else stop
        log_due = should_log(
            step, pending=state.window.steps, every=config.log_every_steps, at_end=at_end
        )
        eval_due = should_evaluate(
            step,
            evaluated=state.evaluated_step,
            every=config.eval_every_epochs * run.steps_per_epoch,
            at_end=at_end,
            stopping=stop > 0,
        )
        save_due = should_save(
            step, saved=state.saved_step, at_end=at_end, stopping=stop > 0, save_now=save_now
        )
        if log_due or eval_due or save_due:
            state.check_finite(run.context, max_skips=config.max_consecutive_skips, warn=log_due)
        if log_due:
            log_train_metrics(run, state)
        if eval_due:
            try:
                result, is_best = evaluate(run, state)
            except EvaluationStoppedError:
                state.steps_to_poll = 0  # stop at once
                continue
            if not at_end and early_stop_reason(run.recipe.run, state, run.steps_per_epoch):
                continue  # this step turned out to be the last one
            save_due |= is_best
        if save_due:
            save(run, state)
        if stop or at_end:
            state.finish_saving(run.context)
            return Outcome(result, stop, early_stop)
        if images_ready(run, state, polled=polled):
            train_one_step(run, state)


def should_log(step: int, *, pending: int, every: int, at_end: bool) -> bool:
    """Return whether to log after `step` updates; `pending` updates have not been logged yet."""
    return pending > 0 and (at_end or step % every == 0)


def should_evaluate(step: int, *, evaluated: int, every: int, at_end: bool, stopping: bool) -> bool:
    """Return whether to evaluate after `step` updates; the last evaluation was after `evaluated`.

    A run that is stopping evaluates when it is resumed.
    """
    return step > evaluated and not stopping and (at_end or step % every == 0)


def should_save(step: int, *, saved: int, at_end: bool, stopping: bool, save_now: bool) -> bool:
    """Return whether to save after `step` updates; the last checkpoint is of step `saved`."""
    return step > saved and (at_end or stopping or save_now)


def main(arguments: list[str]) -> int:
    options = parse_recipe(train_parser(), arguments)
    set_slurm_env()
    log_to_terminal()
    recipe = load_recipe(options.recipe, options.overrides)
    if options.dry_run:
        if options.json:
            log.setLevel(logging.WARNING)
        if options.time and not ensure_data(recipe):
            return signals.STOPPED
        plan = describe(recipe, time_training(recipe) if options.time else None)
        if is_main_rank():
            print(json.dumps(asdict(plan)) if options.json else plan)
        return 0
    summary = run_training(recipe, fork=options.fork)
    if summary and summary["finished"]:
        return 0
    if summary and summary["stopped_by"] != "SIGTERM":  # that is from the agent, or for it as well
        elastic.stop_agent()
    return signals.STOPPED


if __name__ == "__main__":
    code = run_command(main)
    if code == USER_ERROR:
        elastic.stop_agent()
    sys.exit(code)
