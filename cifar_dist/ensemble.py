"""Combine runs by the weighted mean of their stored logits, or by the mean of their weights."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.utils.cli import check_output, command_parser
from cifar_dist.utils.errors import UserError, run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "ensemble",
        "Combine runs by the weighted mean of their logits. Weights are chosen on the validation rows "
        "(data.val_size, after evaluate); without them they are equal. Writes ensemble.json, "
        "predictions.safetensors and teachers.yaml, a section for a student's recipe. --soup averages the "
        "weights of the models instead, which gives one model: a folder like that of `export --to teacher`.",
        "python -m cifar_dist.ensemble runs/r18_32_s0 runs/r18_32_s1 runs/wrn28_10_32",
        "python -m cifar_dist.ensemble runs/r18_32_s* --uniform --output ensembles/seeds",
        "python -m cifar_dist.ensemble runs/fork_* --soup --output ensembles/soup",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="two or more finished runs"
    )
    parser.add_argument(
        "--uniform", action="store_true", help="use equal weights; with --soup: average all runs"
    )
    parser.add_argument(
        "--soup",
        action="store_true",
        help="average the weights of runs that share their start, like forks of one run; each but the "
        "best is added only if the validation top-1 does not fall",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="with --soup: folder of the runs' data, if it has moved",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("ensemble"), metavar="FOLDER", help="default: ensemble"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier ensemble")
    options = parser.parse_intermixed_args(arguments)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.exporting.formats import SOUP_FILES, export_soup
    from cifar_dist.inference.ensembling import (
        ENSEMBLE_FILES,
        combine,
        log_ensemble,
        write_ensemble,
    )
    from cifar_dist.inference.soup import make_soup
    from cifar_dist.inference.stored_run import read_runs
    from cifar_dist.utils.log import log, log_to_terminal

    log_to_terminal()
    if options.data and not options.soup:
        raise UserError("--data is for --soup; remove it")
    runs = read_runs(options.runs)
    if len(runs) < 2:
        raise UserError("give two or more different runs, like runs/a runs/b")
    check_output(
        options.output, SOUP_FILES if options.soup else ENSEMBLE_FILES, force=options.force
    )
    if options.soup:
        trained, test, report = make_soup(runs, uniform=options.uniform, data=options.data)
        log_ensemble(report)
        check = export_soup(trained, test, report, options.output)
        log.info(f"saved to {options.output}, a folder for teacher.run; {check}")
        return 0
    report, logits, labels = combine(runs, uniform=options.uniform)
    log_ensemble(report)
    write_ensemble(options.output, report, logits, labels)
    log.info(f"saved to {options.output}; teachers.yaml is a section for a student's recipe")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
