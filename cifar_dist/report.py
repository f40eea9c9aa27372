"""Put runs side by side on one HTML page: curves, means over seeds, paired tests, where they are wrong."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.reporting.comparison import group_runs, latex_table, read_run
from cifar_dist.reporting.page import page
from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import atomic_write, check_writable
from cifar_dist.utils.log import log, log_to_terminal


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "report",
        "Put runs side by side on one HTML page that needs no network: curves, mean and deviation "
        "over seeds, paired tests, confusions, confident mistakes, augmented pictures, device hours.",
        "python -m cifar_dist.report runs/*",
        "python -m cifar_dist.report runs/r18_32_s0 runs/r18_32_s1 runs/r18_32_kd --latex table.tex",
        "python -m cifar_dist.report runs/* --tutorial --output tutorial.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: report.html",
    )
    parser.add_argument(
        "--latex", type=Path, metavar="FILE", help="the comparison as a LaTeX table"
    )
    parser.add_argument(
        "--tutorial", action="store_true", help="put the tutorial's published numbers beside ours"
    )
    parser.add_argument("--title", default="cifar_dist: runs compared", help="of the page")
    parser.add_argument("--data", type=Path, help="another place of the runs' data")
    options = parser.parse_intermixed_args(arguments)

    log_to_terminal()
    folders = []
    for path in dict.fromkeys(options.runs):  # of runs/*, where other things may lie as well
        if path.is_dir() and not (path / "recipe.yaml").exists():
            log.warning(f"passed over: {path} is no run folder (no recipe.yaml in it)")
        elif not path.is_file():
            folders.append(path)
    if not folders:
        raise UserError("none of these is a run folder; give some, like runs/debug")
    for place in filter(None, (options.output, options.latex)):
        check_writable(place)
    runs = [read_run(folder) for folder in folders]
    atomic_write(
        options.output,
        page(runs, title=options.title, data=options.data, tutorial=options.tutorial),
    )
    size = options.output.stat().st_size
    log.info(f"{options.output}: {len(runs)} run(s), {size / 1e3:,.0f} kB; open it in a browser")
    if options.latex is not None:
        atomic_write(options.latex, latex_table(group_runs(runs)))
        log.info(f"{options.latex}: the comparison as LaTeX")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
