"""Prepare CIFAR-100, CIFAR-10, synthetic data or own images for training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cifar_dist.utils.cli import command_parser
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.suggest import closest

PUBLISHED = ("cifar100", "cifar10")
IMAGE_OPTIONS = ("size", "test_fraction", "skip_unreadable", "image_column", "label_column")


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "prepare",
        "Convert CIFAR-100, CIFAR-10 or your own images to the Hugging Face dataset (Arrow) that "
        "training reads.",
        "python -m cifar_dist.prepare                      # downloads 169 MB, writes data/cifar100",
        "python -m cifar_dist.prepare --dataset cifar10    # downloads 170 MB, writes data/cifar10",
        "python -m cifar_dist.prepare --source cifar-100-python.tar.gz",
        "python -m cifar_dist.prepare --sample             # 7,000 synthetic images, writes data/sample",
        "python -m cifar_dist.prepare --images flowers     # flowers/CLASS/*.jpg, writes data/flowers",
        "python -m cifar_dist.prepare --dataset saved/flowers --size 64 --output data/flowers_64",
    )
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--source",
        help="CIFAR: .tar.gz, .tar.xz or .tar file, folder with the files of the archive, or URL",
    )
    origin.add_argument(
        "--sample",
        action="store_true",
        help="generate synthetic images: 100 classes of colored shapes",
    )
    origin.add_argument(
        "--images",
        metavar="FOLDER",
        help="folder with one subfolder of images per class, or with train/CLASS and test/CLASS",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME_OR_PATH",
        help="cifar100 (default) or cifar10: data set to download, or to expect in --source; or a "
        "dataset that `datasets` saved to disk, a Parquet file, or a folder of Parquet files",
    )
    parser.add_argument("--output", type=Path, help="default: data/NAME")
    parser.add_argument(
        "--allow-unofficial",
        action="store_true",
        help="accept other data in the layout of CIFAR",
    )
    parser.add_argument("--force", action="store_true", help="replace existing data")
    own = parser.add_argument_group("own images")
    own.add_argument("--size", type=int, help="side of the stored images, 8 to 96 px (default: 32)")
    own.add_argument(
        "--test-fraction",
        type=float,
        metavar="FRACTION",
        help="part of each class for the test split, if there is no test split (default: 0.2)",
    )
    own.add_argument(
        "--skip-unreadable", action="store_true", help="leave out damaged images, with a warning"
    )
    own.add_argument("--image-column", metavar="NAME", help="column with the images")
    own.add_argument("--label-column", metavar="NAME", help="column with the classes")
    options = parser.parse_args(arguments)
    path = own_images(parser, options)
    if path is not None:
        prepare_own_images(path, options)
        return 0
    if given := [name for name in IMAGE_OPTIONS if vars(options)[name] not in (None, False)]:
        parser.error(
            f"argument --{given[0].replace('_', '-')}: only with --images FOLDER or --dataset PATH"
        )
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


def own_images(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path | None:
    """Return the path of own images, or None for published or synthetic data."""
    path = None
    if "" in (options.images, options.dataset):
        parser.error("the path is empty")
    if options.images:
        path = Path(options.images)
    elif options.dataset and options.dataset not in PUBLISHED:
        path = Path(options.dataset)
    for name in ("dataset", "sample", "source", "allow_unofficial"):
        if name == "dataset" and not (options.sample or options.images):
            continue
        if getattr(options, name) and (path or name == "dataset"):
            other = "--sample" if options.sample else "--images" if options.images else "--dataset"
            parser.error(f"argument --{name.replace('_', '-')}: not allowed with argument {other}")
    if path is not None and not path.exists():
        near = closest(str(path), PUBLISHED) if not options.images else None
        hint = f"did you mean {near}?" if near else "give an existing path"
        raise UserError(f"{path} does not exist; {hint}")
    return path


def prepare_own_images(path: Path, options: argparse.Namespace) -> None:
    size = 32 if options.size is None else options.size
    test_fraction = 0.2 if options.test_fraction is None else options.test_fraction
    if not 8 <= size <= 96:
        raise UserError(f"--size {size}: must be 8 to 96 pixels")
    if not 0 < test_fraction < 1:
        raise UserError(f"--test-fraction {test_fraction}: must be between 0 and 1")

    from cifar_dist.data.ingest.own_images import ImageOptions
    from cifar_dist.data.ingest.preparation import prepare_images
    from cifar_dist.utils.log import log_to_terminal

    log_to_terminal()
    name = path.expanduser().resolve().name.removesuffix(".parquet")
    prepare_images(
        path.expanduser(),
        options.output or Path("data", name),
        ImageOptions(
            size=size,
            test_fraction=test_fraction,
            skip_unreadable=options.skip_unreadable,
            image_column=options.image_column,
            label_column=options.label_column,
        ),
        force=options.force,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
