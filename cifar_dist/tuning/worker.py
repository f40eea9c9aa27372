"""Train the trials of a sweep one after another, also next to other workers.

A trial is a run folder. Its training runs in other processes, which know nothing of the sweep: the worker
reads metrics.jsonl, reports each evaluation to Optuna, and ends a pruned trial with SIGTERM, which makes
all ranks save and stop. A worker holds a lock while it trains a trial, because Optuna's state of a trial
stays `running` after a crash.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import Trial, TrialState

from cifar_dist.distributed import signals
from cifar_dist.recipe.sweep import format_value
from cifar_dist.training.lock import lock_holder, run_lock
from cifar_dist.training.state import NOT_FINITE
from cifar_dist.tuning.results import ranking, read_result
from cifar_dist.tuning.study import SweepFolder, ask, values_of
from cifar_dist.utils.errors import USER_ERROR, UserError
from cifar_dist.utils.log import log
from cifar_dist.utils.units import format_duration

CHECK_SECONDS = 0.2
ORPHAN_SECONDS = 120  # for the ranks of a killed worker to save and exit
MAX_ATTEMPTS = 3  # at a training that crashes, for example by lack of memory
# Variables of the launcher that started this worker, which a training would join.
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"}


def work(run: SweepFolder, processes: str) -> None:
    """Train trials until none is left or a stop signal arrives."""
    attempts: dict[int, int] = {}
    while not signals.stop_signal():
        with claim_trial(run) as trial:
            if trial is None:
                return
            attempts[trial.number] = attempts.get(trial.number, 0) + 1
            is_last = attempts[trial.number] == MAX_ATTEMPTS
            train_trial(run, trial, processes, is_last_attempt=is_last)


@contextmanager
def claim_trial(run: SweepFolder) -> Iterator[Trial | None]:
    """Lock an interrupted trial, otherwise a new one; None if other workers have all that are left."""
    with ExitStack() as stack:
        for frozen in run.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if try_lock(run, frozen.number, stack):
                yield Trial(run.study, frozen._trial_id)
                return
        while (trial := ask(run)) is not None:
            if try_lock(run, trial.number, stack):  # another worker may take it for interrupted
                break
        yield trial


def try_lock(run: SweepFolder, number: int, stack: ExitStack) -> bool:
    """Try to lock a trial until `stack` is closed."""
    folder = run.trial_folder(number)
    try:
        stack.enter_context(run_lock(folder, run.path / "workers" / folder.name))
    except UserError:
        return False
    return True


def train_trial(run: SweepFolder, trial: Trial, processes: str, *, is_last_attempt: bool) -> None:
    """Train a locked trial until it is finished, pruned, stopped or failed, and tell Optuna."""
    number = trial.number
    frozen = run.trials[number]
    if frozen.state.is_finished():
        return  # by another worker, before we had the lock
    is_pruned, code = train(run, number, values_of(frozen), processes, trial)
    if is_pruned or code == signals.STOPPED:
        return
    if code == 0:
        run.study.tell(number, read_result(run, number).value)
    elif code == USER_ERROR or is_last_attempt:
        message = f"trial_{number:04d} failed: {last_error(run.log_file(number))}"
        if NOT_FINITE not in message:
            raise UserError(f"{message}; the trial is resumed when the sweep is started again")
        run.study.tell(number, state=TrialState.FAIL)
        log.warning(message)


def continue_best(run: SweepFolder, count: int, processes: str) -> None:
    """Train the best pruned trials to full length, one after another."""
    for trial, result in ranking(run)[:count]:
        if result.last_epoch < run.epochs and not signals.stop_signal():
            with ExitStack() as stack:
                if try_lock(run, trial.number, stack):
                    train(run, trial.number, values_of(trial), processes)


def train(
    run: SweepFolder,
    number: int,
    values: dict[str, Any],
    processes: str,
    trial: Trial | None = None,
) -> tuple[bool, int]:
    """Train or resume a trial; return whether it was pruned, and the exit code.

    Without `trial` it is not pruned.
    """
    folder = run.trial_folder(number)
    wait_for_orphans(folder)
    text = " ".join(f"{key}={format_value(value)}" for key, value in values.items())
    log.info(f"{folder.name}: {text}")
    command = [
        *(sys.executable, "-m", "cifar_dist.cli", "train", run.sweep.recipe),
        *run.sweep.overrides(values),
        *(f"name={folder.name}", f"run.output_dir={run.path}", f"tracking.group={run.path.name}"),
        *("--processes", processes),
    ]
    started, is_pruned, sent = time.monotonic(), False, False
    with open(run.log_file(number), "ab") as output:
        process = subprocess.Popen(
            command,
            env={key: value for key, value in os.environ.items() if key not in LAUNCHER},
            stdout=output,
            stderr=output,
            start_new_session=True,  # the terminal's Ctrl-C reaches it once: through this process
            preexec_fn=signals.signal_at_parent_exit,
        )
    while process.poll() is None:
        is_pruned = is_pruned or (trial is not None and report(run, trial))
        stop = signal.SIGTERM if is_pruned else signals.stop_signal()
        if stop and not sent:
            process.send_signal(stop)
            sent = True
        time.sleep(CHECK_SECONDS)
    is_pruned = is_pruned or (trial is not None and report(run, trial))
    state = "pruned" if is_pruned else "finished" if process.returncode == 0 else "stopped"
    duration = format_duration(time.monotonic() - started)
    log.info(f"{read_result(run, number)}, {state} after {duration}")
    return is_pruned, process.returncode


def report(run: SweepFolder, trial: Trial) -> bool:
    """Report new evaluations to Optuna; return whether the trial is pruned, and tell Optuna so."""
    known = run.trials[trial.number].intermediate_values
    for epoch, value in read_result(run, trial.number).evaluations.items():
        if epoch in known:
            continue
        trial.report(value, epoch)
        if epoch < run.epochs and trial.should_prune():
            run.study.tell(trial.number, state=TrialState.PRUNED)
            return True
    return False


def wait_for_orphans(folder: Path) -> None:
    """Wait until the ranks of a killed worker have saved and exited."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (holder := lock_holder(folder)) and not signals.stop_signal():
        if time.monotonic() > deadline:
            raise UserError(f"{folder} is in use by {holder}; stop it, or wait for it")
        time.sleep(CHECK_SECONDS)


def last_error(log_file: Path) -> str:
    """Return the last error message in a trial's log, or its last line."""
    lines = log_file.read_text(errors="replace").splitlines() or ["no output"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{(errors or lines)[-1]} (see {log_file})"
