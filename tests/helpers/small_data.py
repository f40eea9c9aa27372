"""A true data set in small: 64 + 23 rows of the drawn sample (23 divides by nothing)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.data.ingest.pickles import RawMeta, RawSplit
from cifar_dist.data.ingest.synthetic import draw_synthetic


def cut(raw: RawSplit, rows: int) -> RawSplit:
    return replace(
        raw,
        images=raw.images[:rows],
        fine_labels=raw.fine_labels[:rows],
        coarse_labels=raw.coarse_labels[:rows],
        filenames=raw.filenames[:rows],
    )


def small_data() -> tuple[RawSplit, RawSplit, RawMeta]:
    train, test, meta = draw_synthetic(train_per_class=1, test_per_class=1)
    return cut(train, 64), cut(test, 23), meta


def quick_recipe(folder: Path, name: str, place: Path, **sections: dict[str, Any]) -> Path:
    """One epoch of timm's smallest ResNet; for fixtures that outlive a test."""
    content: dict[str, Any] = {
        "run": {"epochs": 1, "batch_size": 20, "precision": "fp32", "threads": 1},
        "data": {"path": str(place)},
        "model": {"backbone": "test_resnet"},
        "augment": {"hflip": True, "crop_padding": 2},
    }
    for section, keys in sections.items():
        content[section] = content.get(section, {}) | keys
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name} | content))
    return path
