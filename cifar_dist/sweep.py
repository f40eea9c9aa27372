"""Choose hyper-parameters on validation rows: train the trials of a sweep."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.distributed import signals
from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import UserError, run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "sweep",
        "Train the trials of a sweep. The same command on other GPUs or nodes helps; after a stop or a "
        "crash it continues. docs/sweeps.md describes the file.",
        "python -m cifar_dist.sweep sweeps/r18_32_lr.yaml",
        "CUDA_VISIBLE_DEVICES=1 python -m cifar_dist.sweep sweeps/r18_32_lr.yaml",
        "python -m cifar_dist.sweep sweeps/r18_32_lr.yaml --continue-best 3",
    )
    parser.add_argument("sweep", type=Path, help="a YAML file; its trials are put next to it")
    parser.add_argument(
        "--processes", default="1", metavar="N", help="processes of each trial (default: 1)"
    )
    parser.add_argument(
        "--continue-best",
        type=int,
        default=0,
        metavar="K",
        help="train those of the K best trials that were pruned to full length",
    )
    options = parser.parse_args(arguments)
    if options.continue_best < 0:
        parser.error(f"--continue-best must be at least 0 (got {options.continue_best})")

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.utils.log import log, log_to_terminal

    try:
        from cifar_dist.tuning.results import format_table, write_best
        from cifar_dist.tuning.study import open_sweep
        from cifar_dist.tuning.worker import continue_best, work
    except ModuleNotFoundError as error:
        raise UserError(f"sweep needs {error.name}: pip install 'cifar-dist[sweep]'") from None

    log_to_terminal()
    signals.install()
    signals.save_on_interrupt()
    run = open_sweep(options.sweep)
    work(run, options.processes)
    continue_best(run, options.continue_best, options.processes)
    if signals.stop_signal():
        return signals.STOPPED
    running = sum(not trial.state.is_finished() for trial in run.trials)
    print(format_table(run))
    if running:
        log.info(f"{running} trial(s) are still trained by other workers")
    elif best := write_best(run):
        log.info(f"saved the best recipe to {best}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
