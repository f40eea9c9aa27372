"""List the test pictures that the training set has as well, or nearly so: row numbers, no pictures.

About 900 of CIFAR-100's 10,000 test pictures have a near-duplicate in train (Barz and Denzler 2020,
arXiv 1902.00423). This search finds the plain cases, so it gives a lower bound.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cifar_dist.data.dataset import data_digest, load_split
from cifar_dist.data.ingest.near_duplicates import MIN_DETAIL, MIN_LAYOUT, find_near_duplicates
from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import run_command
from cifar_dist.utils.files import atomic_write, check_writable
from cifar_dist.utils.log import log, log_to_terminal


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "near_duplicates",
        "List the test pictures with a near-duplicate in train, as row numbers. The list of the "
        "official CIFAR-100 comes with cifar_dist; evaluate uses it.",
        "python -m cifar_dist.near_duplicates --data data/cifar100 --output duplicates.json",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data/cifar100"), help="default: data/cifar100"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a JSON file")
    options = parser.parse_args(arguments)

    log_to_terminal()
    check_writable(options.output)
    train, test = (load_split(options.data, name).images for name in ("train", "test"))
    pairs = find_near_duplicates(train, test, show=True)
    found = {
        "data": data_digest(options.data),
        "min_detail": MIN_DETAIL,
        "min_layout": MIN_LAYOUT,
        "test_rows": [test_row for test_row, _ in pairs],
        "train_rows": [train_row for _, train_row in pairs],
    }
    atomic_write(options.output, json.dumps(found) + "\n")
    log.info(f"{options.output}: {len(pairs)} of {len(test):,} test pictures are in train, nearly")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
