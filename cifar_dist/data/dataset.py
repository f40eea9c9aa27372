"""Write and read the Arrow dataset on disk.

`datasets.load_from_disk(root)` can open it. Training reads the same files with pyarrow alone, as
memory-mapped views without a copy, and verifies their content against `digest.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cifar_dist.data.ingest.pickles import RawMeta, RawSplit
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_folder, atomic_write, read_json, write_json

SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")
Place = Literal["device", "host"]  # where the images are stored
Labels = Literal["fine", "coarse"]  # the classes, or the superclasses
# Of digest.json: CIFAR-100, CIFAR-10, synthetic data, or any other data.
Content = Literal["official", "cifar10", "sample", "other"]
OFFICIAL_DIGEST = "b07d8a0b9728eb970a33da019a42d584d4a541ff6b4e09c43f41b5e4b58321b6"  # of CIFAR-100
MIN_SIZE, MAX_SIZE = 8, 96  # of square images, in pixels
TABLE, INFO, DIGEST = "data-00000-of-00001.arrow", "dataset_info.json", "digest.json"
DATASET = "dataset_dict.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One split on the device of its labels; with `on_host` the images stay on the CPU.

    Images on the CPU are memory-mapped pages of the file: never write to them.
    """

    images: Tensor  # uint8 [N, 3, S, S]
    labels: Tensor  # int64 [N]
    on_host: bool = False  # do not copy or transform all images at once
    coarse_labels: Tensor | None = None  # int64 [N], on the CPU: superclasses of the labels, if any

    @property
    def image_size(self) -> int:
        """Return S, in pixels."""
        return self.images.shape[-1]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the images of `rows` (int64 [B]) on the device, uint8 [B, 3, S, S].

        Synchronizes with the device if `on_host`.
        """
        images = self.images.index_select(0, rows.to(self.images.device))
        return images.to(self.labels.device)


def write_dataset(
    root: Path,
    train: RawSplit,
    test: RawSplit,
    meta: RawMeta,
    *,
    content: Content,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a DatasetDict of train and test to `root` atomically, with `extra_files` added to it."""
    import datasets  # takes two seconds to import, and training machines need not have it

    length = train.images.shape[1]
    columns: dict[str, Any] = {
        "image": datasets.List(datasets.Value("uint8"), length=length),
        "fine_label": datasets.ClassLabel(names=meta.fine_label_names),
        "coarse_label": datasets.ClassLabel(names=meta.coarse_label_names),
        "filename": datasets.Value("string"),
    }
    if not meta.coarse_label_names:
        del columns["coarse_label"]
    features = datasets.Features(columns)
    with atomic_folder(root) as folder:
        write_json(folder / DATASET, {"splits": SPLITS})
        digest: dict[str, Any] = {"content": content}
        for name, raw in zip(SPLITS, (train, test), strict=True):
            images = pa.FixedSizeListArray.from_arrays(pa.array(raw.images.reshape(-1)), length)
            arrays = [images, raw.fine_labels, raw.coarse_labels, raw.filenames]
            if not meta.coarse_label_names:
                del arrays[2]
            table = pa.table(arrays, schema=features.arrow_schema)
            # save_to_disk would split the table into 50 chunks, so it only writes an empty one.
            sha256 = content_digest(raw, meta)
            empty = datasets.Dataset(
                table.slice(0, 0),
                info=datasets.DatasetInfo(features=features),
                split=datasets.Split(name),
                fingerprint=sha256[:16],  # `datasets` keys its caches by this
            )
            _save_quietly(empty, folder / name)
            with pa.ipc.new_stream(folder / name / TABLE, table.schema) as writer:
                writer.write_table(table, max_chunksize=len(raw.images))
            digest[name] = {"rows": len(raw.images), "sha256": sha256}
        for path, data in (extra_files or {}).items():
            atomic_write(folder / path, data)
        write_json(folder / DIGEST, digest)


def content_digest(raw: RawSplit, meta: RawMeta) -> str:
    """Return the SHA-256 of pixels, labels, filenames and class names, whatever their encoding."""
    names = [meta.fine_label_names, meta.coarse_label_names, raw.filenames]
    digest = hashlib.sha256(json.dumps(names).encode())
    for array in (raw.fine_labels, raw.coarse_labels, raw.images):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def read_digest(root: Path) -> dict[str, Any]:
    """Return `digest.json`: {"content": ..., "train": {"rows": ..., "sha256": ...}, "test": {...}}."""
    if not (root / DIGEST).exists() and not (root / DATASET).exists():
        raise no_data_error(root)
    if not (root / DIGEST).exists():
        raise UserError(
            f"{root / DIGEST}: is missing, so this dataset was not written by cifar_dist; prepare the "
            "data in another folder with `python -m cifar_dist.prepare --output FOLDER`"
        )
    digest = _read_json(root, root / DIGEST)
    try:
        for name in SPLITS:
            int(digest[name]["rows"]), str(digest[name]["sha256"]), str(digest["content"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _corruption_error(root, root / DIGEST, f"lacks {error}") from error
    return digest


def no_data_error(root: Path) -> UserError:
    """Return the error of commands with a --data option for a folder without data."""
    origin = "" if root.is_absolute() else f" (relative to {Path.cwd()})"
    return UserError(f"there is no data in {root}{origin}; give its folder with --data FOLDER")


def data_digest(root: Path) -> str:
    """Return one SHA-256 for the content of both splits: OFFICIAL_DIGEST for CIFAR-100."""
    digest = read_digest(root)
    return hashlib.sha256("".join(digest[name]["sha256"] for name in SPLITS).encode()).hexdigest()


def class_names(root: Path, labels: Labels = "fine") -> tuple[str, ...]:
    """Return the names of the classes, ordered by label; UserError without such labels."""
    meta = _read_meta(root, "train")
    if labels == "fine":
        return tuple(meta.fine_label_names)
    if not meta.coarse_label_names:
        raise no_superclasses_error(root)
    return tuple(meta.coarse_label_names)


def read_image_size(root: Path) -> int:
    """Return S of images [3, S, S], in pixels; UserError if the data set does not have such images."""
    path = root / "train" / INFO
    content = _read_json(root, path)
    with _report_corruption(root, path):
        return _image_size(content["features"]["image"]["length"])


def _image_size(length: int) -> int:
    """Return S, given the 3 * S * S bytes of an image; ValueError if there is no such S."""
    size = math.isqrt(length // 3)
    if not MIN_SIZE <= size <= MAX_SIZE or 3 * size * size != length:
        raise ValueError(
            f"has images of {length:,} bytes, not 3 x S x S with S from {MIN_SIZE} to {MAX_SIZE}"
        )
    return size


def no_superclasses_error(data: object) -> UserError:
    return UserError(f"data.labels=coarse: {data} has no superclasses; use data.labels=fine")


def classes_digest(names: Sequence[str]) -> str:
    """Return the SHA-256 of class names in their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Hierarchy:
    """Names of the classes, of their superclasses if they have any, and the mapping between them."""

    fine: tuple[str, ...]
    coarse: tuple[str, ...]  # empty without superclasses
    coarse_of_fine: Tensor  # int64 [C]; -1 for a class without images or superclass


def read_hierarchy(root: Path, labels: Labels = "fine") -> Hierarchy:
    """Read the class names from the metadata and each class's superclass from the rows.

    Superclasses as labels have no superclasses themselves.
    """
    fine = class_names(root, labels)
    coarse = _read_meta(root, "train").coarse_label_names if labels == "fine" else []
    coarse_of_fine = torch.full((len(fine),), -1)
    for name in SPLITS if coarse else ():
        raw = read_split(root, name)
        coarse_of_fine[torch.tensor(raw.fine_labels)] = torch.tensor(raw.coarse_labels)
    return Hierarchy(fine=fine, coarse=tuple(coarse), coarse_of_fine=coarse_of_fine)


def load_split(
    root: Path,
    name: Literal["train", "test"],
    device: torch.device | str = "cpu",
    place: Place = "device",
    labels: Labels = "fine",
) -> Split:
    """Load a split onto `device` and verify its digest; raise UserError if the files are corrupt.

    The 50,000 rows of CIFAR-100 take 0.1 s on one core, almost all of it for the SHA-256.
    """
    table = _open_table(root, name)
    _verify(root, name, table)
    return _to_split(table, device, place, labels)


def read_labels(root: Path, name: Literal["train", "test"], labels: Labels = "fine") -> Tensor:
    """Return the labels of a split, int64 [N], without verifying its digest."""
    return _to_split(_open_table(root, name), "cpu", "host", labels).labels


def open_splits(
    root: Path,
    device: torch.device | str,
    place: Place = "device",
    labels: Labels = "fine",
) -> tuple[Split, Split, Callable[[], None]]:
    """Return the train and test splits, and a function that finishes their verification.

    Types, sizes and label ranges are checked at once; threads compute the digests in the background.
    Call the function before relying on any result: it waits for the digests and raises UserError if
    the files are corrupt.
    """
    tables = {name: _open_table(root, name) for name in SPLITS}
    train, test = (_to_split(tables[name], device, place, labels) for name in SPLITS)
    pool = ThreadPoolExecutor(len(tables), "digest")  # last: it would delay the copies above
    verifications = [pool.submit(_verify, root, name, table) for name, table in tables.items()]
    pool.shutdown(wait=False)

    def check() -> None:
        for verification in verifications:
            verification.result()

    return train, test, check


def read_split(root: Path, name: Literal["train", "test"]) -> RawSplit:
    """Return all columns of a split as memory-mapped views; raise UserError if they are corrupt."""
    return _verify(root, name, _open_table(root, name))


def _open_table(root: Path, name: str) -> Any:
    """Memory-map the single record batch of a split after checking types, sizes and label ranges."""
    path = root / name / TABLE
    rows, meta = read_digest(root)[name]["rows"], _read_meta(root, name)
    size = read_image_size(root)
    classes = {"fine_label": meta.fine_label_names, "coarse_label": meta.coarse_label_names}
    with _report_corruption(root, path):
        with pa.memory_map(str(path)) as file:
            batches = list(pa.ipc.open_stream(file))
        if len(batches) != 1:
            raise ValueError(f"has {len(batches)} record batches instead of one")
        (batch,) = batches
        batch.validate(full=True)
        if batch.num_rows != rows:
            raise ValueError(f"has {batch.num_rows:,} rows instead of {rows:,}")
        if any(column.null_count for column in batch.columns):
            raise ValueError("has null values")
        image = batch.column("image")
        if image.type != pa.list_(pa.uint8(), 3 * size**2):
            raise ValueError(f"has images of type {image.type}, not uint8 [3, {size}, {size}]")
        for column in (column for column, names in classes.items() if names):
            labels, last = _labels(batch, column), len(classes[column]) - 1
            if not (labels.min() >= 0 and labels.max() <= last):
                raise ValueError(f"has labels outside 0..{last}")
    return batch


def _verify(root: Path, name: str, table: Any) -> RawSplit:
    """Return all columns of an open split after comparing their content with its digest."""
    expected, meta = read_digest(root)[name], _read_meta(root, name)
    with _report_corruption(root, root / name / TABLE):
        raw = RawSplit(
            images=_images(table),
            fine_labels=_labels(table, "fine_label"),
            coarse_labels=_labels(table, "coarse_label" if meta.coarse_label_names else None),
            filenames=table.column("filename").to_pylist(),
        )
        if content_digest(raw, meta) != expected["sha256"]:
            raise ValueError("does not match its SHA-256 digest")
    return raw


def _to_split(table: Any, device: torch.device | str, place: Place, of: Labels) -> Split:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        flat = torch.from_numpy(_images(table))
        size = _image_size(flat.shape[1])
        images = flat.view(-1, 3, size, size)
        labels = torch.from_numpy(_labels(table, f"{of}_label"))
        coarse_labels = None
        if of == "fine" and "coarse_label" in table.schema.names:
            coarse_labels = torch.from_numpy(_labels(table, "coarse_label"))
    on_host = place == "host"
    return Split(
        images=images if on_host else images.to(device),
        labels=labels.to(device),
        on_host=on_host,
        coarse_labels=coarse_labels,
    )


def _images(table: Any) -> np.ndarray:
    """uint8 [N, 3 * S * S], without a copy. `to_numpy` would import pandas."""
    column = table.column("image")
    return np.from_dlpack(column.flatten()).reshape(-1, column.type.list_size)


def _labels(table: Any, name: str | None) -> np.ndarray:
    """int64 [N], or [0] without a column"""
    if name is None:
        return np.empty(0, np.int64)
    return np.from_dlpack(table.column(name).cast(pa.int64()))


@contextmanager
def _report_corruption(root: Path, path: Path) -> Iterator[None]:
    """Report errors inside the context as corruption of `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise _corruption_error(root, path, "is missing") from error
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise _corruption_error(root, path, str(error).splitlines()[0]) from error


def _read_meta(root: Path, name: str) -> RawMeta:
    path = root / name / INFO
    try:
        features = _read_json(root, path)["features"]
        fine = list(features["fine_label"]["names"])
        coarse = list(features["coarse_label"]["names"]) if "coarse_label" in features else []
        return RawMeta(fine_label_names=fine, coarse_label_names=coarse)
    except (KeyError, TypeError) as error:
        raise _corruption_error(root, path, f"lacks {error}") from error


def _read_json(root: Path, path: Path) -> dict[str, Any]:
    if (content := read_json(path, _remedy(root))) is None:
        raise _corruption_error(root, path, "is missing")
    return content


def _corruption_error(root: Path, path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; {_remedy(root)}")


def _remedy(root: Path) -> str:
    return (
        f"recreate the dataset with `python -m cifar_dist.prepare --force --output {root}` and its "
        "original --source, --sample, --images or --dataset"
    )


def _save_quietly(dataset: Any, folder: Path) -> None:
    import datasets

    visible = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset.save_to_disk(folder, num_shards=1)
    finally:
        if visible:
            datasets.enable_progress_bars()
