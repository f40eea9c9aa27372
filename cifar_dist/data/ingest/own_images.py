"""Read image files in class folders, a saved Hugging Face dataset, or Parquet files.

Nothing that is read can execute code: images are decoded by Pillow, tables are read by pyarrow.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cifar_dist.data.image_files import SUFFIXES, files_in, read_image
from cifar_dist.data.ingest.pickles import RawMeta, RawSplit
from cifar_dist.utils.errors import UserError, first_line
from cifar_dist.utils.log import log, progress_bar

TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")  # in the order of preference
CHUNK = 256  # images whose encoded bytes are in memory at a time
SHOWN = 5  # unreadable images that an error names
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image that has not been decoded yet."""

    name: str
    label: str | int
    content: Path | bytes


@dataclass(frozen=True, kw_only=True)
class Source:
    """The samples of one split."""

    count: int
    samples: Callable[[], Iterator[Sample]]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How to read images."""

    size: int  # in pixels
    test_fraction: float  # part of each class for the test split, if there is no test split
    skip_unreadable: bool
    image_column: str | None  # of tables; None: the only one that can contain images
    label_column: str | None  # of tables; None: the only one with class names, or `label`


def read_own_images(path: Path, options: ImageOptions) -> tuple[RawSplit, RawSplit, RawMeta]:
    """Return train split, test split and class names; UserError if `path` has no usable images.

    Classes are ordered by name, those of a dataset as in its ClassLabel. Without a test split, the
    images of each class with the lowest hashes of their names are the test split, so that adding images
    hardly moves others from one split to the other.
    """
    try:
        sources, names = (
            find_folders(path) if _has_class_folders(path) else find_tables(path, options)
        )
        splits = {split: decode(source, options, split) for split, source in sources.items()}
    except UserError:
        raise
    except (
        pa.ArrowException,
        OSError,
        AttributeError,
        MemoryError,  # for a number of rows, or a depth, that a file only claims
        RecursionError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}); a dataset can be saved again with "
            "`save_to_disk` or `to_parquet` of `datasets`"
        ) from error
    labels = [label for _, of_split, _ in splits.values() for label in of_split]
    names = names or [str(label) for label in sorted(set(labels))]
    number = {label: index for index, label in enumerate(names)}
    raw = [
        RawSplit(
            images=images,
            fine_labels=np.array([number[str(label)] for label in of_split], dtype=np.int64),
            coarse_labels=np.empty(0, np.int64),
            filenames=filenames,
        )
        for images, of_split, filenames in splits.values()
    ]
    train, test = raw if len(raw) == 2 else split_train_test(raw[0], names, options.test_fraction)
    check_classes(train, test, names)
    if copies := count_copies(train, test):
        log.warning(f"{copies:,} test images are exact copies of training images; remove them")
    return train, test, RawMeta(fine_label_names=names, coarse_label_names=[])


# ----------------------------------------------------------------------------- folders


def _has_class_folders(path: Path) -> bool:
    return path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in _visible(path))


def _visible(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, without hidden ones and those of archivers.

    OSError if a folder cannot be read. Pipes and devices are left out: reading them could wait forever.
    """
    for file in files_in(folder, skip_unreadable=False):
        parts = file.relative_to(folder).parts
        if not any(part.startswith(".") or part == "__MACOSX" for part in parts) and file.is_file():
            yield file


def find_folders(path: Path) -> tuple[dict[str, Source], list[str] | None]:
    """Return the samples of PATH/train/CLASS/* and PATH/test/CLASS/*, or of PATH/CLASS/*."""
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir()]
    trains = [entry for entry in folders if entry.name.lower() in TRAIN]
    if len(trains) > 1:
        raise UserError(f"{path} has both {trains[0].name} and {trains[1].name}; keep one of them")
    train = trains[0] if trains else None
    tests = [entry for name in TEST for entry in folders if entry.name.lower() == name]
    if train is None and tests:
        raise UserError(f"{path} has {tests[0].name}, but no folder train; rename the folder of it")
    used = [train, *tests[:1]]
    for unused in folders if train else ():
        if unused not in used and not unused.name.startswith((".", "__MACOSX")):
            names = " and ".join(entry.name for entry in used if entry)
            log.warning(f"{unused} is not used, since {path} has {names}")
    splits = {"train": train or path} | ({"test": tests[0]} if tests else {})
    return {name: _folder_source(folder) for name, folder in splits.items()}, None


def _folder_source(folder: Path) -> Source:
    samples, others = [], Counter[str]()
    for file in sorted(_visible(folder)):
        relative = file.relative_to(folder)
        if file.suffix.lower() not in SUFFIXES:
            others[file.suffix or file.name] += 1
            continue
        if len(relative.parts) == 1:
            raise UserError(f"{file} is in no class folder; move it to {folder}/CLASS/{file.name}")
        try:
            str(relative).encode()
        except UnicodeEncodeError:
            raise UserError(f"{os.fsencode(file)!r}: the name is not UTF-8; rename it") from None
        samples.append(Sample(name=relative.as_posix(), label=relative.parts[0], content=file))
    for empty in {entry.name for entry in folder.iterdir() if entry.is_dir()} - {
        str(sample.label) for sample in samples
    }:
        if not empty.startswith((".", "__MACOSX")):
            log.warning(f"{folder / empty} has no images, so it is no class")
    if others:
        kinds = ", ".join(f"{count:,} x {kind}" for kind, count in others.most_common(SHOWN))
        log.warning(f"{folder}: files that are no images are ignored: {kinds}")
    return Source(count=len(samples), samples=lambda: iter(samples))


# ----------------------------------------------------------------------------- tables


def find_tables(path: Path, options: ImageOptions) -> tuple[dict[str, Source], list[str] | None]:
    """Return the samples of a dataset of `datasets` on disk or of Parquet files, and its class names."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        tables = _saved_dataset(path)
    else:
        tables = _parquet_files(path)
    splits = _choose_splits(path, tables)
    image, label = _choose_columns(path, splits["train"].features, options)
    kinds = [table.features.get(label) for table in splits.values()]
    if kinds[0] != kinds[-1]:
        raise UserError(
            f"{path}: the column {label} has other classes in the test split; make them equal"
        )
    names = getattr(kinds[0], "names", None)
    sources = {
        split: Source(count=table.count, samples=_row_samples(split, table, image, label, names))
        for split, table in splits.items()
    }
    return sources, list(names) if names else None


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Rows with the features of `datasets`, as Arrow batches."""

    count: int
    features: Mapping[str, Any]
    batches: Callable[[Sequence[str]], Iterator[Any]]


def _saved_dataset(path: Path) -> dict[str, _Table]:
    import datasets

    if (path / "digest.json").exists():
        raise UserError(f"{path} was written by prepare already; use it with data.path={path}")
    saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, dict) else {"train": saved}

    def batches(dataset: Any) -> Callable[[Sequence[str]], Iterator[Any]]:
        return lambda columns: (
            dataset.select_columns(list(columns)).with_format("arrow").iter(CHUNK)
        )

    return {
        str(name): _Table(count=len(one), features=one.features, batches=batches(one))
        for name, one in splits.items()
    }


def _parquet_files(path: Path) -> dict[str, _Table]:
    import datasets
    from pyarrow import parquet

    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise UserError(
            f"{path} has neither class folders with images, nor a dataset of `datasets`, nor Parquet "
            "files; give a folder like PATH/train/CLASS/image.png"
        )
    groups: dict[str, list[Path]] = {}
    for file in files:  # train-00000-of-00001.parquet, or train/0000.parquet
        inside = file.relative_to(path).parent.name.lower()  # "." for the file of a single one
        words = (re.split(r"[-_.]", file.name)[0].lower(), inside) if file != path else ()
        split = next((word for word in words if word in (*TRAIN, *TEST)), "")
        groups.setdefault(split, []).append(file)
    if "" in groups and len(groups) > 1:
        raise UserError(
            f"{groups[''][0]}: the name does not tell the split, like train-0.parquet or test-0.parquet; "
            "rename or remove it"
        )
    if "" in groups:
        groups = {"train": groups[""]}
    features = {
        file: datasets.Features.from_arrow_schema(parquet.read_schema(file)) for file in files
    }
    for file in files:
        if features[file] != features[files[0]]:
            raise UserError(f"{file} has other columns or classes than {files[0]}; make them equal")

    def batches(files: list[Path]) -> Callable[[Sequence[str]], Iterator[Any]]:
        def read(columns: Sequence[str]) -> Iterator[Any]:
            for file in files:
                reader = parquet.ParquetFile(file)
                yield from reader.iter_batches(batch_size=CHUNK, columns=list(columns))

        return read

    return {
        split: _Table(
            count=sum(parquet.ParquetFile(file).metadata.num_rows for file in group),
            features=features[group[0]],
            batches=batches(group),
        )
        for split, group in groups.items()
    }


def _choose_splits(path: Path, tables: Mapping[str, _Table]) -> dict[str, _Table]:
    train = next((name for name in TRAIN if name in tables), None)
    tests = [name for name in TEST if name in tables]
    if train is None:
        found = ", ".join(tables)
        raise UserError(f"{path} has no split named train (it has: {found}); rename one")
    for unused in (name for name in tables if name not in (train, *tests[:1])):
        log.warning(f"{path}: the split {unused} is not used")
    return {"train": tables[train]} | ({"test": tables[tests[0]]} if tests else {})


def _choose_columns(
    path: Path, features: Mapping[str, Any], options: ImageOptions
) -> tuple[str, str]:
    import datasets

    def is_image(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or str(feature) in (
            "Value('binary')",
            "Value('large_binary')",
        )

    images = [name for name, feature in features.items() if is_image(feature)]
    labels = [name for name, one in features.items() if isinstance(one, datasets.ClassLabel)]
    if len(labels) != 1:
        labels = [name for name in LABEL_COLUMNS if name in features] or labels
    found = []
    for kind, given, candidates in (
        ("image", options.image_column, images),
        ("label", options.label_column, labels),
    ):
        name = given or (candidates[0] if len(candidates) == 1 else "")
        if name not in features or (kind == "image" and name not in images):
            problem = f"has no {kind} column {given}" if given else f"has no single {kind} column"
            raise UserError(
                f"{path} {problem}; choose one of {', '.join(features)} with --{kind}-column"
            )
        found.append(name)
    return found[0], found[1]


def _row_samples(
    split: str, table: _Table, image: str, label: str, names: Sequence[str] | None
) -> Callable[[], Iterator[Sample]]:
    def samples() -> Iterator[Sample]:
        row = 0
        for batch in table.batches((image, label)):
            cells, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
            for cell, value in zip(cells, labels, strict=True):
                content = cell.get("bytes") if isinstance(cell, dict) else cell
                where = f"row {row} of {split}"
                if not isinstance(content, bytes):
                    raise UserError(
                        f"{where} has no bytes in its column {image}; store the images in the dataset, "
                        "not their paths"
                    )
                if names is not None:
                    if type(value) is not int or not 0 <= value < len(names):
                        raise UserError(
                            f"{where} has the label {value}; remove rows without a class"
                        )
                    value = names[value]
                if not isinstance(value, str | int):
                    raise UserError(
                        f"{where} has the label {value}, not a text or a number; remove it"
                    )
                yield Sample(name=f"{split}/{row}", label=value, content=content)
                row += 1

    return samples


# ----------------------------------------------------------------------------- both


def decode(
    source: Source, options: ImageOptions, split: str
) -> tuple[np.ndarray, list[Any], list[str]]:
    """Return images uint8 [N, 3 * S * S], labels and names; UserError if an image cannot be read."""
    size = options.size
    images = np.empty((source.count, 3 * size * size), np.uint8)
    labels: list[Any] = []
    names: list[str] = []
    unreadable: list[str] = []

    def read(sample: Sample) -> np.ndarray | UserError:
        try:
            name = None if isinstance(sample.content, Path) else sample.name
            return read_image(sample.content, size, name=name).reshape(-1)
        except UserError as error:
            return error

    samples = source.samples()
    with (
        ThreadPoolExecutor(os.cpu_count(), "decode") as pool,
        progress_bar(0, source.count, enabled=True, unit="image") as bar,
    ):
        while chunk := list(islice(samples, CHUNK)):
            for sample, result in zip(chunk, pool.map(read, chunk), strict=True):
                if isinstance(result, UserError):
                    unreadable.append(str(result).removesuffix("; give another"))
                    continue
                images[len(labels)] = result
                labels.append(sample.label)
                names.append(sample.name)
            bar.update(len(chunk))
    if unreadable:
        shown = "; ".join(unreadable[:SHOWN])
        problem = (
            f"{len(unreadable):,} of {source.count:,} images of {split} are unreadable: {shown}"
        )
        if not options.skip_unreadable:
            raise UserError(f"{problem}; remove them, or leave them out with --skip-unreadable")
        log.warning(f"left out: {problem}")
    return images[: len(labels)], labels, names


def split_train_test(
    raw: RawSplit, names: Sequence[str], test_fraction: float
) -> tuple[RawSplit, RawSplit]:
    """Split the rows of each class by a hash of their file names; at least one goes to each part."""
    keys = [hashlib.sha256(name.encode()).digest() for name in raw.filenames]
    in_test = np.zeros(len(keys), bool)
    for label, name in enumerate(names):
        rows = sorted(np.flatnonzero(raw.fine_labels == label), key=lambda row: keys[row])
        if len(rows) < 2:
            raise UserError(
                f"class {name} has {len(rows)} image(s); the training and the test split need at least "
                "one each"
            )
        count = min(max(1, round(test_fraction * len(rows))), len(rows) - 1)
        in_test[rows[:count]] = True

    def part(rows: np.ndarray) -> RawSplit:
        return RawSplit(
            images=raw.images[rows],
            fine_labels=raw.fine_labels[rows],
            coarse_labels=raw.coarse_labels,
            filenames=[raw.filenames[row] for row in np.flatnonzero(rows).tolist()],
        )

    return part(~in_test), part(in_test)


def check_classes(train: RawSplit, test: RawSplit, names: Sequence[str]) -> None:
    """Raise UserError unless there are two classes, each with images in both splits."""
    if len(names) < 2:
        raise UserError(f"found {len(names)} class(es); a classifier needs at least two")
    split: Literal["training", "test"]
    for split, raw in (("training", train), ("test", test)):
        counts = np.bincount(raw.fine_labels, minlength=len(names))
        if (counts == 0).any():
            missing = [names[label] for label in np.flatnonzero(counts == 0).tolist()]
            raise UserError(
                f"the {split} split has no images of {', '.join(missing[:SHOWN])}; add some, or remove the "
                f"class{'es' if missing[1:] else ''} from the other split"
            )


def count_copies(train: RawSplit, test: RawSplit) -> int:
    """Return how many test images have the pixels of a training image."""
    known = {hashlib.sha256(image.data).digest() for image in train.images}
    return sum(hashlib.sha256(image.data).digest() in known for image in test.images)
