"""Floor 1, the second step of the walk: a Hugging Face dataset on disk, read back without a copy.

`datasets.load_from_disk(root)` opens what is written here. Training reads the same two files with
pyarrow alone, as a view of the memory map, after it has compared their content with `digest.json`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cifar_dist.data.ingest.pickles import (
    COARSE_CLASSES,
    FINE_CLASSES,
    PIXELS,
    RawMeta,
    RawSplit,
)
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_folder, atomic_write, write_json

SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")
Place = Literal["device", "host"]  # of the images
TABLE, INFO, DIGEST = "data-00000-of-00001.arrow", "dataset_info.json", "digest.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One split on its device, that of the labels; with `on_host` the images are not on it.

    On the CPU the images are the file's own pages: never write to them.
    """

    images: Tensor  # uint8 [N, 3, 32, 32]
    labels: Tensor  # int64 [N], fine
    on_host: bool = False  # too many for the device, so nothing is made of all of them at once

    def gather(self, rows: Tensor) -> Tensor:
        """uint8 [B, 3, 32, 32] on the device: the rows' (int64 [B]) as they are; waits if `on_host`."""
        picked = self.images.index_select(0, rows.to(self.images.device))
        return picked.to(self.labels.device)


def write_dataset(
    root: Path,
    train: RawSplit,
    test: RawSplit,
    meta: RawMeta,
    *,
    content: Literal["official", "sample", "other"],
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write `root` as a DatasetDict of train and test, in one step; `beside` are files to add to it."""
    import datasets  # two seconds, and not on every training machine

    features = datasets.Features(
        {
            "image": datasets.List(datasets.Value("uint8"), length=PIXELS),
            "fine_label": datasets.ClassLabel(names=meta.fine_label_names),
            "coarse_label": datasets.ClassLabel(names=meta.coarse_label_names),
            "filename": datasets.Value("string"),
        }
    )
    with atomic_folder(root) as folder:
        write_json(folder / "dataset_dict.json", {"splits": SPLITS})
        digest: dict[str, Any] = {"content": content}
        for name, raw in zip(SPLITS, (train, test), strict=True):
            images = pa.FixedSizeListArray.from_arrays(pa.array(raw.images.reshape(-1)), PIXELS)
            table = pa.table(
                [images, raw.fine_labels, raw.coarse_labels, raw.filenames],
                schema=features.arrow_schema,
            )
            # save_to_disk would cut the table into 50 chunks, so only an empty one goes through it.
            sha256 = content_digest(raw, meta)
            empty = datasets.Dataset(
                table.slice(0, 0),
                info=datasets.DatasetInfo(features=features),
                split=datasets.Split(name),
                fingerprint=sha256[:16],  # the key of `datasets`' own caches
            )
            _save_quietly(empty, folder / name)
            with pa.ipc.new_stream(folder / name / TABLE, table.schema) as writer:
                writer.write_table(table, max_chunksize=len(raw.images))
            digest[name] = {"rows": len(raw.images), "sha256": sha256}
        for path, data in (beside or {}).items():
            atomic_write(folder / path, data)
        write_json(folder / DIGEST, digest)


def content_digest(raw: RawSplit, meta: RawMeta) -> str:
    """SHA-256 of what a split says: pixels, labels, filenames, class names; not of its encoding."""
    names = [meta.fine_label_names, meta.coarse_label_names, raw.filenames]
    digest = hashlib.sha256(json.dumps(names).encode())
    for array in (raw.fine_labels, raw.coarse_labels, raw.images):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def read_digest(root: Path) -> dict[str, Any]:
    """`digest.json`: {"content": ..., "train": {"rows": ..., "sha256": ...}, "test": {...}}."""
    digest = _read_json(root, root / DIGEST)
    try:
        for name in SPLITS:
            int(digest[name]["rows"]), str(digest[name]["sha256"]), str(digest["content"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damage(root, root / DIGEST, f"lacks {error}") from error
    return digest


def data_digest(root: Path) -> str:
    """One SHA-256 for the content of both splits."""
    digest = read_digest(root)
    return hashlib.sha256("".join(digest[name]["sha256"] for name in SPLITS).encode()).hexdigest()


def class_names(root: Path) -> tuple[str, ...]:
    """The 100 fine classes' names, in the order of their labels."""
    return tuple(_read_meta(root, "train").fine_label_names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Hierarchy:
    """The classes and what they are part of."""

    fine: tuple[str, ...]
    coarse: tuple[str, ...]
    coarse_of_fine: Tensor  # int64 [100]; -1 for a class that the data set has no picture of


def read_hierarchy(root: Path) -> Hierarchy:
    """Names from the data set's description, and each class's superclass from the rows."""
    meta = _read_meta(root, "train")
    coarse_of_fine = torch.full((len(meta.fine_label_names),), -1)
    for name in SPLITS:
        raw = read_split(root, name)
        coarse_of_fine[torch.tensor(raw.fine_labels)] = torch.tensor(raw.coarse_labels)
    return Hierarchy(
        fine=tuple(meta.fine_label_names),
        coarse=tuple(meta.coarse_label_names),
        coarse_of_fine=coarse_of_fine,
    )


def load_split(
    root: Path,
    name: Literal["train", "test"],
    device: torch.device | str = "cpu",
    place: Place = "device",
) -> Split:
    """The split, verified against its digest, on `device`; UserError for damage of any kind.

    The 50,000 rows of CIFAR-100 take 0.1 s on one core, nearly all of it for their SHA-256.
    """
    table = _open_table(root, name)
    _verify(root, name, table)
    return _split(table, device, place)


def open_splits(
    root: Path, device: torch.device | str, place: Place = "device"
) -> tuple[Split, Split, Callable[[], None]]:
    """Train and test at once, and what to call before their numbers count.

    Threads compute the digests meanwhile; the call waits for them and raises the UserError of a
    damage. What would not even be pictures and labels of the right ranges is refused here.
    """
    tables = {name: _open_table(root, name) for name in SPLITS}
    train, test = (_split(tables[name], device, place) for name in SPLITS)
    pool = ThreadPoolExecutor(len(tables), "digest")  # last, as it would hold up what is above
    verifying = [pool.submit(_verify, root, name, table) for name, table in tables.items()]
    pool.shutdown(wait=False)

    def check() -> None:
        for verified in verifying:
            verified.result()

    return train, test, check


def read_split(root: Path, name: Literal["train", "test"]) -> RawSplit:
    """All columns of a split as views of the memory map, verified; UserError for damage of any kind."""
    return _verify(root, name, _open_table(root, name))


def _open_table(root: Path, name: str) -> Any:
    """The split's one record batch as a view of the memory map: its types, sizes and labels are right."""
    path = root / name / TABLE
    rows = read_digest(root)[name]["rows"]
    with _naming_damage(root, path):
        with pa.memory_map(str(path)) as file:
            batches = list(pa.ipc.open_stream(file))
        if len(batches) != 1:
            raise ValueError(f"has {len(batches)} record batches instead of one")
        (batch,) = batches
        batch.validate(full=True)
        if batch.num_rows != rows:
            raise ValueError(f"has {batch.num_rows:,} rows instead of {rows:,}")
        if any(column.null_count for column in batch.columns):
            raise ValueError("has empty cells")
        image = batch.column("image")
        if image.type != pa.list_(pa.uint8(), PIXELS):
            raise ValueError(f"has images of type {image.type}")
        for column, classes in ("fine_label", FINE_CLASSES), ("coarse_label", COARSE_CLASSES):
            labels = _labels(batch, column)
            if not (labels.min() >= 0 and labels.max() < classes):
                raise ValueError(f"has labels outside 0..{classes - 1}")
    return batch


def _verify(root: Path, name: str, table: Any) -> RawSplit:
    """All columns of an open split, compared with its digest."""
    expected, meta = read_digest(root)[name], _read_meta(root, name)
    with _naming_damage(root, root / name / TABLE):
        raw = RawSplit(
            images=_images(table),
            fine_labels=_labels(table, "fine_label"),
            coarse_labels=_labels(table, "coarse_label"),
            filenames=table.column("filename").to_pylist(),
        )
        if content_digest(raw, meta) != expected["sha256"]:
            raise ValueError("differs from what was written (its digest is another)")
    return raw


def _split(table: Any, device: torch.device | str, place: Place) -> Split:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        images = torch.from_numpy(_images(table)).view(-1, 3, 32, 32)
        labels = torch.from_numpy(_labels(table, "fine_label"))
    on_host = place == "host"
    return Split(
        images=images if on_host else images.to(device), labels=labels.to(device), on_host=on_host
    )


def _images(table: Any) -> np.ndarray:
    """uint8 [N, 3072]"""
    return table.column("image").flatten().to_numpy(zero_copy_only=True).reshape(-1, PIXELS)


def _labels(table: Any, name: str) -> np.ndarray:
    """int64 [N]"""
    return table.column(name).cast(pa.int64()).to_numpy()


@contextmanager
def _naming_damage(root: Path, path: Path) -> Iterator[None]:
    """What goes wrong within is the file's damage."""
    try:
        yield
    except FileNotFoundError as error:
        raise _damage(root, path, "is missing") from error
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise _damage(root, path, str(error).splitlines()[0]) from error


def _read_meta(root: Path, name: str) -> RawMeta:
    path = root / name / INFO
    try:
        features = _read_json(root, path)["features"]
        return RawMeta(
            fine_label_names=list(features["fine_label"]["names"]),
            coarse_label_names=list(features["coarse_label"]["names"]),
        )
    except (KeyError, TypeError) as error:
        raise _damage(root, path, f"lacks {error}") from error


def _read_json(root: Path, path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _damage(root, path, "is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damage(root, path, "is not readable JSON") from error


def _damage(root: Path, path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: {reason}; write the data anew with `python -m cifar_dist.prepare --force "
        f"--output {root}` and the --source or --sample they came from"
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
