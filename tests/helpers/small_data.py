"""A small synthetic dataset: 64 + 23 rows; 23 is prime, so no batch size divides it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.data.ingest.archive import FOLDER
from cifar_dist.data.ingest.pickles import RawMeta, RawSplit
from cifar_dist.data.ingest.synthetic import draw_synthetic, pickle_members
from cifar_dist.utils.files import atomic_write


def first_rows(raw: RawSplit, rows: int) -> RawSplit:
    return replace(
        raw,
        images=raw.images[:rows],
        fine_labels=raw.fine_labels[:rows],
        coarse_labels=raw.coarse_labels[:rows],
        filenames=raw.filenames[:rows],
    )


def small_data() -> tuple[RawSplit, RawSplit, RawMeta]:
    train, test, meta = draw_synthetic(train_per_class=1, test_per_class=1)
    return first_rows(train, 64), first_rows(test, 23), meta


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
        atomic_write(folder / FOLDER / name, data)
