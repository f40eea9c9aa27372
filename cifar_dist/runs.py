"""List runs in the terminal: state, progress, accuracy, time left."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "runs",
        "List runs, the last updated first: state (training, stopped, finished or damaged), progress, "
        "accuracy of the last evaluation, time left. Only reads.",
        "python -m cifar_dist.runs",
        "python -m cifar_dist.runs runs/r18_32* --json",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        default=[Path("runs")],
        metavar="RUN",
        help="run folders, or folders that contain some (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list with all digits")
    options = parser.parse_intermixed_args(arguments)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.run_folder.find import find_runs
    from cifar_dist.training.status import format_table, read_statuses

    # Warnings go to stderr, because log_to_terminal() is not called: stdout may be parsed.
    statuses = read_statuses(find_runs(options.runs))
    if options.json:
        print(json.dumps([asdict(status) for status in statuses], indent=2))
    else:
        print(format_table(statuses))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
