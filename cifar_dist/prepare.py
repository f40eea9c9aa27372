"""Prepare CIFAR-100 or synthetic data for training."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "prepare",
        "Convert CIFAR-100 to the Hugging Face dataset (Arrow) that training reads.",
        "python -m cifar_dist.prepare                      # downloads 169 MB, writes data/cifar100",
        "python -m cifar_dist.prepare --source cifar-100-python.tar.gz",
        "python -m cifar_dist.prepare --sample             # 7,000 synthetic images, writes data/sample",
        "python -m cifar_dist.prepare --source my_folder --allow-unofficial --output data/mine",
    )
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--source", help=".tar.gz, .tar.xz or .tar file, folder with train, test and meta, or URL"
    )
    origin.add_argument(
        "--sample",
        action="store_true",
        help="generate synthetic images: 100 classes of colored shapes",
    )
    parser.add_argument("--output", type=Path, help="default: data/cifar100, or data/sample")
    parser.add_argument(
        "--allow-unofficial",
        action="store_true",
        help="accept data other than CIFAR-100 in the same layout",
    )
    parser.add_argument("--force", action="store_true", help="replace existing data")
    options = parser.parse_args(arguments)

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.data.ingest.preparation import SYNTHETIC, prepare

    prepare(
        SYNTHETIC if options.sample else options.source,
        options.output or Path("data", "sample" if options.sample else "cifar100"),
        allow_unofficial=options.allow_unofficial,
        force=options.force,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
