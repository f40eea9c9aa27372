"""Prepare CIFAR-100, CIFAR-10 or synthetic data for training."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import run_command


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "prepare",
        "Convert CIFAR-100 or CIFAR-10 to the Hugging Face dataset (Arrow) that training reads.",
        "python -m cifar_dist.prepare                      # downloads 169 MB, writes data/cifar100",
        "python -m cifar_dist.prepare --dataset cifar10    # downloads 170 MB, writes data/cifar10",
        "python -m cifar_dist.prepare --source cifar-100-python.tar.gz",
        "python -m cifar_dist.prepare --sample             # 7,000 synthetic images, writes data/sample",
        "python -m cifar_dist.prepare --source my_folder --allow-unofficial --output data/mine",
    )
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--source",
        help=".tar.gz, .tar.xz or .tar file, folder with the files of the archive, or URL",
    )
    origin.add_argument(
        "--sample",
        action="store_true",
        help="generate synthetic images: 100 classes of colored shapes",
    )
    parser.add_argument(
        "--dataset",
        choices=("cifar100", "cifar10"),
        help="data set to download, or to expect in --source (default: cifar100)",
    )
    parser.add_argument(
        "--output", type=Path, help="default: data/cifar100, data/cifar10 or data/sample"
    )
    parser.add_argument(
        "--allow-unofficial",
        action="store_true",
        help="accept other data in the layout of the data set",
    )
    parser.add_argument("--force", action="store_true", help="replace existing data")
    options = parser.parse_args(arguments)
    if options.sample and options.dataset:
        parser.error("argument --dataset: not allowed with argument --sample")
    dataset = options.dataset or "cifar100"

    # Imported after parsing, so that --help and mistakes answer at once.
    from cifar_dist.data.ingest.archive import DATASETS
    from cifar_dist.data.ingest.preparation import SYNTHETIC, prepare

    prepare(
        SYNTHETIC if options.sample else options.source,
        options.output or Path("data", "sample" if options.sample else dataset),
        dataset=DATASETS[dataset],
        allow_unofficial=options.allow_unofficial,
        force=options.force,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
