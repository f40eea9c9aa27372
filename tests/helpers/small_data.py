"""A small synthetic dataset: 64 + 23 rows; 23 is prime, so no batch size divides it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cifar_dist.data.dataset import write_dataset
from cifar_dist.data.ingest.archive import CIFAR_10, CIFAR_100
from cifar_dist.data.ingest.pickles import BATCH_LABELS, RawMeta, RawSplit
from cifar_dist.data.ingest.synthetic import draw_synthetic, pickle_members
from cifar_dist.utils.files import atomic_write


def first_rows(raw: RawSplit, rows: int) -> RawSplit:
    return select_rows(raw, np.arange(rows))


def select_rows(raw: RawSplit, rows: np.ndarray) -> RawSplit:
    return replace(
        raw,
        images=raw.images[rows],
        fine_labels=raw.fine_labels[rows],
        coarse_labels=raw.coarse_labels[rows] if len(raw.coarse_labels) else raw.coarse_labels,
        filenames=[raw.filenames[row] for row in rows],
    )


def small_data() -> tuple[RawSplit, RawSplit, RawMeta]:
    train, test, meta = draw_synthetic(train_per_class=1, test_per_class=1)
    return first_rows(train, 64), first_rows(test, 23), meta


def with_classes(count: int) -> tuple[RawSplit, RawSplit, RawMeta]:
    """Return `small_data` with `count` classes and without superclasses."""
    train, test, meta = small_data()
    train, test = (
        replace(raw, fine_labels=raw.fine_labels % count, coarse_labels=np.empty(0, np.int64))
        for raw in (train, test)
    )
    return (
        train,
        test,
        RawMeta(fine_label_names=meta.fine_label_names[:count], coarse_label_names=[]),
    )


def resized(raw: RawSplit, size: int) -> RawSplit:
    """Return the rows with images of another size, by repeating or leaving out pixels."""
    index = np.arange(size) * 32 // size
    images = raw.images.reshape(-1, 3, 32, 32)[:, :, index][..., index]
    return replace(raw, images=np.ascontiguousarray(images).reshape(len(images), -1))


def write_sized(root: Path, size: int) -> None:
    """Write a dataset of four classes with images of `size` px."""
    train, test, meta = with_classes(4)
    write_dataset(root, resized(train, size), resized(test, size), meta, content="other")


def cifar_10_members(train: RawSplit, test: RawSplit, meta: RawMeta) -> dict[str, bytes]:
    """Return the seven files of CIFAR-10, with the training rows in five batches."""
    rows = np.array_split(np.arange(len(train.images)), 5)
    parts = [select_rows(train, some) for some in rows]
    files = dict(zip([*CIFAR_10.train, CIFAR_10.test], [*parts, test], strict=True))
    contents: dict[str, dict[bytes, Any]] = {
        name: {
            b"batch_label": BATCH_LABELS[name].encode(),
            b"labels": raw.fine_labels.tolist(),
            b"data": raw.images,
            b"filenames": [filename.encode() for filename in raw.filenames],
        }
        for name, raw in files.items()
    }
    contents[CIFAR_10.meta] = {
        b"num_cases_per_batch": len(parts[0].images),
        b"label_names": [name.encode() for name in meta.fine_label_names],
        b"num_vis": 3072,
    }
    return {name: pickle.dumps(content, protocol=2) for name, content in contents.items()}


def quick_recipe(folder: Path, name: str, data_path: Path, **sections: dict[str, Any]) -> Path:
    """Write a recipe for one epoch of timm's smallest ResNet, for session-scoped fixtures."""
    content: dict[str, Any] = {
        "run": {"epochs": 1, "batch_size": 20, "precision": "fp32", "threads": 1},
        "data": {"path": str(data_path)},
        "model": {"backbone": "test_resnet"},
        "augment": {"hflip": True, "crop_padding": 2},
    }
    for section, keys in sections.items():
        content[section] = content.get(section, {}) | keys
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name} | content))
    return path


def write_pickles(folder: Path, train: RawSplit, test: RawSplit, meta: RawMeta) -> None:
    """Write the three pickle files in CIFAR's layout to `folder`/cifar-100-python."""
    for name, data in pickle_members(train, test, meta).items():
        atomic_write(folder / CIFAR_100.folder / name, data)
