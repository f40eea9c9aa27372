"""Show runs on one HTML page: results, paired tests, curves, confusions."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "report",
        "Show runs on one self-contained HTML page: results, mean and standard deviation over seeds, "
        "paired tests, curves, confusions with images, calibration, commands to repeat them.",
        "python -m cifar_dist.report runs/*",
        "python -m cifar_dist.report runs/r18_32_s0 runs/r18_32_s1 runs/r18_32_kd --latex table.tex",
        "python -m cifar_dist.report runs --watch",
        "python -m cifar_dist.report runs/* --tutorial --output tutorial.html",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, or folders that contain some",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: report.html",
    )
    parser.add_argument(
        "--latex", type=Path, metavar="FILE", help="write the comparison as a LaTeX table"
    )
    parser.add_argument(
        "--tutorial",
        action="store_true",
        help="compare runs of the tutorial's recipes on CIFAR-100 with the published results",
    )
    parser.add_argument("--title", help="title of the page; default: the recipe's name")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of the runs' data, if it has moved"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="rewrite the page while the runs train, until all have finished or Ctrl-C",
    )
    options = parser.parse_intermixed_args(arguments)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.inference.stored_run import read_runs
    from cifar_dist.reporting.comparison import group_runs, latex_table
    from cifar_dist.reporting.page import render_page
    from cifar_dist.reporting.watch import watch
    from cifar_dist.run_folder.find import find_runs
    from cifar_dist.utils.files import atomic_write, check_writable
    from cifar_dist.utils.log import log, log_to_terminal

    log_to_terminal()
    for output in filter(None, (options.output, options.latex)):
        check_writable(output)
    render = partial(render_page, title=options.title, data=options.data, tutorial=options.tutorial)
    if options.watch:
        log.info(f"rewriting {options.output} while runs train; Ctrl-C writes the whole page")
        runs = watch(partial(find_runs, options.runs), render, options.output)
    else:
        runs = read_runs(find_runs(options.runs))
    atomic_write(options.output, render(runs))
    size = options.output.stat().st_size
    log.info(
        f"saved {options.output}: {len(runs)} run(s), {size / 1e3:,.0f} kB; open it in a browser"
    )
    if options.latex is not None:
        if unfinished := ", ".join(str(run.folder) for run in runs if not run.is_finished):
            log.warning(f"not finished, and therefore not in the LaTeX table: {unfinished}")
        atomic_write(options.latex, latex_table(group_runs(runs)))
        log.info(f"saved the LaTeX table to {options.latex}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
