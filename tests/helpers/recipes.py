"""Recipes for tests: small networks on small data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

RecipeMaker = Callable[..., Path]


def write_recipe(folder: Path, data: Path, /, name: str = "tiny", **sections: Any) -> Path:
    """Write a recipe: 24 steps of timm's smallest ResNet, with keys replaced by `sections`."""
    content: dict[str, Any] = {
        "name": name,
        "run": {
            "epochs": 4,
            "batch_size": 10,
            "micro_batches": 2,
            "precision": "fp32",
            "threads": 1,
            "log_every_steps": 5,
        },
        "data": {"path": str(data)},
        "model": {"backbone": "test_resnet", "drop_rate": 0.1},
        "augment": {"crop_padding": 4, "hflip": True, "cutout": 8, "mixup": 0.2, "cutmix": 1.0},
        "optim": {"name": "adamw", "lr": 0.003, "weight_decay": 0.05, "max_grad_norm": 5.0},
        "averaging": {"decay": 0.9},
    }
    for section, keys in sections.items():
        if isinstance(keys, dict):
            content[section] = content.get(section, {}) | keys
        else:
            content[section] = keys
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value}))
    return path


TeacherMaker = Callable[..., Path]


def with_teachers(*names: str, **keys: Any) -> dict[str, Any]:
    """Return sections of a recipe with these teachers."""
    teachers = [{"run": f"runs/{name}"} | keys for name in names]
    return {
        "losses": {"cross_entropy": {"weight": 0.3}, "distill": {"weight": 0.7}},
        **({"teacher": teachers[0]} if len(teachers) == 1 else {"teachers": teachers}),
    }
