"""List the test images that have a near-duplicate in the training set, as row numbers.

About 900 of CIFAR-100's 10,000 test images have one (Barz and Denzler 2020, arXiv 1902.00423). This
search finds only the clear cases, so the list is a lower bound.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "near_duplicates",
        "List the test images that have a near-duplicate in the training set, as row numbers. The list "
        "for the official CIFAR-100 is included in cifar_dist; `evaluate` uses it.",
        "python -m cifar_dist.near_duplicates --data data/cifar100 --output duplicates.json",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        default=Path("data/cifar100"),
        help="prepared data (default: data/cifar100)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="JSON file to write"
    )
    options = parser.parse_args(arguments)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.data.dataset import data_digest, load_split
    from cifar_dist.data.ingest.near_duplicates import MIN_DETAIL, MIN_LAYOUT, find_near_duplicates
    from cifar_dist.utils.files import atomic_write, check_writable
    from cifar_dist.utils.log import log, log_to_terminal

    log_to_terminal()
    check_writable(options.output)
    train, test = (load_split(options.data, name).images for name in ("train", "test"))
    pairs = find_near_duplicates(train, test, show_progress=True)
    content = {
        "data": data_digest(options.data),
        "min_detail": MIN_DETAIL,
        "min_layout": MIN_LAYOUT,
        "test_rows": [test_row for test_row, _ in pairs],
        "train_rows": [train_row for _, train_row in pairs],
    }
    atomic_write(options.output, json.dumps(content) + "\n")
    log.info(
        f"saved {options.output}: {len(pairs)} of {len(test):,} test images have a near-duplicate "
        "in train"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
