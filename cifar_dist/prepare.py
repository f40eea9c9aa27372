"""Floor 5. `python -m cifar_dist.prepare`: CIFAR-100, or the drawn sample, to what training reads."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.data.ingest.preparation import SYNTHETIC, prepare
from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "prepare",
        "Write CIFAR-100 as the Hugging Face data set (Arrow) that training reads.",
        "python -m cifar_dist.prepare                      # downloads 169 MB, writes data/cifar100",
        "python -m cifar_dist.prepare --source cifar-100-python.tar.gz",
        "python -m cifar_dist.prepare --sample             # draws 7,000 pictures, writes data/sample",
        "python -m cifar_dist.prepare --source my_folder --allow-unofficial --output data/mine",
    )
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--source", help="a .tar.gz, .tar.xz or .tar, a folder with train, test and meta, or a URL"
    )
    origin.add_argument("--sample", action="store_true", help="draw 100 classes of coloured shapes")
    parser.add_argument("--output", type=Path, help="default: data/cifar100, or data/sample")
    parser.add_argument(
        "--allow-unofficial",
        action="store_true",
        help="take other pictures in the same layout as well",
    )
    parser.add_argument("--force", action="store_true", help="write it anew even if it is there")
    options = parser.parse_args(arguments)
    prepare(
        SYNTHETIC if options.sample else options.source,
        options.output or Path("data", "sample" if options.sample else "cifar100"),
        allow_unofficial=options.allow_unofficial,
        force=options.force,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
